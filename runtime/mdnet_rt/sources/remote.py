"""Images behind URLs, by fsspec: `s3://`, `gs://`, `https://` and what else has a package for it (extra `remote`)."""

from __future__ import annotations

import posixpath
import re
import string
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO
from urllib.parse import quote

from mdnet_engines.errors import MDNetError, UsageError, first_line, printable, require
from mdnet_rt.images.decode import MAX_BYTES, ImageError, too_large
from mdnet_rt.sources.archives import read_archive
from mdnet_rt.sources.entry import FOUND_SUFFIXES, Entry, archive_kind, natural_key

_HTTP = re.compile("https?://", re.IGNORECASE)


def expand_url(url: str) -> Callable[[], Iterator[str]]:
    """What a URL means: itself, the images below it if it is a folder, or its matches if it has a `*`.

    Over HTTP a URL is one file, since servers list no folders; a `?` begins its query.

    Raises:
        UsageError: nothing exists there, or nothing matches.
        MDNetError: the package for its scheme is missing, or the other side refuses.
    """
    if _HTTP.match(url):
        return lambda: iter([url])
    system, path = _open_system(url)
    try:
        if system.isdir(path):
            found = _images_below(system, path)
        elif system.exists(path):
            return lambda: iter([url])
        elif re.search(r"[*[]", path):
            found = _matches(system, path)
            if not found:
                raise UsageError(f"no file matches {printable(url)}")
        else:
            raise UsageError(f"{printable(url)} does not exist")
    except MDNetError:
        raise
    except Exception as error:  # each scheme's package has errors of its own
        raise MDNetError(f"{printable(url)} can't be listed: {first_line(error)}") from error
    urls = sorted({system.unstrip_protocol(each) for each in found}, key=natural_key)
    return lambda: iter(urls)


def read_url(url: str, column: str | None = None) -> Iterator[Entry]:
    """The image behind a URL, fetched when it is decoded; or those of an archive, read as it arrives."""
    if archive_kind(url):
        yield from read_archive(url, lambda: _open(url), column)
    else:
        yield Entry(url, lambda: _fetch(url))


def _matches(system: Any, pattern: str) -> list[str]:
    """What matches; in place of a folder, the images below it."""
    found: list[str] = []
    hidden = posixpath.basename(pattern).startswith(".")
    for path, facts in system.glob(pattern, detail=True).items():
        if posixpath.basename(path).startswith(".") and not hidden:
            continue
        found += _images_below(system, path) if facts["type"] == "directory" else [path]
    return found


def _images_below(system: Any, folder: str) -> list[str]:
    return [path for path in system.find(folder) if _is_image(path)]


def _is_image(path: str) -> bool:
    name = posixpath.basename(path)
    return name.lower().endswith(FOUND_SUFFIXES) and not name.startswith(".")


def _fetch(url: str) -> bytes:
    try:
        with _open(url) as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ImageError("no such file") from None
    except MDNetError as error:
        raise ImageError(str(error)) from error
    except Exception as error:  # each scheme's package has errors of its own
        raise ImageError(f"can't be fetched ({first_line(error)[:200]})") from error
    if len(content) > MAX_BYTES:
        raise ImageError(too_large(len(content), MAX_BYTES))
    return content


def _open(url: str) -> BinaryIO:
    system, path = _open_system(url)
    try:
        return system.open(path, "rb")
    except FileNotFoundError as error:
        cause = error.__cause__  # over HTTP every failure has this name
        if cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404:
            raise
        raise MDNetError(f"can't be fetched ({first_line(cause)[:200]})") from error


def _open_system(url: str) -> tuple[Any, str]:
    require("fsspec", "remote")
    import fsspec

    options: dict[str, Any] = {}
    if _HTTP.match(url):
        # Signatures hold for the bytes that were signed: only what no request may have in it is encoded.
        url = quote(url, safe=string.punctuation, errors="surrogateescape")
        options = {"encoded": True, "client_kwargs": {"requote_redirect_url": False}}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:  # no package for the scheme, or no such scheme
        raise MDNetError(f"{printable(url)}: {first_line(error)}") from error
