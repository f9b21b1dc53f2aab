"""A language model's head in 8 bits: the largest matrix that a token reads, at half the bytes of bfloat16."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from marlin_cy.decoder.options import LM_HEADS
from marlin_cy.decoder.plan import DecoderPlan, DenseLinear
from marlin_cy.errors import UnsupportedError

__all__ = ["rounded_head", "with_head"]

ROWS = 4096  # that are rounded at once, so that the float32 copy stays small


def with_head(plan: DecoderPlan, lm_head: str | None) -> DecoderPlan:
    """The plan with its head as ``lm_head`` says: as it is in the file if None, or "int8".

    Raises
    ------
    TypeError, ValueError
        Another value.
    UnsupportedError
        The head is quantised in the file.
    """
    if lm_head is None:
        return plan
    if not isinstance(lm_head, str) or lm_head not in LM_HEADS:
        raise ValueError(f"lm_head: got {lm_head!r}, expected None or one of {', '.join(LM_HEADS)}")
    if not isinstance(plan.head, DenseLinear):
        raise UnsupportedError("lm_head: the model's head is quantised already; pass None")
    return replace(plan, head=rounded_head(plan.head))


def rounded_head(head: DenseLinear) -> DenseLinear:
    """The head with its weights rounded to int8. Each row has a scale: its largest magnitude is 127 steps."""
    weight = np.empty(head.weight.shape, np.int8)
    scales = np.empty(head.out_features, np.float32)
    for begin in range(0, head.out_features, ROWS):
        rows = np.array(head.matrix(slice(begin, begin + ROWS)), np.float32)
        largest = np.abs(rows).max(axis=1)
        scales[begin : begin + ROWS] = largest / 127
        rows *= (127 / np.where(largest > 0, largest, 1))[:, None]
        weight[begin : begin + ROWS] = np.rint(rows)
    return DenseLinear(weight, head.bias, scales[:, None], head.in_features)
