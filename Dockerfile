# mdnet-rt on CPUs, without torch. Build it: docker build -t mdnet-rt .
# Run it, with a bundle from this machine: docs/serving.md, "In a container".
FROM python:3.11-slim-bookworm AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN python3 -m venv /opt/mdnet && \
    /opt/mdnet/bin/pip install --no-cache-dir -c /src/constraints.txt '/src[cpu,openvino,serve]' && \
    /opt/mdnet/bin/python -c "from mdnet_engines.ops import native; assert native.library(), native.MISSING"

FROM python:3.11-slim-bookworm
COPY --from=build /opt/mdnet /opt/mdnet
# What a backend has proven here, and OpenVINO's compiled graphs, are kept in the cache; /tmp alone has to be writable.
ENV PATH=/opt/mdnet/bin:$PATH MDNET_BUNDLE=/bundle HOME=/tmp XDG_CACHE_HOME=/tmp/cache PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
VOLUME /bundle
EXPOSE 8000
HEALTHCHECK --interval=10m --start-period=2m --timeout=2m CMD ["mdnet-rt", "check"]
ENTRYPOINT ["mdnet-rt"]
CMD ["serve", "--host", "0.0.0.0"]
