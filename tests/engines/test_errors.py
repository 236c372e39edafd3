"""What the errors promise to the command lines, and the one that names the extra to install."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdnet_engines.errors import BundleError, MDNetError, UsageError, printable, require


@pytest.mark.parametrize(("kind", "code"), [(MDNetError, 1), (BundleError, 1), (UsageError, 2)])
def test_exit_code_tells_bad_usage_from_failed_work(kind: type[MDNetError], code: int) -> None:
    assert issubclass(kind, MDNetError)
    assert kind("message").exit_code == code


def test_a_missing_module_is_named_with_the_extra_that_brings_it() -> None:
    with pytest.raises(MDNetError, match=r"^mdnet_no_such_module is not installed.* mdnet\[export\]$"):
        require("mdnet_no_such_module", "export")


def test_a_module_that_is_there_is_not_imported() -> None:
    """The check comes before work that may not need the module; torch takes seconds to import."""
    sys.modules.pop("this", None)  # importing it prints
    require("this", "export")
    assert "this" not in sys.modules


@given(st.text(st.characters(exclude_categories=())))  # lone surrogates too, as in names that aren't UTF-8
def test_any_text_is_one_line_that_every_terminal_can_show(text: str) -> None:
    shown = printable(text)
    assert len(shown.splitlines()) == (1 if text else 0)
    assert shown.isprintable()
    assert shown.encode().decode() == shown
    if text.isprintable():
        assert shown == text
