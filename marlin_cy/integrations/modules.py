"""PyTorch modules with packed weights: a linear layer, and the runners of linear layers and experts.

A module holds a runner. The runner's class depends on whether the backend's buffers are in host memory::

    torch tensor ── NumPy view ──┬─ host (CPU): reads the tensor's memory, writes memory that becomes a tensor
                                 └─ device (OpenCL): from_host, compute, to_host
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from marlin_cy.errors import UnsupportedError
from marlin_cy.integrations import compiled, needs_extra

with needs_extra():
    import torch
    from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from marlin_cy.interface import Backend, Context, Linear
    from marlin_cy.moe.layer import MoeLayer

__all__ = ["Contexts", "MarlinLinear", "array_of", "experts_runner", "linear_runner", "tensor_over"]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

Layer = TypeVar("Layer")


def array_of(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A NumPy view of a host tensor's memory; bfloat16 becomes ``ml_dtypes.bfloat16``.

    Raises
    ------
    UnsupportedError
        The tensor requires a gradient, or is not on the host.
    """
    try:
        if tensor.dtype is torch.bfloat16:
            array: npt.NDArray[Any] = tensor.view(torch.int16).numpy().view(BFLOAT16)
        else:
            array = tensor.numpy()
        return array
    except (RuntimeError, TypeError) as error:
        raise UnsupportedError(f"packed layers need host tensors without gradients: {error}") from error


def tensor_over(array: npt.NDArray[Any]) -> torch.Tensor:
    """A tensor over the memory of a NumPy array: the inverse of :func:`array_of`."""
    if array.dtype is BFLOAT16 or array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class Contexts(threading.local):
    """One context of a backend for each thread that runs a model, made at the thread's first access.

    Attributes
    ----------
    backend : Backend
    ctx : Context
        The context of the calling thread.
    """

    backend: Backend
    ctx: Context

    def __init__(self, backend: Backend, options: Mapping[str, Any]) -> None:
        self.backend = backend
        self.ctx = backend.new_context(**options)


class Runner(Generic[Layer]):
    """A packed layer and the contexts to run it in. Copies of a module share their runner.

    Parameters
    ----------
    layer : Linear or MoeLayer
    contexts : Contexts

    Attributes
    ----------
    number : int
        Of the operators in :mod:`marlin_cy.integrations.compiled`.
    """

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The layer's output."""
        raise NotImplementedError

    def __init__(self, layer: Layer, contexts: Contexts) -> None:
        self.layer, self.contexts = layer, contexts
        self.number = compiled.number_of(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Runner[Layer]:
        return self

    def __reduce__(self) -> str:
        raise UnsupportedError("packed weights cannot be pickled: load the checkpoint in the other process instead")


class LinearRunner(Runner["Linear"]):
    """A linear layer. Its sizes are looked up once, because a decoder calls it with one row at a time."""

    def __init__(self, linear: Linear, contexts: Contexts) -> None:
        super().__init__(linear, contexts)
        self._k, self._n, self._forward = linear.in_features, linear.out_features, linear.forward

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        """The layer's output for ``input``, ``[..., in_features]``."""
        raise NotImplementedError

    def _checked(self, input: torch.Tensor) -> npt.NDArray[Any]:
        array = array_of(input)
        if array.shape[-1] != self._k:
            raise ValueError(f"input: got {array.shape[-1]} columns, expected {self._k}")
        return array


class HostLinearRunner(LinearRunner):
    """Runs a linear layer of a backend whose buffers are ndarrays."""

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        array = self._checked(input)
        out = np.empty((*array.shape[:-1], self._n), array.dtype)
        self._forward(self.contexts.ctx, array.reshape(-1), out.reshape(-1), array.size // self._k)
        return tensor_over(out)


class DeviceLinearRunner(LinearRunner):
    """Runs a linear layer of a backend whose buffers are in device memory."""

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        array, backend = self._checked(input), self.contexts.backend
        m = array.size // self._k
        out = backend.empty((m, self._n), array.dtype)
        self._forward(self.contexts.ctx, backend.from_host(array.reshape(m, self._k)), out, m)
        return tensor_over(backend.to_host(out).reshape(*array.shape[:-1], self._n))


class ExpertsRunner(Runner["MoeLayer"]):
    """The routed experts of a MoE layer."""

    def __call__(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """The output ``[tokens, hidden_size]``, as :meth:`marlin_cy.MoeLayer.forward_routed` defines it."""
        raise NotImplementedError


class HostExpertsRunner(ExpertsRunner):
    """Runs the routed experts of a backend whose buffers are ndarrays."""

    def __call__(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        array = np.ascontiguousarray(array_of(hidden_states))
        out = np.empty_like(array)
        self.layer.forward_routed(self.contexts.ctx, array, array_of(topk_ids), array_of(topk_weights), out=out)
        return tensor_over(out)


class DeviceExpertsRunner(ExpertsRunner):
    """Runs the routed experts of a backend whose buffers are in device memory."""

    def __call__(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        contexts = self.contexts
        buffer = contexts.backend.from_host(array_of(hidden_states))
        out = self.layer.forward_routed(contexts.ctx, buffer, array_of(topk_ids), array_of(topk_weights))
        return tensor_over(contexts.backend.to_host(out))


def linear_runner(linear: Linear, contexts: Contexts) -> LinearRunner:
    """The runner of a linear layer, called as ``(input)`` with a tensor."""
    return (HostLinearRunner if _on_host(contexts.backend) else DeviceLinearRunner)(linear, contexts)


def experts_runner(layer: MoeLayer, contexts: Contexts) -> ExpertsRunner:
    """The runner of a layer's routed experts, called as ``(hidden_states, topk_ids, topk_weights)`` with tensors."""
    return (HostExpertsRunner if _on_host(contexts.backend) else DeviceExpertsRunner)(layer, contexts)


def _on_host(backend: Backend) -> bool:
    return isinstance(backend.empty((1,), np.float32), np.ndarray)


class MarlinLinear(nn.Module):
    """A linear layer over packed 4-bit weights: ``input @ W + bias``.

    The module has no parameters and no gradients. Copies share the packed weights.

    Parameters
    ----------
    in_features, out_features : int
    packed : LinearRunner, optional
        The result of :func:`linear_runner`. It must be set before the module is called.
    """

    def __init__(self, in_features: int, out_features: int, packed: LinearRunner | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.packed = in_features, out_features, packed

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The output ``[..., out_features]`` for a host tensor ``[..., in_features]``: float32, float16 or bfloat16.

        The output has the dtype of the input.
        """
        assert self.packed is not None, "packed weights were not set"
        if torch.compiler.is_compiling():
            output: torch.Tensor = compiled.linear(input, self.packed.number, self.out_features)
            return output
        return self.packed(input)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
