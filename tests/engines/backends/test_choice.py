"""What `auto` takes, and that nothing scores off its gates: known once, found at first use, measured by `tune`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_bundle import describe, write_small_bundle

from mdnet_engines.backends import candidates as backends
from mdnet_engines.backends import choice as choice_module
from mdnet_engines.backends import record
from mdnet_engines.backends.candidates import Choice, named
from mdnet_engines.backends.choice import Trial, check, choose, open_graphs, tune
from mdnet_engines.backends.trial import Measured, Times, measure_apart, time_apart
from mdnet_engines.bundle.files import Bundle
from mdnet_engines.errors import BundleError, MDNetError
from mdnet_engines.parity.probes import PROBES_NAME
from mdnet_engines.parity.report import Gate, ParityReport, ScorePair
from mdnet_engines.sessions import cuda_provider
from mdnet_engines.system import machine
from mdnet_engines.system.child_process import CrashError

ORT = dict.fromkeys(("encoder", "vim", "fusion"), "onnxruntime-cpu")
OPENVINO = {**ORT, "encoder": "openvino", "fusion": "openvino"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(write_small_bundle(tmp_path / "bundle", precision="fp16"))


def measured(choice: Choice, delta: float = 0.0, limit: float = 0.15) -> Measured:
    gates = [Gate("score max |Δ|", delta, True, limit), Gate("score Pearson", None, False, 0.9)]
    return Measured(ParityReport("int8", str(choice), "probes", {}, [ScorePair("a", 3.0, 3.0 + delta)], gates), {})


class Machine:
    """Stands in for what a trial finds: the largest |Δscore| by backend of the encoder, or an error to raise."""

    def __init__(self) -> None:
        self.found: dict[str, float | Exception] = {}
        self.times: dict[str, dict[str, float]] = {"encoder": {}, "vim": {"onnxruntime-cpu": 5.0}, "fusion": {}}
        self.measured: list[tuple[str, bool]] = []

    def measure(self, bundle: Bundle, choice: Choice, *, quick: bool = False, **_: Any) -> Measured:
        self.measured.append((str(choice), quick))
        found = self.found.get(choice.graphs["encoder"], 0.0)
        if isinstance(found, Exception):
            raise found
        return measured(choice, found)

    def time(self, bundle: Bundle, choices: list[Choice], **_: Any) -> Times:
        graphs = {
            name: {choice.graphs[name]: self.times[name].get(choice.graphs[name], 9.0) for choice in choices}  # type: ignore[index]
            for name in ORT
        }
        return Times(16, graphs, {})  # type: ignore[arg-type]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A CPU with OpenVINO, whose trials are made up."""
    made = Machine()
    monkeypatch.setattr(choice_module, "measure_apart", made.measure)
    monkeypatch.setattr(choice_module, "time_apart", made.time)
    monkeypatch.setattr(backends.openvino_session, "is_installed", lambda: True)
    monkeypatch.setattr(backends.session, "has_cuda", lambda: False)
    return made


# --- a first run ---


def test_a_choice_is_tried_once_on_a_machine_and_then_known(bundle: Bundle, here: Machine) -> None:
    for _ in range(3):
        assert choose(bundle).graphs == OPENVINO
    assert here.measured == [(str(Choice(OPENVINO)), True)]


def test_what_the_build_measured_on_an_equal_machine_is_known(bundle: Bundle, here: Machine) -> None:
    built = [trial.as_check() for trial in (Trial(named(bundle, "openvino"), measured(Choice(OPENVINO))),)]
    manifest = bundle.manifest.model_copy(update={"backends": built})
    assert choose(Bundle(bundle.path, manifest)).graphs == OPENVINO
    assert here.measured == []
    elsewhere = machine.this_machine().model_copy(update={"features": ["another"]})
    other = bundle.manifest.model_copy(update={"backends": [built[0].model_copy(update={"machine": elsewhere})]})  # type: ignore[union-attr]
    choose(Bundle(bundle.path, other))
    assert len(here.measured) == 1


def test_auto_passes_over_what_is_off_its_gates_and_says_so(
    bundle: Bundle, here: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    here.found["openvino"] = 0.3
    with caplog.at_level(logging.WARNING):
        assert choose(bundle).graphs == ORT
    (line,) = caplog.messages
    assert "openvino" in line
    assert "score max |Δ| is 0.3, allowed is at most 0.15" in line
    caplog.clear()
    assert choose(bundle).graphs == ORT
    assert caplog.messages == []  # known by now: it is not even tried
    assert len(here.measured) == 2


@pytest.mark.parametrize("installed", [False, True])
def test_auto_goes_on_without_a_cuda_provider_that_does_not_load_and_says_why_once(
    installed: bool, bundle: Bundle, here: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With check=False nothing is tried: what can't run must not be a candidate."""
    reason = "onnxruntime-cuda can't load its libraries for CUDA 13 (libcublasLt.so.13: cannot open shared object file)"
    monkeypatch.setattr(backends.session, "cuda_is_installed", lambda: installed)
    monkeypatch.setattr(backends.session, "cuda_problem", lambda: reason)
    for opens in (lambda: choose(bundle), lambda: choose(bundle, check=False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert opens().graphs == OPENVINO
        assert caplog.messages == ([f"note: passed over: {reason}"] if installed else [])


def test_a_named_cuda_backend_that_does_not_load_is_one_line_with_the_next_step(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = (
        "onnxruntime-cuda can't load its libraries for CUDA 13 (libx.so.13: cannot open); they come with: pip install"
    )
    monkeypatch.setattr(cuda_provider, "problem", lambda _: reason)
    with pytest.raises(MDNetError) as error:
        open_graphs(bundle, backend="onnxruntime-cuda", check=False)
    assert str(error.value) == reason


def test_a_named_backend_off_its_gates_is_refused_with_figures_and_what_holds(bundle: Bundle, here: Machine) -> None:
    here.found["openvino"] = 0.3
    with pytest.raises(MDNetError) as error:
        choose(bundle, "openvino")
    line = str(error.value)
    assert len(line.splitlines()) == 1
    for part in ("is 0.3, allowed is at most 0.15", "onnxruntime-cpu holds them", "--no-check"):
        assert part in line
    assert choose(bundle, "openvino", check=False).graphs == OPENVINO


def test_nothing_that_holds_is_an_error_that_names_all(bundle: Bundle, here: Machine) -> None:
    here.found = {"openvino": 0.3, "onnxruntime-cpu": 0.4}
    with pytest.raises(MDNetError, match=r"no backend holds.*0\.3.*0\.4.*build the bundle again"):
        choose(bundle)
    assert choose(bundle, check=False).graphs == OPENVINO


def test_a_backend_that_crashes_is_passed_over_and_tried_again_the_next_time(
    bundle: Bundle, here: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    here.found["openvino"] = CrashError("openvino's process was ended by SIGILL during opening")
    with caplog.at_level(logging.WARNING):
        assert choose(bundle).graphs == ORT
    assert "ended by SIGILL" in caplog.messages[0]
    with pytest.raises(CrashError, match="ended by SIGILL"):
        choose(bundle, "openvino")
    here.found.clear()
    assert choose(bundle).graphs == OPENVINO


def test_a_cache_that_can_not_be_written_costs_a_trial_each_time(
    bundle: Bundle, here: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert choose(bundle).graphs == OPENVINO
    assert len(here.measured) == 2
    assert not tune(bundle).kept


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"schema_version": 2}', b"\xff" * 40, b"x" * 2_000_000])
def test_a_damaged_record_is_as_good_as_none(content: bytes, bundle: Bundle, here: Machine) -> None:
    choose(bundle)
    (file,) = Path(record._file(bundle) or "").parent.glob("*.json")
    file.write_bytes(content)
    assert choose(bundle).graphs == OPENVINO
    assert len(here.measured) == 2
    assert record.load(bundle).check_of(Choice(OPENVINO)) is not None  # and is replaced


# --- tune ---


@pytest.mark.parametrize(
    ("encoder", "fusion", "expected"),
    [
        ((10.0, 20.0), (1.0, 2.0), OPENVINO),
        ((20.0, 10.0), (2.0, 1.0), ORT),
        ((10.0, 20.0), (2.0, 1.0), {**ORT, "encoder": "openvino"}),
        ((10.2, 10.0), (1.01, 1.0), OPENVINO),  # 2 % are noise: the first candidate stays
    ],
)
def test_each_graph_gets_its_fastest_backend_and_auto_takes_it_from_then_on(
    encoder: tuple[float, float],
    fusion: tuple[float, float],
    expected: dict[str, str],
    bundle: Bundle,
    here: Machine,
) -> None:
    here.times |= {
        "encoder": dict(zip(("openvino", "onnxruntime-cpu"), encoder, strict=True)),
        "fusion": dict(zip(("openvino", "onnxruntime-cpu"), fusion, strict=True)),
    }
    tuning = tune(bundle, threads=2)
    assert tuning.choice.graphs == expected
    assert tuning.kept
    tried = len(here.measured)
    assert choose(bundle, threads=2).graphs == expected
    assert choose(bundle, threads=1).graphs == OPENVINO  # nothing is known of one thread
    assert len(here.measured) == tried


def test_only_what_holds_is_timed_and_taken(bundle: Bundle, here: Machine) -> None:
    here.found["openvino"] = 0.3
    here.times["encoder"] = {"openvino": 1.0, "onnxruntime-cpu": 10.0}
    tuning = tune(bundle)
    assert tuning.choice.graphs == ORT
    assert set(tuning.times.graphs["encoder"]) == {"onnxruntime-cpu"}
    assert [trial.holds for trial in tuning.trials] == [False, True]
    here.found["onnxruntime-cpu"] = 0.4
    with pytest.raises(MDNetError, match="no backend holds the gates here"):
        tune(bundle)


def test_a_choice_of_other_versions_is_not_taken(
    bundle: Bundle, here: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.times["encoder"] = {"openvino": 10.0, "onnxruntime-cpu": 1.0}
    tune(bundle)
    assert choose(bundle).graphs["encoder"] == "onnxruntime-cpu"
    upgraded = machine.this_machine().model_copy(update={"versions": {"openvino": "2099.1"}})
    monkeypatch.setattr(record, "this_machine", lambda: upgraded)
    assert choose(bundle).graphs == OPENVINO


# --- for real ---


def test_the_probes_are_scored_as_a_run_would(bundle: Bundle) -> None:
    choice = named(bundle, "onnxruntime-cpu")
    found = [measure_apart(bundle, choice), measure_apart(bundle, choice, quick=True)]
    whole, quick = (each.report for each in found)
    assert {name for each in found for name in each.snr_db} == {"down", "tokens", "score"}
    assert whole.passed
    assert quick.passed
    assert {*whole.graphs["encoder"], *whole.graphs["vim"], *whole.graphs["fusion"]} == {"down", "tokens", "score"}
    assert quick.graphs == {}
    assert [pair.bundle for pair in whole.scores] == pytest.approx([pair.bundle for pair in quick.scores], abs=1e-5)


def test_every_backend_of_a_choice_is_timed(bundle: Bundle) -> None:
    times = time_apart(bundle, [named(bundle, "onnxruntime-cpu")], seconds=0.05)
    assert {name: list(by) for name, by in times.graphs.items()} == {name: ["onnxruntime-cpu"] for name in ORT}
    assert all(ms > 0 for by in times.graphs.values() for ms in by.values())


@pytest.mark.parametrize("graph", ["encoder", "vim"])
def test_another_graph_that_is_hashed_anew_is_off_its_gates(graph: str, bundle: Bundle, tmp_path: Path) -> None:
    other = write_small_bundle(tmp_path / "other", scale=1.25)
    file = bundle.path / f"{graph}.onnx"
    file.write_bytes((other / f"{graph}.onnx").read_bytes())
    document = json.loads((bundle.path / "manifest.json").read_text())
    document["graphs"][graph]["file"] = describe(file)
    (bundle.path / "manifest.json").write_text(json.dumps(document))
    trial = check(Bundle.open(bundle.path), "onnxruntime-cpu")
    assert not trial.holds
    assert "is" in trial.verdict()
    with pytest.raises(MDNetError, match="off the bundle's gates"):  # known from the check
        open_graphs(Bundle.open(bundle.path), backend="onnxruntime-cpu")


def test_a_backend_that_is_not_there_says_what_to_install(bundle: Bundle) -> None:
    with pytest.raises(MDNetError, match=r"install mdnet\[cuda\]"):
        open_graphs(bundle, backend="onnxruntime-cuda")


def test_probes_of_another_bundle_are_no_reason_to_score(bundle: Bundle) -> None:
    file = bundle.path / PROBES_NAME
    np.savez_compressed(file, pixels=np.zeros((1, 8, 8, 3), np.uint8))
    document = json.loads((bundle.path / "manifest.json").read_text())
    (bundle.path / "manifest.json").write_text(json.dumps({**document, "probes": describe(file)}))
    with pytest.raises(BundleError, match="the probes are not this bundle's"):
        check(Bundle.open(bundle.path))
    with pytest.raises(MDNetError, match="the probes are not this bundle's"):
        choose(Bundle.open(bundle.path))
