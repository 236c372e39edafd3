"""On a CUDA GPU: the same gates, the same scores."""

from __future__ import annotations

import pytest
import torch

from mdnet.model.checkpoint import demo_checkpoint, load_checkpoint
from mdnet_engines.bundle.files import Bundle
from mdnet_export.parity_images import parity_images
from mdnet_export.verify import verify_bundle

pytestmark = pytest.mark.gpu


def test_onnx_runtime_cuda_passes_the_gates(bundle: Bundle) -> None:
    report = verify_bundle(bundle.path, num_images=16, backend="onnxruntime-cuda")
    assert report.passed, [gate for gate in report.gates if gate.failed]


def test_pytorch_scores_the_same_on_the_gpu() -> None:
    model = load_checkpoint(demo_checkpoint())
    images = torch.from_numpy(parity_images(None, 128, 4).pixels)
    with torch.inference_mode():
        expected = model(images)
        got = model.cuda()(images.cuda()).cpu()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)  # TF32 convolutions
