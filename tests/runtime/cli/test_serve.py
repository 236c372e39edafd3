"""`mdnet-rt serve`: what reaches the server, from the command line and from a configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mdnet_rt.cli.main import main

pytest.importorskip("fastapi")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """No server, but what it would have been started with."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def serve(bundle: Any, **how: Any) -> int:
        calls.append((bundle, how))
        return 0

    monkeypatch.setattr("mdnet_rt.server.http.serve.serve", serve)
    return calls


def run(file: Path, text: str, *words: str) -> Result:
    file.write_text(text)
    return CliRunner().invoke(main, ["serve", "--config", str(file), *words])


def test_a_configuration_file_serves_and_the_command_line_wins(served: list[Any], tmp_path: Path) -> None:
    text = 'bundle = "b"\nport = 9000\nmax-batch = 8\nmax-wait-ms = 2.5\naccess-log = true\n'
    assert run(tmp_path / "my.toml", text, "--port", "9001").exit_code == 0
    ((bundle, how),) = served
    assert (bundle, how["port"], how["access_log"]) == (Path("b"), 9001, True)
    assert (how["settings"].max_batch, how["settings"].max_wait) == (8, 0.0025)


def test_a_bundle_on_the_command_line_wins_over_the_files_in_either_form(served: list[Any], tmp_path: Path) -> None:
    for words in (("mine",), ("--bundle", "mine")):
        assert run(tmp_path / "my.toml", 'bundle = "b"', *words).exit_code == 0
    assert [bundle for bundle, _ in served] == [Path("mine")] * 2


def test_two_bundles_on_the_command_line_are_refused(served: list[Any], tmp_path: Path) -> None:
    result = run(tmp_path / "my.toml", "", "mine", "--bundle", "other")
    assert (result.exit_code, served) == (2, [])
    assert "give the bundle once" in result.stderr


def test_a_mistake_in_the_file_is_named_before_anything_starts(served: list[Any], tmp_path: Path) -> None:
    result = run(tmp_path / "my.toml", "batch-size = 8")
    assert (result.exit_code, served) == (2, [])
    assert result.stderr == f"error: {tmp_path / 'my.toml'}: serve has no option batch-size; did you mean max-batch?\n"
