"""The tables of `docs/gpu.md` and README's line on GPUs from the newest results: `gpu_check.py render`."""

from __future__ import annotations

import re
from pathlib import Path

from gpu.claims import CLAIMS, GOALS, NO_RUN, cell, goal_state, state
from gpu.results import Figure, ResultError, Results, newest

BEGIN = "<!-- gpu-check: written by `python benchmarks/gpu_check.py render` up to the end mark -->"
END = "<!-- gpu-check: end -->"
_DOCS = "docs/gpu.md"


def render(results: Path, docs: Path, readme: Path) -> list[Path]:
    """Write both pages from the newest results in a folder; gives the files that changed.

    Raises:
        ResultError: a results file can't be read, or a page lacks the marks that the text goes between.
    """
    run = newest(results)
    changed = []
    for page, block in ((docs, f"{claims_table(run)}\n\n{docs_block(run)}"), (readme, readme_block(run))):
        text = page.read_text(encoding="utf-8")
        new = replaced(text, block, page.name)
        if new != text:
            page.write_text(new, encoding="utf-8")
            changed.append(page)
    return changed


def replaced(text: str, block: str, name: str) -> str:
    """A page's text with another block between the marks."""
    pattern = re.compile(rf"({re.escape(BEGIN)}\n).*?({re.escape(END)})", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ResultError(f"{name} has not one place between {BEGIN} and {END}")
    return pattern.sub(lambda found: f"{found[1]}\n{block}\n{found[2]}", text)


def readme_block(run: Results | None) -> str:
    """One line: how many claims a GPU has verified."""
    if run is None:
        return f"No GPU has run this code yet: every GPU claim is *unverified* ([{_DOCS}]({_DOCS})).\n"
    states = [state(claim, run) for claim in CLAIMS]
    verified, failed = (sum(said.startswith(start) for said in states) for start in ("verified on", "**"))
    said = f"of {len(CLAIMS)} GPU claims {verified} verified, {failed} failed"
    return f"{run.gpu}, {run.day}: {said} ([{_DOCS}]({_DOCS})).\n"


def claims_table(run: Results | None) -> str:
    """What is verified, claim by claim."""
    rows = [f"| {claim.what} | {state(claim, run)} |" for claim in CLAIMS]
    return "\n".join(["| on a GPU | |", "| --- | --- |", *rows])


def docs_block(run: Results | None) -> str:
    """The goals, and every row of the run."""
    lines = ["| goal | |", "| --- | --- |", *(f"| {goal.what} | {goal_state(goal, run)} |" for goal in GOALS), ""]
    if run is None:
        return "\n".join([*lines, f"All else: {NO_RUN}.", ""])
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    seconds = sum(stage.seconds for stage in run.stages)
    lines += [f"{run.gpu}, {run.day}, `{run.command}`, {seconds:.0f} s; {versions}.", ""]
    lines += ["| stage | what | result | figures |", "| --- | --- | --- | --- |"]
    for stage in run.stages:
        lines.append(f"| **{stage.name}** | {stage.seconds:.0f} s | {stage.status} | {cell(stage.note)} |")
        for row in stage.rows:
            figures = "; ".join(filter(None, [_figures(row.figures), cell(row.note)]))
            lines.append(f"| | {cell(row.name)} | {row.status} | {figures} |")
    return "\n".join(lines) + "\n"


def _figures(figures: dict[str, Figure]) -> str:
    return cell(", ".join(f"{name} {_shown(value)}" for name, value in figures.items()))


def _shown(value: Figure) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
