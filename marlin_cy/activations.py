"""The activations of a MoE layer: one row each.

An activation computes the input of the second product from the gate half and the up half of the first product. A
backend has one kernel for each row, which it finds by the row's number.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

__all__ = ["ACTIVATIONS", "Activation"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Activation:
    """An activation of :class:`~marlin_cy.MoeLayer`.

    Attributes
    ----------
    name : str
        The layer's argument.
    number : int
        Its number in the kernels: ``ACTIVATION_*`` in ``cpu/ukernels/ukernel.h``; the macro ``ACTIVATION`` of
        ``opencl/kernels`` is one larger, as 0 means no activation there.
    reference : callable
        ``reference(gate, up)`` for float64 arrays: the definition with which every backend is compared. Without a
        gate, ``reference(up, up)``.
    gated : bool
        Whether the first product has a gate half and an up half. Otherwise it has up alone.
    """

    name: str
    number: int
    reference: Callable[[FloatArray, FloatArray], FloatArray]
    gated: bool = True


def _silu(gate: FloatArray, up: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):
        result: FloatArray = gate / (1 + np.exp(-gate)) * up
    return result


def _gelu(gate: FloatArray, up: FloatArray) -> FloatArray:
    erf: FloatArray = np.vectorize(math.erf, otypes=[float])(np.asarray(gate) / math.sqrt(2))
    return gate * 0.5 * (1 + erf) * up


def _gelu_tanh(gate: FloatArray, up: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):
        tanh: FloatArray = np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))
    return gate * 0.5 * (1 + tanh) * up


def _swigluoai(gate: FloatArray, up: FloatArray) -> FloatArray:
    """gpt-oss's SwiGLU: gate at most 7, up between -7 and 7, a sigmoid with slope 1.702, up plus one."""
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    with np.errstate(over="ignore"):
        result: FloatArray = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
    return result


def _silu_clamp10(gate: FloatArray, up: FloatArray) -> FloatArray:
    """DeepSeek-V4's SiLU: gate at most 10, up between -10 and 10."""
    return _silu(np.minimum(gate, 10), np.clip(up, -10, 10))


def _relu2(gate: FloatArray, up: FloatArray) -> FloatArray:
    """The square of a rectified value."""
    del gate
    result: FloatArray = np.square(np.maximum(up, 0))
    return result


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        row.name: row
        for row in (
            Activation("silu", 0, _silu),
            Activation("gelu", 1, _gelu),
            Activation("gelu_tanh", 2, _gelu_tanh),
            Activation("swigluoai", 3, _swigluoai),
            Activation("silu_clamp10", 4, _silu_clamp10),
            Activation("relu2", 5, _relu2, gated=False),
        )
    }
)
"""The activations by name."""
