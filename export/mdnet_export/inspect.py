"""What is in a bundle, for people."""

from __future__ import annotations

from collections import Counter

from mdnet_calib.sensitivity import block_of
from mdnet_engines.backends.candidates import Choice
from mdnet_engines.backends.choice import choose, tuned
from mdnet_engines.bundle.files import Bundle
from mdnet_engines.bundle.manifest import Manifest, PlanSet, TensorSpec
from mdnet_engines.bundle.precision_facts import QuantisedFacts
from mdnet_engines.console import show_facts
from mdnet_engines.errors import BundleError, printable
from mdnet_engines.framing import describe_face
from mdnet_engines.ops.winograd import NAMES, native_products
from mdnet_engines.tensorrt.plan_process import probe
from mdnet_engines.tensorrt.plans import FOR_FP8, Host, check_plans, explain_incompatible, summary
from mdnet_export.graphs.cpu_variant import winograd_convolutions


def print_bundle(bundle: Bundle) -> None:
    """Print the bundle's graphs and facts to standard output, a fact a line."""
    manifest = bundle.manifest
    graphs = {}
    for name, graph in manifest.graphs.items():
        size = sum(file.size for file in graph.files()) / 1e6
        inputs, outputs = (", ".join(map(_signature, specs)) for specs in (graph.inputs, graph.outputs))
        graphs[f"graph {name}"] = f"{graph.precision}, {size:.1f} MB: {inputs} → {outputs}"
    parity, provenance = manifest.parity, manifest.provenance
    verdict = "passed" if parity.passed else "FAILED, forced"
    digest = f", sha256 {provenance.checkpoint_sha256}" if provenance.checkpoint_sha256 else ""
    made = manifest.preprocessing
    colours = "colours to sRGB" if made.to_srgb else "colours as stored"
    shown = f"{describe_face(made.face)}, eyes level" if made.face else "centre crop"
    facts = {
        "preset": f"{manifest.preset}, schema {manifest.schema_version}; every file's sha256 is as the manifest says",
        "input": f"{made.image_size} px, {made.resample}, {shown}, {colours}",
        "score": str(manifest.score),
        "parity": f"{verdict}: {parity}",
        **_precision(manifest),
        **_winograd(bundle),
        **_backends(bundle),
        "weights": printable(provenance.name) + digest,
        "built by": provenance.command,
        "versions": ", ".join(f"{name} {number}" for name, number in provenance.versions.items()),
        "licences": "; ".join(manifest.licenses),
    }
    hosts = {runtime: probe(runtime) for runtime in sorted({engines.runtime for engines in manifest.engines})}
    plans = [("plans", _describe(bundle, engines, hosts[engines.runtime])) for engines in manifest.engines]
    show_facts(str(bundle.path), [*graphs.items(), *facts.items(), *plans])


def _backends(bundle: Bundle) -> dict[str, str]:
    """What `auto` takes here, with the times that decided it, and how backends met the gates where."""
    facts = {"runs here": f"{choose(bundle, check=False)} (backend auto; {_why(bundle)})"}
    for check in bundle.manifest.backends:
        verdict = str(check.parity) if check.parity.passed else f"FAILED: {check.failures}"
        facts[f"gates, {Choice(check.graphs)}"] = f"{verdict} ({check.machine})"
    return facts


def _why(bundle: Bundle) -> str:
    found = tuned(bundle)
    if found is None:
        return f"by this CPU's features; to measure: mdnet-rt tune {bundle.path}"
    times = [f"{graph} " + ", ".join(f"{b} {ms:.3g} ms" for b, ms in by.items()) for graph, by in found.ms.items()]
    times += [f"all graphs {backend} {ms:.3g} ms" for backend, ms in found.whole_ms.items()]
    return f"measured with {found.threads} threads, batch {found.batch}: {'; '.join(times)}"


def _precision(manifest: Manifest) -> dict[str, str]:
    """How the precision came about, where there is anything to say."""
    facts = {}
    if variants := [graph.gpu.file.name for graph in manifest.graphs.values() if graph.gpu]:
        facts["for GPUs"] = f"{', '.join(variants)}: int8 in the same blocks, the rest float16"
    if calibration := manifest.calibration:
        facts["calibration"] = str(calibration)
    if int8 := manifest.int8:
        kept = f", in float: {', '.join(int8.float_blocks)}" if int8.float_blocks else ""
        facts["int8"] = (
            f"{len(int8.int8_blocks)} blocks{kept}{_held_on(int8)}; {int8.speedup:.2f}× float on {int8.speedup_on}"
        )
    if fp8 := manifest.fp8:
        kept = f", in float16: {', '.join(fp8.float_blocks)}" if fp8.float_blocks else ""
        facts["fp8"] = f"{len(fp8.fp8_blocks)} blocks{kept}{_held_on(fp8)}; {FOR_FP8}"
    for graph, values in manifest.float32_values.items():
        facts[f"float32 in {graph}"] = ", ".join(values)
    return facts


def _winograd(bundle: Bundle) -> dict[str, str]:
    """Which convolutions ONNX Runtime's encoder has by Winograd's algorithm, by block, and what runs them here."""
    if bundle.manifest.graphs["encoder"].cpu is None:
        return {}
    found = winograd_convolutions(bundle.graph_path("encoder", cpu=True))
    if not found:
        return {}
    blocks = Counter(block_of(node.name) for node in found)
    listed = ", ".join(f"{block} ({count})" if count > 1 else block for block, count in blocks.items())
    products = native_products() if any(node.op_type in NAMES for node in found) else "in float32"
    return {"Winograd": f"{len(found)} convolutions of {listed}; ONNX Runtime runs them here {products}"}


def _held_on(facts: QuantisedFacts) -> str:
    """Older bundles don't say."""
    return f", budget held on {' and '.join(facts.drift_on)}" if facts.drift_on else ""


def _describe(bundle: Bundle, engines: PlanSet, host: Host) -> str:
    """One set of plans, and whether this machine can use it."""
    try:
        check_plans(bundle, engines)
        reason = explain_incompatible(engines, bundle.manifest, host)
        by_name = f" with --backend {engines.runtime}" if engines.compatible else ""  # `auto` does not take them
        verdict = f"not for this machine: {reason}" if reason else f"runs here{by_name}"
    except BundleError as error:
        verdict = f"DAMAGED: {error}"
    return f"{engines.folder}, {summary(engines)}; {verdict}"


def _signature(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype}[{', '.join(map(str, spec.shape))}]"
