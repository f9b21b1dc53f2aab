"""Weights dequantised when loaded and multiplied by PyTorch's ``linear``: oneDNN's or MKL's dense products."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from bench.peers.forms import require_plain
from bench.peers.interface import Array, Peer, Projection
from bench.peers.torch_calls import dense_linear
from marlin_cy import reference
from marlin_cy.weights.canonical import CanonicalWeight

__all__ = ["TorchBf16", "TorchFloat32", "TorchPeer", "TorchProjection"]


class TorchPeer(Peer):
    """Base of the peers that use PyTorch. The number of threads is set for the whole process."""

    distribution = "torch"
    group_sizes: tuple[int, ...] | None = None  # any

    def available(self) -> str | None:
        try:
            import torch  # noqa: F401
        except ImportError as error:
            return f"torch cannot be imported ({error}): pip install torch"
        return None

    def load(self, weight: CanonicalWeight) -> Projection:
        import torch

        require_plain(weight, self.group_sizes)
        torch.set_num_threads(self.num_threads)
        with torch.inference_mode():
            linear, dtype = self._linear(torch, weight)
        return TorchProjection(torch, linear, dtype)

    @abstractmethod
    def _linear(self, torch: Any, weight: CanonicalWeight) -> tuple[Callable[[Any], Any], Any]:
        """The product as a function of activations, and the dtype of the activations."""


class TorchProjection(Projection):
    """A product as a function of activations of one dtype."""

    def __init__(self, torch: Any, linear: Callable[[Any], Any], dtype: Any) -> None:
        self._torch, self._linear, self._dtype = torch, linear, dtype

    def prepare(self, x: Array) -> Any:
        return self._torch.tensor(x, dtype=self._dtype)

    def run(self, prepared: Any) -> Any:
        with self._torch.inference_mode():
            return self._linear(prepared)

    def result(self, out: Any) -> Array:
        result: Array = out.float().numpy()
        return result


class TorchBf16(TorchPeer):
    """``linear`` in bfloat16."""

    name, accuracy, weight_bytes = "torch_bf16", "bf16", 2

    def _linear(self, torch: Any, weight: CanonicalWeight) -> tuple[Callable[[Any], Any], Any]:
        return _dense(torch, weight, torch.bfloat16)


class TorchFloat32(TorchPeer):
    """``linear`` in float32."""

    name, accuracy, weight_bytes = "torch_float32", "float32", 4

    def _linear(self, torch: Any, weight: CanonicalWeight) -> tuple[Callable[[Any], Any], Any]:
        return _dense(torch, weight, torch.float32)


def _dense(torch: Any, weight: CanonicalWeight, dtype: Any) -> tuple[Callable[[Any], Any], Any]:
    rows_of_n = torch.from_numpy(reference.dequantize_weight(weight)).T.to(dtype).contiguous()
    return dense_linear(torch, rows_of_n), dtype
