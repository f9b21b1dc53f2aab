"""Other libraries, each in a separate file behind the interface of ``interface.py``, and the comparison with them.

Importing this package does not import the libraries.
"""

from __future__ import annotations

from .checks import WrongResult, bound, check, check_moe, check_routed
from .ggml_moe import GgmlMoe, GgmlQ4K
from .interface import Experts, Peer, Projection, RoutedProduct
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
    "peer_named",
]

PEERS: tuple[type[Peer], ...] = (
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
"""All adapters. Their constructors take the number of threads."""


def peer_named(name: str) -> type[Peer]:
    """The adapter of a name."""
    return next(adapter for adapter in PEERS if adapter.name == name)
