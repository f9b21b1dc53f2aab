"""Builders of stacks for weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from marlin_cy.interface import Backend, StackBuilder
from marlin_cy.weights.int4 import Int4Weight

__all__ = ["new_builder"]


def new_builder(
    backend: Backend,
    num_experts: int,
    n_per_expert: int,
    weight: Int4Weight,
    g_idx: Sequence[npt.NDArray[np.int32] | None],
) -> StackBuilder:
    """A builder for weights that have the K, group size, code type and scale type of ``weight``."""
    return backend.new_stack_builder(
        num_experts,
        weight.k,
        n_per_expert,
        group_size=weight.group_size,
        g_idx=None if all(entry is None for entry in g_idx) else g_idx,
        codes=weight.codes,
        scale_dtype=weight.scale.dtype,
    )
