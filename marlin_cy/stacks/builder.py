"""What the stack builders of all backends have in common: their checks, and which columns were added."""

import threading
from abc import abstractmethod

import ml_dtypes
import numpy as np

from marlin_cy.arguments import integer
from marlin_cy.errors import UnsupportedError
from marlin_cy.formats import gptq
from marlin_cy.interface import StackBuilder
from marlin_cy.weights.int4 import CODES, SCALE_DTYPES, Int4Weight

__all__ = ["N_TILE", "CheckedStackBuilder", "as_bias", "check_weight", "checked_stack_sizes", "same_groups"]

MAX_ZERO = 16
BIAS_DTYPES = tuple(np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64))
N_TILE = 8
"""Columns in the unit at which weights and views may begin and end: half a packed tile or strip of 16."""


class CheckedStackBuilder(StackBuilder):
    """Checks everything a builder is given; a subclass packs it.

    Parameters
    ----------
    num_experts, k, n_per_expert, group_size : int
        As :func:`checked_stack_sizes` returns them, and so the rest.
    g_idx : list of int32 ``[k]`` or None, one an expert
    codes : str
    scale_dtype : dtype
    """

    def __init__(self, num_experts, k, n_per_expert, group_size, g_idx, codes, scale_dtype):
        self._k, self._group_size, self._g_idx = k, group_size, g_idx
        self._codes, self._scale_dtype = codes, scale_dtype
        self._added = np.zeros((num_experts, n_per_expert), bool)
        self._lock = threading.Lock()

    @abstractmethod
    def _pack(self, expert, column_offset, weight):
        """Write a weight that fits; may run in several threads at once for different columns."""

    @abstractmethod
    def _stack(self, bias):
        """The stack, after all columns were packed; ``bias`` is float32 ``[num_experts, n_per_expert]`` or None."""

    def add(self, expert, column_offset, weight):
        num_experts, n = self._added.shape
        expert, column_offset = integer("expert", expert), integer("column_offset", column_offset)
        check_weight(weight)
        end = column_offset + weight.n
        if not 0 <= expert < num_experts:
            raise IndexError(f"expert: got {expert}, expected 0 to {num_experts - 1}")
        if column_offset % N_TILE or weight.n % N_TILE:
            raise ValueError(f"column_offset: got columns {column_offset} to {end}, expected multiples of {N_TILE}")
        if column_offset < 0 or end > n:
            raise IndexError(f"column_offset: got columns {column_offset} to {end}, expected a part of 0 to {n}")
        if (weight.k, weight.group_size) != (self._k, self._group_size):
            raise ValueError(
                f"weight: got k {weight.k} and group_size {weight.group_size}, expected {self._k} and "
                f"{self._group_size}"
            )
        if (weight.codes, weight.scale.dtype) != (self._codes, self._scale_dtype):
            raise ValueError(
                f"weight: got codes {weight.codes!r} with {weight.scale.dtype} scales, expected {self._codes!r} with "
                f"{self._scale_dtype}"
            )
        g_idx = gptq.normalised_g_idx(weight.g_idx, self._k, self._group_size)
        if not same_groups(g_idx, self._g_idx[expert]):
            raise UnsupportedError(
                f"weight: its g_idx is not the one that expert {expert} of this stack was made with; parts of one "
                "expert (gate and up) must order K alike, or be loaded as two stacks"
            )
        with self._lock:
            columns = self._added[expert, column_offset:end]
            if columns.any():
                raise ValueError(
                    f"column_offset: columns {column_offset} to {end} of expert {expert} were added before"
                )
            columns[:] = True
        try:
            self._pack(expert, column_offset, weight)
        except BaseException:
            with self._lock:
                columns[:] = False
            raise

    def finish(self, bias=None):
        if not self._added.all():
            expert, column = np.argwhere(~self._added)[0]
            raise ValueError(f"finish: column {column} of expert {expert} was not added")
        return self._stack(None if bias is None else as_bias(bias, self._added.shape))


def as_bias(bias, shape):
    """A float32 copy of a bias."""
    expected = f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
    try:
        bias = np.asarray(bias)
    except ValueError as error:
        raise ValueError(f"bias: got {type(bias).__name__} ({error}), expected {expected}") from None
    if bias.dtype not in BIAS_DTYPES:
        raise TypeError(f"bias: got dtype {bias.dtype}, expected float32, float16 or bfloat16")
    if bias.shape != tuple(shape):
        raise ValueError(f"bias: got shape {bias.shape}, expected {expected}")
    return np.array(bias, np.float32, order="C")


def checked_stack_sizes(num_experts, k, n_per_expert, group_size, g_idx, codes, scale_dtype):
    """The arguments of ``new_stack_builder``, checked: -1 resolved, ``g_idx`` a list of one (or None) an expert.

    Raises
    ------
    TypeError, ValueError, IndexError, UnsupportedError
        Naming the argument.
    """
    num_experts, k = integer("num_experts", num_experts), integer("k", k)
    n_per_expert = integer("n_per_expert", n_per_expert)
    for name, value, multiple in (("num_experts", num_experts, 1), ("k", k, 32), ("n_per_expert", n_per_expert, 8)):
        if value < 1 or value % multiple:
            raise ValueError(f"{name}: got {value}, expected a positive multiple of {multiple}")
    group_size = gptq.checked_group_size(bits=4, group_size=group_size, k=k, n=n_per_expert)
    g_idx = [
        gptq.normalised_g_idx(groups, k, group_size, f" of expert {expert}")
        for expert, groups in enumerate(gptq.g_idx_per_expert(g_idx, num_experts, k))
    ]
    if not isinstance(codes, str) or codes not in CODES:
        raise ValueError(f"codes: got {codes!r}, expected one of {', '.join(CODES)}")
    try:
        scale_dtype = np.dtype(scale_dtype)
    except TypeError as error:
        raise TypeError(f"scale_dtype: got {scale_dtype!r} ({error}), expected float16 or bfloat16") from None
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype: got {scale_dtype}, expected float16 or bfloat16")
    return num_experts, k, n_per_expert, group_size, g_idx, codes, scale_dtype


def check_weight(weight):
    """Refuse a weight whose arrays are not those that its class describes."""
    if not isinstance(weight, Int4Weight):
        raise TypeError(f"weight: got {type(weight).__name__}, expected Int4Weight")
    if weight.codes not in CODES:
        raise ValueError(f"weight.codes: got {weight.codes!r}, expected one of {', '.join(CODES)}")
    has_zero = weight.codes == "uint4"
    if not has_zero and weight.zero is not None:
        raise TypeError(f"weight.zero: got {type(weight.zero).__name__}, expected None with {weight.codes!r} codes")
    parts = {"words": (np.dtype(np.uint32),), "scale": SCALE_DTYPES}
    if has_zero:
        parts["zero"] = (np.dtype(np.uint8),)
    for name, dtypes in parts.items():
        array = getattr(weight, name)
        if not isinstance(array, np.ndarray) or array.dtype not in dtypes:
            raise TypeError(
                f"weight.{name}: got {getattr(array, 'dtype', type(array).__name__)}, "
                f"expected {' or '.join(map(str, dtypes))}"
            )
        if array.ndim != 2:
            raise ValueError(f"weight.{name}: got shape {array.shape}, expected two dimensions")
    if integer("weight.group_size", weight.group_size) < 1:
        raise ValueError(f"weight.group_size: got {weight.group_size}, expected at least 1")
    groups = (-(-weight.k // weight.group_size), weight.n)
    for name in ("scale", "zero") if has_zero else ("scale",):
        if getattr(weight, name).shape != groups:
            raise ValueError(f"weight.{name}: got shape {getattr(weight, name).shape}, expected {groups}")
    if has_zero and weight.zero.max(initial=0) > MAX_ZERO:
        raise ValueError(f"weight.zero: got {weight.zero.max()}, expected 0 to {MAX_ZERO}")


def same_groups(a, b):
    """Whether two ``g_idx`` (None: K's own order) are equal."""
    if a is None or b is None:
        return a is b
    return np.array_equal(a, b)
