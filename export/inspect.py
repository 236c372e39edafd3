"""What is in a bundle, for people."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from mdnet_engines.bundle import Bundle
from mdnet_engines.console import output
from mdnet_engines.manifest import TensorSpec


def print_bundle(bundle: Bundle) -> None:
    """Print the bundle's graphs and facts to standard output."""
    manifest = bundle.manifest
    console = output()
    table = Table("graph", "precision", "size, MB", "inputs", "outputs", title=str(bundle.path))
    for name, graph in manifest.graphs.items():
        size = sum(file.size for file in graph.files()) / 1e6
        signature = (", ".join(map(_signature, specs)) for specs in (graph.inputs, graph.outputs))
        table.add_row(name, graph.precision, f"{size:.1f}", *map(escape, signature))  # [batch, …] is no markup
    console.print(table)
    parity, provenance = manifest.parity, manifest.provenance
    verdict = "passed" if parity.passed else "FAILED, forced"
    digest = f", sha256 {provenance.checkpoint_sha256}" if provenance.checkpoint_sha256 else ""
    facts = {
        "preset": f"{manifest.preset}, schema {manifest.schema_version}; every file's sha256 is as the manifest says",
        "input": f"{manifest.preprocessing.image_size} px, {manifest.preprocessing.resample}, centre crop",
        "score": f"{manifest.score.minimum:g} to {manifest.score.maximum:g}",
        "parity": f"{verdict}: {parity}",
        "weights": provenance.weights + digest,
        "built by": provenance.command,
        "versions": ", ".join(f"{name} {number}" for name, number in provenance.versions.items()),
        "licences": "; ".join(manifest.licenses),
    }
    width = max(map(len, facts))
    for key, value in facts.items():
        console.print(f"{key:<{width}}  {value}", markup=False, highlight=False, soft_wrap=True)


def _signature(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype}[{', '.join(map(str, spec.shape))}]"
