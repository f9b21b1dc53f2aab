"""Weights expanded when loaded, multiplied by PyTorch's ``linear``: oneDNN's or MKL's dense products."""

from abc import abstractmethod

from bench.torch_peers import dense_linear
from marlin_cy import reference

from .interface import Peer, Projection, require_plain

__all__ = ["TorchBf16", "TorchFloat32", "TorchPeer", "TorchProjection"]


class TorchPeer(Peer):
    """What the peers in PyTorch share. Its number of threads is the whole process's."""

    distribution = "torch"
    group_sizes = None  # any

    def available(self):
        try:
            import torch  # noqa: F401
        except ImportError as error:
            return f"torch cannot be imported ({error}): pip install torch"
        return None

    def load(self, weight):
        import torch

        require_plain(weight, self.group_sizes)
        torch.set_num_threads(self.num_threads)
        with torch.inference_mode():
            linear, dtype = self._linear(torch, weight)
        return TorchProjection(torch, linear, dtype)

    @abstractmethod
    def _linear(self, torch, weight):
        """A function of activations, and their dtype."""


class TorchProjection(Projection):
    """A function of activations of some dtype."""

    def __init__(self, torch, linear, dtype):
        self._torch, self._linear, self._dtype = torch, linear, dtype

    def prepare(self, x):
        return self._torch.tensor(x, dtype=self._dtype)

    def run(self, prepared):
        with self._torch.inference_mode():
            return self._linear(prepared)

    def result(self, out):
        return out.float().numpy()


class TorchBf16(TorchPeer):
    """``linear`` in bfloat16."""

    name, accuracy, weight_bytes = "torch_bf16", "bf16", 2

    def _linear(self, torch, weight):
        return _dense(torch, weight, torch.bfloat16)


class TorchFloat32(TorchPeer):
    """``linear`` in float32."""

    name, accuracy, weight_bytes = "torch_float32", "float32", 4

    def _linear(self, torch, weight):
        return _dense(torch, weight, torch.float32)


def _dense(torch, weight, dtype):
    rows_of_n = torch.from_numpy(reference.dequantize_weight(weight)).T.to(dtype).contiguous()
    return dense_linear(torch, rows_of_n), dtype
