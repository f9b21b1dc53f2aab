"""What the stack builders of all backends have in common: their checks, and which columns were added."""

import threading
from abc import abstractmethod

import numpy as np

from marlin_cy.arguments import integer
from marlin_cy.errors import UnsupportedError
from marlin_cy.formats import gptq
from marlin_cy.formats.canonical import Int4Weight
from marlin_cy.interface import StackBuilder

__all__ = ["N_TILE", "CheckedStackBuilder", "check_weight", "checked_stack_sizes", "same_groups"]

MAX_ZERO = 16
N_TILE = 8
"""Columns in the unit at which weights and views may begin and end: half a packed tile or strip of 16."""


class CheckedStackBuilder(StackBuilder):
    """Checks everything a builder is given; a subclass packs it.

    Parameters
    ----------
    num_experts, k, n_per_expert, group_size : int
        As :func:`checked_stack_sizes` returns them.
    g_idx : list of int32 ``[k]`` or None, one an expert
        As :func:`checked_stack_sizes` returns it.
    """

    def __init__(self, num_experts, k, n_per_expert, group_size, g_idx):
        self._k, self._group_size, self._g_idx = k, group_size, g_idx
        self._added = np.zeros((num_experts, n_per_expert), bool)
        self._lock = threading.Lock()

    @abstractmethod
    def _pack(self, expert, column_offset, weight):
        """Write a weight that fits; may run in several threads at once for different columns."""

    @abstractmethod
    def _stack(self):
        """The stack, after all columns were packed."""

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

    def finish(self):
        if not self._added.all():
            expert, column = np.argwhere(~self._added)[0]
            raise ValueError(f"finish: column {column} of expert {expert} was not added")
        return self._stack()


def checked_stack_sizes(num_experts, k, n_per_expert, group_size, g_idx):
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
    return num_experts, k, n_per_expert, group_size, g_idx


def check_weight(weight):
    """Refuse a weight whose arrays are not those that its class describes."""
    if not isinstance(weight, Int4Weight):
        raise TypeError(f"weight: got {type(weight).__name__}, expected Int4Weight")
    for name, dtype in (("words", np.uint32), ("scale", np.float16), ("zero", np.uint8)):
        array = getattr(weight, name)
        if not isinstance(array, np.ndarray) or array.dtype != dtype:
            raise TypeError(
                f"weight.{name}: got {getattr(array, 'dtype', type(array).__name__)}, expected {np.dtype(dtype)}"
            )
        if array.ndim != 2:
            raise ValueError(f"weight.{name}: got shape {array.shape}, expected two dimensions")
    if integer("weight.group_size", weight.group_size) < 1:
        raise ValueError(f"weight.group_size: got {weight.group_size}, expected at least 1")
    groups = (-(-weight.k // weight.group_size), weight.n)
    for name in ("scale", "zero"):
        if getattr(weight, name).shape != groups:
            raise ValueError(f"weight.{name}: got shape {getattr(weight, name).shape}, expected {groups}")
    if weight.zero.max(initial=0) > MAX_ZERO:
        raise ValueError(f"weight.zero: got {weight.zero.max()}, expected 0 to {MAX_ZERO}")


def same_groups(a, b):
    """Whether two ``g_idx`` (None: K's own order) are equal."""
    if a is None or b is None:
        return a is b
    return np.array_equal(a, b)
