"""`mdnet-rt check` and `tune`, and that `score` and `serve` refuse what is off its gates."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper

from mdnet_engines.bundle.files import Bundle, file_entry
from mdnet_engines.errors import MDNetError
from mdnet_rt import Scorer
from mdnet_rt.cli.main import main
from mdnet_rt.server.http.serve import serve
from mdnet_rt.server.settings import Settings

Photo = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def altered(bundle: Path) -> Path:
    """The bundle with another weight in its fusion, hashed anew."""
    file = bundle / "fusion.onnx"
    proto = onnx.load(file)
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == "mean_weights")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.1, weight.name))
    onnx.save(proto, file)
    document = json.loads((bundle / "manifest.json").read_text())
    document["graphs"]["fusion"]["file"] = file_entry(file).model_dump()
    (bundle / "manifest.json").write_text(json.dumps(document))
    return bundle


def test_a_good_bundle_is_one_line_and_exit_0(bundle: Path) -> None:
    result = run("check", bundle)
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    assert line.startswith(f"{bundle}, tiny fp32: holds on ")
    assert "4 probes" in line


def test_an_altered_weight_is_one_line_with_the_figures_and_exit_1(altered: Path) -> None:
    for options in ((), ("--backend", "onnxruntime-cpu")):
        result = run("check", altered, *options)
        assert result.exit_code == 1
        (line,) = (line for line in result.stdout.splitlines())
        assert "does NOT hold" in line
        assert "score max |Δ| is" in line


def test_a_gate_that_could_not_be_evaluated_is_named_and_never_passes(bundle: Path) -> None:
    """The bundle was built where no backend was measured, so that nothing is known of what was lost since."""
    document = json.loads((bundle / "manifest.json").read_text())
    document["backends"] = []
    (bundle / "manifest.json").write_text(json.dumps(document))
    gate = "SNR of a graph output, lost since the build, dB"
    result = run("check", bundle)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"4 probes; not evaluated: {gate} (the build measured no such backend)\n")
    verdicts = {each["name"]: each["verdict"] for each in json.loads(run("check", bundle, "--json").stdout)["gates"]}
    assert verdicts[gate] == "not evaluated"
    assert set(verdicts.values()) == {"pass", "not evaluated"}


def test_machines_get_json(bundle: Path, altered: Path) -> None:
    """`altered` is the same folder: the fixture has changed it."""
    document = json.loads(run("check", bundle, "--json").stdout)
    assert document["holds"] is False
    assert document["digest"] == Bundle.open(bundle).manifest.digest()
    assert set(document["graphs"]) == {"encoder", "vim", "fusion"}
    assert document["parity"]["images"] == 4
    failed = [gate["name"] for gate in document["gates"] if gate["verdict"] == "fail"]
    assert "score max |Δ|" in failed
    assert document["machine"]["architecture"]


def test_score_refuses_what_is_off_its_gates_and_no_check_insists(altered: Path, photo: Photo) -> None:
    picture = photo("a.png")
    refused = run("score", picture, "--bundle", altered)
    assert refused.exit_code == 1
    assert refused.stdout == ""
    assert refused.stderr.splitlines()[-1].startswith("error: no backend holds the bundle's gates here")
    named = run("score", picture, "--bundle", altered, "--backend", "onnxruntime-cpu")
    assert (named.exit_code, named.stdout) == (1, "")
    assert "no other backend holds them either; --no-check" in named.stderr
    assert run("score", picture, "--bundle", altered, "--no-check").exit_code == 0


def test_python_refuses_too(altered: Path) -> None:
    with pytest.raises(MDNetError, match="no backend holds"):
        Scorer.open(altered)
    with Scorer.open(altered, check=False) as scorer, pytest.raises(MDNetError, match=r"score max \|Δ\| is"):
        scorer.check()


def test_the_server_checks_the_very_graphs_that_it_serves(
    bundle: Path, altered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where this machine's record says that they hold."""
    monkeypatch.setattr("mdnet_engines.backends.choice._off", lambda *_: "")
    with pytest.raises(MDNetError, match="is off the bundle's gates"):
        serve(altered, host="127.0.0.1", port=0, settings=Settings(), tell=lambda _: None)
    with socket.socket() as free:  # the address was let go
        free.bind(("127.0.0.1", 0))


def test_a_bundle_without_probes_is_scored_with_a_note_and_can_not_be_checked(bundle: Path, photo: Photo) -> None:
    document = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**document, "schema_version": 1, "probes": None}))
    scored = run("score", photo("a.png"), "--bundle", bundle)
    assert scored.exit_code == 0
    assert "has no probes" in scored.stderr
    checked = run("check", bundle)
    assert checked.exit_code == 1
    assert "build it again with: mdnet-export build" in checked.stderr


def test_tune_says_what_auto_takes_from_then_on(bundle: Path) -> None:
    result = run("tune", bundle, "--seconds", "0.1", "--threads", "1")
    assert result.exit_code == 0, result.output
    taken = result.stdout.splitlines()[-1].removeprefix("auto takes ")
    with Scorer.open(bundle, threads=1) as scorer:
        assert str(scorer.choice) == taken
    document = json.loads(run("tune", bundle, "--seconds", "0.1", "--json").stdout)
    assert document["kept"]
    assert {name for name, ms in document["ms"].items() if all(value > 0 for value in ms.values())} == {
        "encoder",
        "vim",
        "fusion",
    }


def test_a_choice_that_can_not_be_kept_is_a_warning(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    result = run("tune", bundle, "--seconds", "0.1")
    assert result.exit_code == 0
    assert "warning: the choice could not be kept" in result.stderr


def test_what_is_no_bundle_is_one_line(tmp_path: Path) -> None:
    for command in ("check", "tune"):
        result = run(command, tmp_path)
        assert result.exit_code == 1
        assert len(result.stderr.splitlines()) == 1


def test_a_copy_of_a_bundle_is_known_by_its_content(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("check", bundle).exit_code == 0
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    monkeypatch.setattr("mdnet_engines.backends.choice.measure_apart", lambda *_, **__: pytest.fail("tried again"))
    Scorer.open(copy).close()
