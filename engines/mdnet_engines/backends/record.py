"""This machine's record of a bundle: which backends passed the gates here, and which was measured to be fastest.

It is kept in the user's cache, one JSON file for each bundle, processor and set of versions. It may be deleted at any
time; a file that is damaged, or cannot be written, is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from mdnet_engines.backends.candidates import Choice
from mdnet_engines.bundle.files import Bundle
from mdnet_engines.bundle.manifest import BackendCheck, GraphBackend, GraphName
from mdnet_engines.bundle.part import Part
from mdnet_engines.system.atomic import new_file
from mdnet_engines.system.machine import Machine, cache_folder, processor_name, this_machine

_MAX_BYTES = 2**20


class Tuned(Part):
    """The fastest choice at a number of threads, and the milliseconds of every backend for `batch` images."""

    threads: int
    batch: int
    graphs: dict[GraphName, GraphBackend]
    ms: dict[GraphName, dict[GraphBackend, float]]
    whole_ms: dict[GraphBackend, float] = Field(default={})


class Record(Part):
    """One bundle on this machine."""

    schema_version: Literal[1] = 1
    bundle: str
    processor: str
    machine: Machine
    checks: list[BackendCheck] = Field(default=[], max_length=64)
    tuned: list[Tuned] = Field(default=[], max_length=64)

    def check_of(self, choice: Choice) -> BackendCheck | None:
        """How `choice` met the gates."""
        return next((check for check in self.checks if check.graphs == choice.graphs), None)

    def tuned_for(self, threads: int) -> Tuned | None:
        """What was measured with so many threads."""
        return next((tuned for tuned in self.tuned if tuned.threads == threads), None)

    def with_check(self, check: BackendCheck) -> Record:
        """The record with `check` in place of an earlier one of the same choice."""
        others = [each for each in self.checks if each.graphs != check.graphs]
        return self.model_copy(update={"checks": [*others, check]})

    def with_tuned(self, tuned: Tuned) -> Record:
        """Likewise with what was measured."""
        others = [each for each in self.tuned if each.threads != tuned.threads]
        return self.model_copy(update={"tuned": [*others, tuned]})


def load(bundle: Bundle) -> Record:
    """What is known of `bundle` here, from its own manifest too, where that speaks of an equal machine."""
    empty = _empty(bundle)
    built_here = [check for check in bundle.manifest.backends if check.machine == empty.machine]
    record = empty
    if file := _file(bundle):
        with contextlib.suppress(OSError, ValueError, ValidationError):  # damaged: as good as none
            if file.stat().st_size <= _MAX_BYTES:
                found = Record.model_validate_json(file.read_bytes())
                if (found.bundle, found.machine) == (empty.bundle, empty.machine):
                    record = found
    known = [check.graphs for check in record.checks]
    others = [check for check in built_here if check.graphs not in known]
    return record.model_copy(update={"checks": [*record.checks, *others]})


def save(bundle: Bundle, record: Record) -> bool:
    """Keep `record`; whether that was possible."""
    if (file := _file(bundle)) is None:
        return False
    try:
        with new_file(file) as draft:
            draft.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except OSError:
        return False
    return True


@contextlib.contextmanager
def locked(bundle: Bundle) -> Iterator[None]:
    """Keep other processes from checking the same bundle at the same time, where the system has such locks."""
    file = _file(bundle)
    with contextlib.ExitStack() as held:
        try:
            import fcntl

            if file is not None:
                descriptor = os.open(file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
                held.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        except (ImportError, OSError):  # Windows, or a file system without locks: the work may be done twice
            pass
        yield


def _empty(bundle: Bundle) -> Record:
    return Record(bundle=bundle.manifest.digest(), processor=processor_name(), machine=this_machine())


def _file(bundle: Bundle) -> Path | None:
    if (folder := cache_folder("machines")) is None:
        return None
    plans = [plan.sha256 for engines in bundle.manifest.engines for plan in engines.files()]
    known_by = [bundle.manifest.digest(), *plans, processor_name(), this_machine().model_dump_json()]
    return folder / f"{hashlib.sha256(json.dumps(known_by).encode()).hexdigest()[:32]}.json"
