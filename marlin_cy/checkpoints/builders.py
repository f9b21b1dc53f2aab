"""Builders of stacks for weights of a checkpoint, and the biases of stacks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from marlin_cy.interface import Backend, StackBuilder
from marlin_cy.weights.canonical import CanonicalWeight
from marlin_cy.weights.stored import StoredWeight

__all__ = ["new_builder", "stacked_biases"]


def new_builder(
    backend: Backend,
    num_experts: int,
    n_per_expert: int,
    weight: CanonicalWeight | StoredWeight,
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
        scales=weight.scales,
    )


def stacked_biases(
    rows: Sequence[Sequence[tuple[npt.NDArray[np.float32] | None, int]]],
) -> npt.NDArray[np.float32] | None:
    """The biases of a stack, float32 ``[num_experts, n]``; None if no expert has a bias, or all biases are 0.

    Parameters
    ----------
    rows : sequence of sequences of (float32 ``[n]`` or None, int)
        Of each expert, the bias and width of each linear layer.
    """
    # Older versions of AutoGPTQ write a bias of zeros for linear layers that have no bias.
    if not any(bias is not None and bias.any() for row in rows for bias, _ in row):
        return None
    return np.stack(
        [np.concatenate([np.zeros(n, np.float32) if bias is None else bias for bias, n in row]) for row in rows]
    )
