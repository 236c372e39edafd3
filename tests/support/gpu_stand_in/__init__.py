"""A GPU, a CUDA runtime and a TensorRT to run `mdnet_engines.tensorrt.session` on a machine that has none.

`Gpu` (device.py) has memory, streams and CUDA graphs. It runs what was enqueued only when the host waits for it, and
then the latest first, unless something orders it: what was not waited for reads what is not there. It also notes, in
`problems`, what a real GPU might let pass: unordered operations on the same memory, memory freed while in use,
contexts used by two threads or for two batch sizes. `cuda.py` and `tensorrt.py` have NVIDIA's names on top of it;
test_gpu_stand_in.py holds these to the real modules.
"""

from __future__ import annotations

from gpu_stand_in.cuda import make_cuda
from gpu_stand_in.device import Gpu
from gpu_stand_in.networks import ENGINES, SIZE, assert_same, images, reference, write_plans, write_weights
from gpu_stand_in.tensorrt import make_tensorrt

__all__ = [
    "ENGINES",
    "SIZE",
    "Gpu",
    "assert_same",
    "images",
    "make_cuda",
    "make_tensorrt",
    "reference",
    "write_plans",
    "write_weights",
]
