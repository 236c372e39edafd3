"""What the HTTP side and the scoring side of a request tell each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


class RefusedError(Exception):
    """A request that gets an error for an answer.

    Args:
        status: of HTTP.
        reason: one line for the client.
        retry_after: in how many seconds it may come again.
        close: whether the connection ends with the answer, as what is left of the request will not be read.
    """

    def __init__(self, status: int, reason: str, *, retry_after: int | None = None, close: bool = False):
        super().__init__(reason)
        self.status, self.reason, self.retry_after, self.close = status, reason, retry_after, close


class ClientLeftError(Exception):
    """The connection was lost before there was an answer; nobody is left to receive it."""


@dataclass(eq=False)
class Wire:
    """What becomes of the connection while a request of it is being worked on."""

    failure: RefusedError | None = None
    """What is wrong with the request as HTTP: it will never be complete, or is not wanted. To be its answer."""
    on_lost: Callable[[], None] | None = None
    """Called when the connection is lost."""


def wire_of(scope: Mapping[str, Any]) -> Wire:
    """The request's wire; one on which nothing happens where the server is not ours."""
    wire = scope.get("extensions", {}).get("mdnet")
    return wire if isinstance(wire, Wire) else Wire()
