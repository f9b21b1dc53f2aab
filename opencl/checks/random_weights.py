"""Random weights that the backend itself makes: for checks and for tuning."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.weights.canonical import CanonicalWeight
from marlin_cy.weights.code_types import CODE_TYPES, CodeType
from marlin_cy.weights.scale_records import BLOCK_ROWS, SCALE_RECORDS

__all__ = ["random_weight"]

SUB_SCALES = 128  # the largest sub-scale


def random_weight(
    rng: np.random.Generator,
    k: int,
    n: int,
    group_size: int,
    codes: str,
    scales: str,
    *,
    symmetric: bool,
    g_idx: npt.NDArray[np.int32] | None = None,
    scale: float = 1,
) -> CanonicalWeight:
    """A weight ``[k, n]`` of all codes, with scales from half of ``scale`` to twice ``scale``.

    With ``symmetric``, all zero points are the code type's ``symmetric_zero``.
    """
    row, record = CODE_TYPES[codes], SCALE_RECORDS[scales]
    groups = -(-k // group_size), n

    def floats(shape: tuple[int, ...], dtype: Any, size: float) -> npt.NDArray[Any]:
        return rng.uniform(0.5 * size, 2 * size, shape).astype(dtype)

    parts: dict[str, Any] = {"zero": zeros(rng, row, groups, symmetric) if record.has_zero_points(row) else None}
    largest = {"scale": scale, "minimum": scale * 2 ** (row.bits - 1)}
    if record.has_blocks:
        for name in ("scale", "minimum")[: 1 + record.has_minimum]:
            parts[name] = rng.integers(SUB_SCALES // 4, SUB_SCALES, groups).astype(record.scale)
            parts[f"block_{name}"] = floats((k // BLOCK_ROWS, n), record.block, largest[name] / SUB_SCALES)
    else:
        for name in ("scale", "minimum")[: 1 + record.has_minimum]:
            parts[name] = floats(groups, record.scale, largest[name])
    return CanonicalWeight(
        words=rng.integers(0, 1 << 32, (k * row.bits // 32, n), dtype=np.uint32),
        group_size=group_size,
        g_idx=g_idx,
        codes=codes,
        **parts,
    )


def zeros(rng: np.random.Generator, row: CodeType, shape: tuple[int, int], symmetric: bool) -> npt.NDArray[Any]:
    """Zero points of a code type."""
    if symmetric:
        return np.full(shape, row.symmetric_zero, row.zero_dtype)
    return rng.integers(1, row.max_zero + 1, shape, dtype=row.zero_dtype)
