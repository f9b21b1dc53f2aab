"""Replacements for operators that a peer lacks: one call per expert, over rows that were gathered beforehand.

Gathering, activation function and weighted sum are excluded from the time, which favours the peer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.peers.interface import Array, Projection, RoutedProduct

__all__ = ["CallPerExpert", "ProductsOnly"]


class CallPerExpert(RoutedProduct):
    """A routed product made of one call per expert."""

    def __init__(self, projections: Sequence[Projection]) -> None:
        self._projections = projections

    def prepare(self, x: Array, topk_ids: Array) -> Any:
        calls = []
        for expert in np.unique(topk_ids):
            slots = np.nonzero(topk_ids == expert)
            projection = self._projections[expert]
            calls.append((slots, projection, projection.prepare(x[slots[0]])))
        return topk_ids.shape, calls

    def run(self, prepared: Any) -> Any:
        shape, calls = prepared
        return shape, [(slots, projection, projection.run(ready)) for slots, projection, ready in calls]

    def result(self, out: Any) -> Array:
        shape, outputs = out
        rows = [(slots, projection.result(output)) for slots, projection, output in outputs]
        result = np.full((*shape, rows[0][1].shape[1]), np.nan, np.float32)
        for slots, values in rows:
            result[slots] = values
        return result


class ProductsOnly:
    """The two products of a layer's experts, from rows and intermediate values that were made beforehand.

    It has no result: the products are checked one by one.
    """

    def __init__(self, gate_up: Sequence[Projection], down: Sequence[Projection], intermediate: int) -> None:
        self._gate_up, self._down, self._intermediate = gate_up, down, intermediate

    def prepare(self, x: Array, topk_ids: Array, topk_weights: Array) -> Any:
        """The inputs of all calls."""
        between = np.random.default_rng(0).standard_normal((len(x), self._intermediate), np.float32)
        calls = []
        for expert in np.unique(topk_ids):
            tokens = np.nonzero(topk_ids == expert)[0]
            for projection, rows in ((self._gate_up[expert], x[tokens]), (self._down[expert], between[tokens])):
                calls.append((projection, projection.prepare(rows)))
        return calls

    def run(self, prepared: Any) -> None:
        """Call both products of every expert."""
        for projection, ready in prepared:
            projection.run(ready)
