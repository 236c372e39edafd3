"""Where an output path leads."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mdnet_engines.system.output_path import descriptor_of, is_special, open_special, write_text


@pytest.mark.parametrize(
    "form", ["/dev/fd/{}", "/proc/self/fd/{}", "/proc/thread-self/fd/{}", "/dev/../proc/self/fd/{}"]
)
def test_every_name_of_an_open_file_is_known_as_its_number(tmp_path: Path, form: str) -> None:
    with (tmp_path / "file").open("wb") as stream:
        name = form.format(stream.fileno())
        (tmp_path / "link").symlink_to(name)
        (tmp_path / "link-to-link").symlink_to("link")
        for path in (name, tmp_path / "link", tmp_path / "link-to-link"):
            assert descriptor_of(path) == stream.fileno()
            assert is_special(path)


def test_standard_output_has_number_1() -> None:
    assert descriptor_of("/dev/stdout") == 1


def test_files_folders_devices_and_loops_have_no_number(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    for path, special in (("file", False), ("missing", False), ("loop", False), ("fifo", True), ("/dev/null", True)):
        assert descriptor_of(tmp_path / path) is None
        assert is_special(tmp_path / path) == special


def test_another_processs_open_file_is_special_but_has_no_number_here(tmp_path: Path) -> None:
    assert is_special(f"/proc/{os.getppid()}/fd/1")
    assert descriptor_of(f"/proc/{os.getppid()}/fd/1") is None


def test_text_goes_behind_what_an_open_file_holds_and_in_place_of_what_a_plain_file_holds(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("earlier\n")
    with log.open("ab") as stream:
        write_text(Path(f"/dev/fd/{stream.fileno()}"), "±1\n")
    assert log.read_text("utf-8") == "earlier\n±1\n"
    write_text(log, "±2\n")
    assert log.read_text("utf-8") == "±2\n"


def test_a_socket_can_be_written_to_by_its_name() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with open_special(f"/proc/self/fd/{ours.fileno()}") as stream:
            stream.write(b"row")
        assert theirs.recv(16) == b"row"
