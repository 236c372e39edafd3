"""Foreign models with our scan in them, exported, against themselves with their own: whole sequences, then decoding."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from foreign_models import FOREIGN, built, language_model, ours_in_transformers
from torch import Tensor, nn

from mdnet_engines.ops import native
from mdnet_export.scan import export

LIMIT = 3e-6  # relative to the largest value: float32, and sums in another order
SLOW = ("transformers' FalconMamba", "transformers' Jamba", "transformers' Mamba2")


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= LIMIT * np.abs(expected).max()


def sessions(path: Path) -> Iterator[onnxruntime.InferenceSession]:
    """Nothing of ours; and the native library, where there is one."""
    yield onnxruntime.InferenceSession(path)
    if library := native.custom_op_library():
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(library))
        yield onnxruntime.InferenceSession(path, options)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in FOREIGN])
def test_a_foreign_model_in_a_file_gives_its_own_result(name: str, tmp_path: Path) -> None:
    if name == "mambapy":
        pytest.importorskip("mambapy")
    model, inputs = built(name)
    foreign = FOREIGN[name]
    (parameter,) = inspect.signature(model.forward).parameters
    with torch.no_grad():
        expected = model(*inputs).numpy()  # on its own scan
    with foreign.ours(model):
        done = export(model, inputs, tmp_path / "model.onnx", dynamic={parameter: foreign.dynamic}, tolerance=LIMIT)
    assert sum(done.scans.values()) == foreign.scans
    for session in sessions(done.path):
        assert_close(session.run(None, {parameter: inputs[0].numpy()})[0], expected)


def states_of(cache: Any) -> list[Tensor]:
    """What a layer keeps: its convolution's last inputs and its scan's last state, or its keys and values."""
    found = []
    for layer in cache.layers:
        if hasattr(layer, "recurrent_states"):
            found += [layer.conv_states[0], layer.recurrent_states[0]]
        else:
            found += [layer.keys, layer.values]
    return found


def cache_of(config: Any, states: tuple[Tensor, ...]) -> Any:
    """The cache that has these states."""
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    for place, (layer, first, second) in enumerate(zip(cache.layers, states[::2], states[1::2], strict=True)):
        if hasattr(layer, "recurrent_states"):
            cache.update_conv_state(first, place)
            cache.update_recurrent_state(second, place)
        else:
            cache.update(first, second, place)
    return cache


class Prefill(nn.Module):
    """Tokens to the logits of the next one, and the states behind them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        (self.cache_name,) = {"cache_params", "past_key_values"} & set(inspect.signature(model.forward).parameters)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        result = self.model(input_ids=input_ids, use_cache=True)
        return result.logits[:, -1], *states_of(getattr(result, self.cache_name))


class Step(Prefill):
    """One more token and the states before it to the logits of the next one, and the states behind it."""

    def forward(self, input_ids: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        cache = cache_of(self.model.config, states)
        result = self.model(input_ids=input_ids, use_cache=True, **{self.cache_name: cache})
        return result.logits[:, -1], *states_of(cache)


def names_of(model: nn.Module) -> list[str]:
    """The states by the names that ONNX Runtime GenAI binds, without `past_key_values.` or `present.`."""
    pairs = {"full_attention": ("key", "value"), "linear_attention": ("conv_state", "recurrent_state")}
    return [f"{layer}.{part}" for layer, kind in enumerate(model.config.layer_types) for part in pairs[kind]]


@pytest.mark.parametrize(
    "kind", ["mamba", "mamba2", *(pytest.param(k, marks=pytest.mark.slow) for k in ("falcon_mamba", "jamba"))]
)
def test_decoding_from_files_generates_what_the_model_generates(kind: str, tmp_path: Path) -> None:
    model = language_model(kind)
    tokens = torch.randint(1, 40, (2, 7))
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(tokens, **settings)  # on its own scan

    names = names_of(model)
    past, present = ([f"{prefix}.{name}" for name in names] for prefix in ("past_key_values", "present"))
    with ours_in_transformers(kind), torch.no_grad():
        prefill = export(
            Prefill(model),
            (tokens,),
            tmp_path / "prefill.onnx",
            dynamic={"input_ids": {0: "batch", 1: "length"}},
            output_names=["logits", *present],
        )
        _, *states = Prefill(model)(tokens)
        step = export(
            Step(model),
            (tokens[:, -1:], tuple(states)),
            tmp_path / "step.onnx",
            dynamic={
                "input_ids": {0: "batch"},
                **{name: {0: "batch", **({2: "past"} if name.endswith(("key", "value")) else {})} for name in past},
            },
            input_names=["input_ids", *past],
            output_names=["logits", *present],
        )
    scans = sum(name.endswith("recurrent_state") for name in names)
    assert sum(prefill.scans.values()) == sum(step.scans.values()) == scans
    assert all(name.endswith("State") for name in [*prefill.scans, *step.scans])

    for first, next_ in zip(sessions(prefill.path), sessions(step.path), strict=True):
        logits, *kept = first.run(None, {"input_ids": tokens.numpy()})
        for made, theirs in zip(expected.sequences[:, 7:].T, expected.logits, strict=True):
            assert_close(logits, theirs.numpy())
            token = logits.argmax(-1)
            np.testing.assert_array_equal(token, made)
            logits, *kept = next_.run(None, {"input_ids": token[:, None], **dict(zip(past, kept, strict=True))})
