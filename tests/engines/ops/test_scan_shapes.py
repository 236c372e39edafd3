"""The check that PyTorch's operator and TensorRT's plugin share."""

from __future__ import annotations

import pytest
from scan_cases import REFUSED, REFUSED_CASE, Refusal, make_inputs

from mdnet_engines.errors import MDNetError
from mdnet_engines.ops.scan_shapes import ANY, check_shapes

SHAPES = {name: value.shape for name, value in make_inputs(REFUSED_CASE).items()}


def test_what_fits_is_taken() -> None:
    check_shapes(**SHAPES)


@pytest.mark.parametrize("refusal", REFUSED, ids=lambda refusal: refusal.name)
def test_what_makes_no_sense_is_refused_in_words(refusal: Refusal) -> None:
    shapes = {name: value.shape for name, value in refusal.spoil(make_inputs(REFUSED_CASE)).items()}
    with pytest.raises(ValueError, match=r".") as error:
        check_shapes(**shapes)
    assert isinstance(error.value, MDNetError)
    for words in refusal.says:
        assert words in str(error.value)


def test_a_symbolic_size_fits_every_size() -> None:
    symbolic = {name: (ANY, *shape[1:]) if len(shape) == 3 else shape for name, shape in SHAPES.items()}
    check_shapes(**symbolic)
    check_shapes(**{**symbolic, "B": SHAPES["B"]})
    with pytest.raises(ValueError, match="z is"):
        check_shapes(**{**symbolic, "z": (ANY, 3, 8)})
