"""What `auto` takes; and nothing scores before it has passed the gates on this machine.

1. The choice that `tune` measured to be fastest here, with these threads and versions, if there is one.
2. Else the first of `candidates`: plans for this GPU, ONNX Runtime with CUDA, then by the CPU's instruction sets.

A choice that is not known on this machine (`mdnet_engines.backends.record`) scores a few of the bundle's probes first,
in a process of its own, and the result is kept. If it fails, `auto` tries the next; a backend that was named is
refused.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from mdnet_engines.backends import record as records
from mdnet_engines.backends.candidates import Backend, Choice, Graphs, candidates, named, open_choice
from mdnet_engines.backends.record import Tuned
from mdnet_engines.backends.trial import Measured, Times, measure_apart, time_apart
from mdnet_engines.bundle.files import Bundle
from mdnet_engines.bundle.manifest import BackendCheck, GraphBackend, GraphName
from mdnet_engines.errors import MDNetError
from mdnet_engines.parity.probes import read_probes
from mdnet_engines.parity.report import ParityReport
from mdnet_engines.progress import SILENT, Progress
from mdnet_engines.sessions import onnxruntime as session
from mdnet_engines.system.cores import available_cores
from mdnet_engines.system.machine import this_machine
from mdnet_engines.tensorrt.plans import FOR_FP8

SECONDS = 1.0
"""For which `tune` times a graph."""
_FASTER = 1.03  # times as fast must a backend be to take the place of an earlier candidate: less is noise
_LOG = logging.getLogger("mdnet_engines")


@dataclass(frozen=True)
class Trial:
    """A candidate on this machine: how it met the gates, or why it could not run."""

    choice: Choice
    measured: Measured | None
    problem: str = ""

    @property
    def report(self) -> ParityReport | None:
        """The gates; None where it could not run."""
        return None if self.measured is None else self.measured.report

    @property
    def holds(self) -> bool:
        """Whether it met every gate."""
        return self.report is not None and self.report.passed

    def verdict(self) -> str:
        """For people, on one line."""
        if self.report is None:
            return f"can't run: {self.problem}"
        return str(self.report.summary()) if self.holds else f"FAILED: {self.report.failures()}"

    def as_check(self) -> BackendCheck | None:
        """For manifest and record; None where it could not run."""
        return None if self.measured is None else _check(self.choice, self.measured)


@dataclass(frozen=True)
class Tuning:
    """What `tune` found; `choice` is the fastest of those that hold."""

    choice: Choice
    trials: list[Trial]
    times: Times
    kept: bool
    """Whether the user's cache could keep it."""


def open_graphs(bundle: Bundle, *, backend: Backend = "auto", threads: int = 0, check: bool = True) -> Graphs:
    """Open every graph of `bundle` on the backends that `choose` gives: the one way in, for gates and for users.

    Args:
        threads: threads per graph on the CPU; 0 takes all the cores this process may use.

    Raises:
        UsageError, MDNetError: as `choose`; or a backend is missing or can't load a graph.
    """
    return open_choice(bundle, choose(bundle, backend, threads=threads, check=check), threads=threads)


def choose(bundle: Bundle, backend: Backend = "auto", *, threads: int = 0, check: bool = True) -> Choice:
    """Which backend runs each graph of `bundle` on this machine.

    Args:
        backend: `auto`, or the one that is asked for.
        check: hold a choice that is not known here to the gates, in another process, and refuse one that is off them.
            Bundles without probes (schema version 1) can't be checked.

    Raises:
        UsageError: an unknown backend, or one that is not for this bundle.
        MDNetError: the backend, or of `auto` every one, is off its gates here or can't run.
    """
    if backend != "auto":
        choice = named(bundle, backend)
        if check and (reason := _off(bundle, choice, threads)):
            raise MDNetError(f"{reason}{_what_holds(bundle, choice, threads)}; --no-check overrides this")
        return choice
    options = _auto(bundle, threads)
    if not check:
        return options[0]
    reasons = []
    for choice in options:
        try:
            reason = _off(bundle, choice, threads)
        except MDNetError as error:
            reason = f"{choice} can't run here ({error})"
        if not reason:
            if bundle.manifest.precision == "fp8" and not choice.on_gpu:
                _LOG.warning(f"note: {bundle.path} is fp8, which is {FOR_FP8}")
            return choice
        _LOG.warning(f"note: passed over: {reason}")
        reasons.append(reason)
    raise MDNetError(f"no backend holds the bundle's gates here: {'; '.join(reasons)}; build the bundle again")


def check(
    bundle: Bundle,
    backend: Backend = "auto",
    *,
    threads: int = 0,
    progress: Progress = SILENT,
) -> Trial:
    """Hold what would score to every gate, on all probes, whatever is known of it; keep the result.

    Of `auto`, candidates are tried in turn until one holds; else the first one's trial is given.

    Raises:
        UsageError: an unknown backend, or one that is not for this bundle.
        BundleError: a bundle without probes, or with probes of another bundle.
    """
    read_probes(bundle)
    choices = _auto(bundle, threads) if backend == "auto" else [named(bundle, backend)]
    trials = []
    for choice in choices:
        trials.append(trial := _try(bundle, choice, threads=threads, progress=progress))
        if trial.holds:
            break
    _keep(bundle, trials)
    return trials[-1] if trials[-1].holds else trials[0]


def tune(
    bundle: Bundle,
    *,
    threads: int = 0,
    seconds: float = SECONDS,
    trials: list[Trial] | None = None,
    measure: Callable[[Choice], Measured] | None = None,
    progress: Progress = SILENT,
) -> Tuning:
    """Hold every backend that `auto` may take here to the gates, time those that hold, and keep the fastest choice.

    Each graph gets the backend that is fastest for it.

    Args:
        seconds: to time a graph for, all its backends together.
        trials: of `try_candidates`, where they have been made already.
        measure: as of `try_candidates`.

    Raises:
        BundleError: a bundle without probes.
        MDNetError: no backend holds.
    """
    trials = try_candidates(bundle, threads=threads, progress=progress) if trials is None else trials
    good = [trial for trial in trials if trial.holds]
    if not good:
        raise MDNetError(f"no backend holds the gates here: {explain(trials)}")
    times = time_apart(bundle, [trial.choice for trial in good], threads=threads, seconds=seconds, progress=progress)
    choice = _fastest(times, good[0].choice)
    if all(choice != trial.choice for trial in good):  # of several candidates' backends
        mixed = _try(bundle, choice, threads=threads, measure=measure, progress=progress)
        trials = [*trials, mixed]
        choice = choice if mixed.holds else good[0].choice
    count = threads or available_cores()
    kept = Tuned(threads=count, batch=times.batch, graphs=dict(choice.graphs), ms=times.graphs, whole_ms=times.whole)
    return Tuning(choice, trials, times, _keep(bundle, trials, kept))


def tuned(bundle: Bundle, threads: int = 0) -> Tuned | None:
    """What `tune` found on this machine with so many threads, if all of it is still installed."""
    found = records.load(bundle).tuned_for(threads or available_cores())
    installed = {backend for choice in candidates(bundle) for backend in choice.graphs.values()}
    return found if found and installed >= set(found.graphs.values()) else None


def try_candidates(
    bundle: Bundle,
    *,
    threads: int = 0,
    measure: Callable[[Choice], Measured] | None = None,
    progress: Progress = SILENT,
) -> list[Trial]:
    """Hold every backend that `auto` may take here to the gates.

    Args:
        measure: in place of measuring on the bundle's probes.
    """
    return [_try(bundle, choice, threads=threads, measure=measure, progress=progress) for choice in candidates(bundle)]


def explain(trials: list[Trial]) -> str:
    """Why each of these trials failed, on one line."""
    return "; ".join(f"{trial.choice}: {_failures(trial)}" for trial in trials if not trial.holds)


def _failures(trial: Trial) -> str:
    return trial.problem if trial.report is None else trial.report.failures()


def _try(
    bundle: Bundle,
    choice: Choice,
    *,
    threads: int,
    measure: Callable[[Choice], Measured] | None = None,
    progress: Progress,
) -> Trial:
    progress.step(f"gates of {choice}")
    try:
        measured = measure(choice) if measure else measure_apart(bundle, choice, threads=threads, progress=progress)
    except MDNetError as error:
        return Trial(choice, None, str(error))
    return Trial(choice, measured)


def _keep(bundle: Bundle, trials: list[Trial], found: Tuned | None = None) -> bool:
    """Put what was found into this machine's record; whether that was possible."""
    with records.locked(bundle):
        record = records.load(bundle)
        for check in (trial.as_check() for trial in trials):
            record = record if check is None else record.with_check(check)
        return records.save(bundle, record if found is None else record.with_tuned(found))


def _auto(bundle: Bundle, threads: int) -> list[Choice]:
    """What `auto` may take, in the order in which it does; what is known to be off its gates here comes last."""
    options = candidates(bundle)
    if session.cuda_is_installed() and not options[0].on_gpu and (reason := session.cuda_problem()):
        _LOG.warning(f"note: passed over: {reason}")
    record = records.load(bundle)
    if found := tuned(bundle, threads):
        options.insert(0, Choice(found.graphs))
    options = [choice for i, choice in enumerate(options) if choice not in options[:i]]
    off = [choice for choice in options if (known := record.check_of(choice)) and not known.parity.passed]
    return [*(choice for choice in options if choice not in off), *off]


def _off(bundle: Bundle, choice: Choice, threads: int) -> str:
    """Why `choice` fails its gates here; empty if it passes. An unknown one is tried, and the result kept.

    Raises:
        MDNetError: it can't run. That is not kept: memory or a file may be there the next time.
    """
    if bundle.manifest.probes is None:
        return ""
    known = records.load(bundle).check_of(choice)
    if known is None:
        with records.locked(bundle):
            record = records.load(bundle)  # another process may have tried it meanwhile
            known = record.check_of(choice)
            if known is None:
                known = _check(choice, measure_apart(bundle, choice, threads=threads, quick=True))
                records.save(bundle, record.with_check(known))
    return "" if known.parity.passed else f"{choice} is off the bundle's gates on this machine ({known.failures})"


def _what_holds(bundle: Bundle, refused: Choice, threads: int) -> str:
    for choice in _auto(bundle, threads):
        with contextlib.suppress(MDNetError):
            if choice != refused and not _off(bundle, choice, threads):
                return f"; {choice} holds them, which --backend auto takes"
    return "; no other backend holds them either"


def _check(choice: Choice, measured: Measured) -> BackendCheck:
    return BackendCheck(
        graphs=dict(choice.graphs),
        machine=this_machine(),
        parity=measured.report.summary(),
        failures=measured.report.failures()[:2000],
        snr_db=measured.snr_db,
    )


def _fastest(times: Times, first: Choice) -> Choice:
    """The fastest backend for each graph, or one GPU backend for all; `first` where nothing is clearly faster."""
    graphs: dict[GraphName, GraphBackend] = {}
    total = 0.0
    for name, ms in times.graphs.items():
        best = min(ms, key=lambda backend: ms[backend])
        expected = first.graphs[name]
        graphs[name] = expected if expected in ms and ms[expected] < ms[best] * _FASTER else best
        total += ms[graphs[name]]
    if not times.whole:
        return Choice(graphs)
    best_whole = min(times.whole, key=lambda backend: times.whole[backend])
    if graphs and total * _FASTER < times.whole[best_whole]:
        return Choice(graphs)
    return Choice(dict.fromkeys(first.graphs, best_whole))
