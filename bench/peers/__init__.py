"""Other libraries, each in a file of its own behind the one interface of ``interface.py``.

Importing this imports none of them.
"""

from .ggml_moe import GgmlMoe, GgmlQ4K
from .interface import Experts, Peer, Projection, RoutedProduct, WrongResult, bound, check, check_moe, check_routed
from .kt_kernel_moe import KtAmxInt4, KtGptqAvx2, KtGptqAvxVnni, KtRawInt4
from .numpy_dense import NumpyDense
from .onnxruntime_nbits import OnnxRuntimeFloat32, OnnxRuntimeInt8
from .openvino_int4 import OpenVinoBf16, OpenVinoFloat32, OpenVinoInt8
from .torch_dense import TorchBf16, TorchFloat32
from .torch_int4 import TorchInt4
from .vllm_cpu import VllmW4A8, VllmW4A16

__all__ = [
    "PEERS",
    "Experts",
    "Peer",
    "Projection",
    "RoutedProduct",
    "WrongResult",
    "bound",
    "check",
    "check_moe",
    "check_routed",
]

PEERS = (
    NumpyDense,
    TorchFloat32,
    TorchBf16,
    TorchInt4,
    OnnxRuntimeFloat32,
    OnnxRuntimeInt8,
    OpenVinoFloat32,
    OpenVinoBf16,
    OpenVinoInt8,
    GgmlMoe,
    GgmlQ4K,
    VllmW4A16,
    VllmW4A8,
    KtRawInt4,
    KtGptqAvx2,
    KtGptqAvxVnni,
    KtAmxInt4,
)
"""Every adapter. Each is made with a number of threads."""
