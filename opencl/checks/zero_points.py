"""Random zero points for the weights that the backend itself makes: for checks and for tuning."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from marlin_cy.weights.code_types import CODE_TYPES

__all__ = ["random_zeros"]


def random_zeros(
    rng: np.random.Generator, codes: str, shape: tuple[int, ...], symmetric: bool
) -> npt.NDArray[np.uint8] | None:
    """Zero points of a code type, uint8 of a shape; None if the code type has none.

    With ``symmetric``, all of them are the code type's ``symmetric_zero``.
    """
    row = CODE_TYPES[codes]
    if not row.has_zero_points:
        return None
    if symmetric:
        return np.full(shape, row.symmetric_zero, np.uint8)
    return rng.integers(1, row.max_zero + 1, shape, dtype=np.uint8)
