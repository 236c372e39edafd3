"""`mdnet_export.scan.export`: what it checks, what it refuses, and what the refusals say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from mdnet.scan import selective_scan
from mdnet_engines.errors import MDNetError
from mdnet_export.scan import export


class Model(nn.Module):
    """One scan of (batch, 4, length)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("A", -torch.rand(4, 3))
        self.register_buffer("D", torch.randn(4))
        self.inner = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return selective_scan(x, x, self.A, x[:, :3], x[:, :3], self.D, self.inner(x), self.D)


class Fixed(Model):
    """Makes a Python number of the batch, as code that cuts images into windows does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(int(x.shape[0]), -1)


class Counting(Model):
    """Gives another result with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class Pair(Model):
    """Takes two tensors in a tuple, and gives two."""

    def forward(self, x: Tensor, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y = super().forward(x)
        return y + states[0][..., None], states[1] + 1


class Plain(Model):
    """Has no scan."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.D[:, None]


BOTH = {"x": {0: "batch", 2: "length"}}


def test_an_example_of_one_image_and_one_step_gives_a_file_for_any_number(tmp_path: Path) -> None:
    model, x = Model().eval(), torch.randn(3, 4, 7)
    done = export(model, (x[:1, :, :1],), tmp_path / "model.onnx", dynamic=BOTH)
    assert done.inputs == {"x": ("batch", 4, "length")}
    assert done.scans == {"SelectiveScan": 1}
    assert max(done.differences.values()) < 3e-6
    assert "x [batch, 4, length]; 1 SelectiveScan;" in str(done)
    session = onnxruntime.InferenceSession(done.path)
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], model(x).numpy(), rtol=0, atol=1e-5)


def test_by_default_the_batch_may_have_any_size(tmp_path: Path) -> None:
    assert export(Model(), (torch.randn(2, 4, 7),), tmp_path / "model.onnx").inputs == {"x": ("batch", 4, 7)}
    assert list(tmp_path.iterdir()) == [tmp_path / "model.onnx"]


def test_the_model_is_exported_for_evaluation_and_left_as_it_was(tmp_path: Path) -> None:
    model = Model()
    model.inner.eval()
    export(model, (torch.randn(2, 4, 7),), tmp_path / "model.onnx")  # dropout would give another result in each run
    assert (model.training, model.inner.training) == (True, False)


def test_tensors_in_a_tuple_have_names_and_sizes(tmp_path: Path) -> None:
    example = (torch.randn(2, 4, 7), (torch.randn(2, 4), torch.randn(2, 5)))
    assert list(export(Pair(), example, tmp_path / "model.onnx").inputs) == ["x", "states_0", "states_1"]
    names = ["tokens", "past.0", "past.1"]
    done = export(Pair(), example, tmp_path / "model.onnx", input_names=names, dynamic={n: {0: "n"} for n in names})
    assert done.inputs == {"tokens": ("n", 4, 7), "past.0": ("n", 4), "past.1": ("n", 5)}


def test_weights_may_lie_in_a_file_of_their_own(tmp_path: Path) -> None:
    done = export(Model(), (torch.randn(2, 4, 7),), tmp_path / "model.onnx", external_data=True)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    onnxruntime.InferenceSession(done.path)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_that_the_exporter_made_a_constant_is_reported(batch: int, tmp_path: Path) -> None:
    with pytest.raises(MDNetError, match=r"exporter fixed batch, axis 0 of x, at 2: .* int\(\)"):
        export(Fixed(), (torch.randn(batch, 4, 7),), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_result_that_differs_is_reported_and_nothing_written(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("older")
    with pytest.raises(MDNetError, match=r"at batch 3, function bodies, .* is off by .* `tolerance` allows 1.0e-04"):
        export(Counting(), (torch.randn(2, 4, 7),), tmp_path / "model.onnx")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["older"]


def test_sizes_that_the_model_can_not_run_at_are_reported_as_such(tmp_path: Path) -> None:
    class Even(Model):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.unflatten(2, (-1, 2))[..., 0])

    example = (torch.randn(2, 4, 8),)
    with pytest.raises(MDNetError, match=r"model itself does not run at batch 3, length 11: .*check_at"):
        export(Even(), example, tmp_path / "model.onnx", dynamic=BOTH, check_at={"length": 11})
    done = export(Even(), example, tmp_path / "model.onnx", dynamic=BOTH, check_at={"length": 14})
    assert any("length 14" in run for run in done.differences)


def test_half_models_are_compared_as_closely_as_their_type_allows(tmp_path: Path) -> None:
    export(Model().half(), (torch.randn(2, 4, 7).half(),), tmp_path / "model.onnx")


def test_bfloat16_can_only_be_compared_behind_a_cast(tmp_path: Path) -> None:
    class Cast(Model):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.bfloat16()).float()

    example = torch.randn(2, 4, 7)
    export(Cast().bfloat16(), (example,), tmp_path / "model.onnx")
    with pytest.raises(MDNetError, match=r"bfloat16.* check=False"):
        export(Model().bfloat16(), (example.bfloat16(),), tmp_path / "model.onnx")
    done = export(Model().bfloat16(), (example.bfloat16(),), tmp_path / "model.onnx", check=False)
    assert str(done).endswith("not compared")


@pytest.mark.slow  # 2.4 GiB of memory, and as much on the disk
def test_more_than_two_gigabytes_of_weights_lie_in_a_file_of_their_own(tmp_path: Path) -> None:
    class Large(Model):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(2**27 + 1, 4, _weight=torch.full((2**27 + 1, 4), 0.5))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.table(x).mT)

    done = export(Large(), (torch.randint(9, (2, 7)),), tmp_path / "model.onnx")
    assert done.path.stat().st_size < 2**20
    assert (tmp_path / "model.onnx.data").stat().st_size > 2**31


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        (Model(), {"opset_version": 17}, "opset_version is 17; .* need 18"),
        (Model().double(), {}, r"can't be exported in float64; .* model\.float\(\)"),
        (Plain(), {}, "called no scan .* selective_scan_fn"),
        (Model(), {"dynamic": {"tokens": {0: "batch"}}}, "dynamic names tokens; the inputs are x"),
        (Model(), {"dynamic": {"x": {3: "batch"}}}, r"dynamic names axis 3 of x, which is \(2, 4, 7\)"),
        (Model(), {"dynamic": {"x": {0: "n", 2: "n"}}}, "n is 7 in x, and 2 in another axis"),
        (Model(), {"input_names": ["a", "b"]}, "input_names has 2 names, the example 1 tensors"),
        (Model(), {"check_at": {"length": 3}}, "check_at names length; `dynamic` names batch"),
    ],
    ids=lambda value: "-" if isinstance(value, (nn.Module, dict)) else value,
)
def test_what_can_not_work_is_refused_with_the_fix(
    model: nn.Module, settings: dict, words: str, tmp_path: Path
) -> None:
    x = torch.randn(2, 4, 7, dtype=model.A.dtype)
    with pytest.raises(MDNetError, match=words):
        export(model, (x,), tmp_path / "model.onnx", **settings)


PYTORCHS_OWN = """
import sys, torch
from mdnet.scan import selective_scan

class Model(torch.nn.Module):
    def forward(self, x):
        return selective_scan(x, x, -x[0, :, :3].abs(), x[:, :3], x[:, :3])

try:
    torch.onnx.export(Model(), (torch.randn(2, 4, 7),), "model.onnx", dynamo=sys.argv[1] == "True", verbose=False)
except Exception as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("dynamo", "words"),
    [("True", "custom_translation_table=mdnet_export.scan.translation_table()"), ("False", "export with dynamo=True")],
)
def test_pytorchs_own_export_says_what_the_scan_needs(dynamo: str, words: str, tmp_path: Path) -> None:
    # In a process of its own: the table must never have been asked for.
    command = [sys.executable, "-c", PYTORCHS_OWN, dynamo]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert words in done.stdout, done.stderr


ALONE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[2:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())

import torch
from mdnet.scan import selective_scan_fn
from mdnet_export.scan import export

class Model(torch.nn.Module):
    def forward(self, x):
        return selective_scan_fn(x, x, -x[0, :, :3].abs(), x[:, :3], x[:, :3])

print(export(Model(), (torch.rand(2, 4, 7),), sys.argv[1]))
"""


def test_the_scan_needs_none_of_what_the_rest_needs(tmp_path: Path) -> None:
    rest = ["PIL", "click", "diffusers", "jinja2", "polygraphy", "pydantic", "rich", "safetensors", "transformers"]
    command = [sys.executable, "-c", ALONE, tmp_path / "model.onnx", *rest]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 SelectiveScan2NoZ" in done.stdout, done.stderr
    assert not done.stderr  # PyTorch's exporter has warnings of its own
