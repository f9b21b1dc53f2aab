"""PyTorch modules that run packed weights: a linear layer, and what takes the place of a model's experts.

A module holds an object that computes; which one depends on where the backend's buffers lie::

    torch tensor ── NumPy view ──┬─ host (CPU): computed from the tensor's own memory, into what becomes a tensor
                                 └─ device (OpenCL): from_host, computed, to_host
"""

import threading

import ml_dtypes
import numpy as np

from marlin_cy.errors import UnsupportedError
from marlin_cy.integrations import needs_extra

with needs_extra():
    import torch
    from torch import nn

__all__ = ["Contexts", "MarlinLinear", "as_array", "as_tensor", "packed_experts", "packed_linear"]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def as_array(tensor):
    """A NumPy view of a tensor on the host: of its own memory, bfloat16 as ``ml_dtypes.bfloat16``.

    Raises
    ------
    UnsupportedError
        The tensor wants a gradient, or is not on the host.
    """
    try:
        if tensor.dtype is torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(BFLOAT16)
        return tensor.numpy()
    except (RuntimeError, TypeError) as error:
        raise UnsupportedError(f"packed layers run on host tensors, without gradients: {error}") from error


def as_tensor(array):
    """A tensor over a NumPy array's memory, the inverse of :func:`as_array`."""
    if array.dtype is BFLOAT16 or array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class Contexts(threading.local):
    """A backend's context for each thread that runs a model, made when a thread first asks for it.

    Attributes
    ----------
    ctx : Context
        The calling thread's.
    """

    def __init__(self, backend, options):
        self.backend = backend
        self.ctx = backend.new_context(**options)


class Packed:
    """A packed layer and the contexts to run it in: what copies of a module have in common.

    Parameters
    ----------
    layer : Linear or MoeLayer
    contexts : Contexts
    """

    def __init__(self, layer, contexts):
        self.layer, self.contexts = layer, contexts

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        raise UnsupportedError("packed weights cannot be pickled: load the checkpoint where they are needed")


class TensorLinear(Packed):
    """A Linear; what does not change is looked up once, as a decoder calls it with one row at a time."""

    def __init__(self, linear, contexts):
        super().__init__(linear, contexts)
        self._k, self._n, self._forward = linear.in_features, linear.out_features, linear.forward

    def _checked(self, input):
        array = as_array(input)
        if array.shape[-1] != self._k:
            raise ValueError(f"input: got {array.shape[-1]} columns, expected {self._k}")
        return array


class HostLinear(TensorLinear):
    """Runs a Linear whose backend's buffers are ndarrays."""

    def __call__(self, input):
        array = self._checked(input)
        out = np.empty((*array.shape[:-1], self._n), array.dtype)
        self._forward(self.contexts.ctx, array.reshape(-1), out.reshape(-1), array.size // self._k)
        return as_tensor(out)


class DeviceLinear(TensorLinear):
    """Runs a Linear whose backend's buffers lie on a device."""

    def __call__(self, input):
        array, backend = self._checked(input), self.contexts.backend
        m = array.size // self._k
        out = backend.empty((m, self._n), array.dtype)
        self._forward(self.contexts.ctx, backend.from_host(array.reshape(m, self._k)), out, m)
        return as_tensor(backend.to_host(out).reshape(*array.shape[:-1], self._n))


class HostExperts(Packed):
    """Runs the routed experts of a MoE layer whose backend's buffers are ndarrays."""

    def __call__(self, hidden_states, topk_ids, topk_weights):
        array = np.ascontiguousarray(as_array(hidden_states))
        out = np.empty_like(array)
        self.layer.forward_routed(self.contexts.ctx, array, as_array(topk_ids), as_array(topk_weights), out=out)
        return as_tensor(out)


class DeviceExperts(Packed):
    """Runs the routed experts of a MoE layer whose backend's buffers lie on a device."""

    def __call__(self, hidden_states, topk_ids, topk_weights):
        contexts = self.contexts
        buffer = contexts.backend.from_host(as_array(hidden_states))
        out = self.layer.forward_routed(contexts.ctx, buffer, as_array(topk_ids), as_array(topk_weights))
        return as_tensor(contexts.backend.to_host(out))


def packed_linear(linear, contexts):
    """What runs a Linear on tensors: called as ``(input)``."""
    return (HostLinear if _on_host(contexts.backend) else DeviceLinear)(linear, contexts)


def packed_experts(layer, contexts):
    """What runs a MoE layer's routed experts on tensors: called as ``(hidden_states, topk_ids, topk_weights)``."""
    return (HostExperts if _on_host(contexts.backend) else DeviceExperts)(layer, contexts)


def _on_host(backend):
    return isinstance(backend.empty((1,), np.float32), np.ndarray)


class MarlinLinear(nn.Module):
    """A linear layer over packed 4-bit weights: ``input @ W + bias``.

    It has no parameters. Copies share the packed weights. Without a gradient.

    Parameters
    ----------
    in_features, out_features : int
    packed : callable, optional
        What :func:`packed_linear` gives; a module without one cannot be called yet.

    Notes
    -----
    Called with a float32, float16 or bfloat16 tensor ``[..., in_features]`` on the host; gives one
    ``[..., out_features]`` of the same dtype.
    """

    def __init__(self, in_features, out_features, packed=None):
        super().__init__()
        self.in_features, self.out_features, self.packed = in_features, out_features, packed

    def forward(self, input):
        return self.packed(input)

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}"
