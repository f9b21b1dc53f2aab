"""The weights of routed experts as vLLM's loader handed them over, packed expert after expert.

::

    tensors of one expert each      ("w1", "w3", "w2")  ┐
    tensors of all experts (gpt-oss)  ("w13", "w2")     ┴─ canonical form ─ this process's share ─ builders
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from marlin_cy.checkpoints.builders import new_builder, stacked_biases
from marlin_cy.checkpoints.calls import call_in_parallel
from marlin_cy.integrations.vllm.shares import deinterleaved, share, start_of_share
from marlin_cy.integrations.vllm.tensors import canonical, order_of

if TYPE_CHECKING:
    from marlin_cy.formats.scheme import Scheme
    from marlin_cy.integrations.vllm.tensors import LayerTensors
    from marlin_cy.interface import Backend, MarlinExpertStack
    from marlin_cy.weights.canonical import CanonicalWeight

__all__ = ["ALL", "FIRST", "SECOND", "ExpertSizes", "pack_experts"]

FIRST, SECOND = "w13", "w2"
"""vLLM's names of the first product (gate and up) and of the second (down)."""

GATE, UP = "w1", "w3"
"""vLLM's names of the parts of the first product. Experts without a gate have the first alone."""

ALL = -1
"""Stands for an expert's number where a tensor holds all experts."""

Floats = npt.NDArray[np.float32]
Piece = tuple["CanonicalWeight", "Floats | None"]
"""A weight and its bias."""


@dataclass(frozen=True)
class ExpertSizes:
    """What this process has of a layer's experts.

    Attributes
    ----------
    num_experts, hidden, inter : int
        ``inter`` is this process's part of the intermediate size.
    rank, ranks : int
        Of tensor parallelism.
    gated : bool
    """

    num_experts: int
    hidden: int
    inter: int
    rank: int
    ranks: int
    gated: bool


def pack_experts(
    backend: Backend,
    tensors: LayerTensors,
    schemes: dict[str, Scheme],
    sizes: ExpertSizes,
    name: str,
    num_threads: int,
) -> tuple[MarlinExpertStack, MarlinExpertStack]:
    """``(gate_up, down)``. The tensors of an expert are forgotten as soon as the expert is packed.

    Parameters
    ----------
    backend : Backend
    tensors : LayerTensors
    schemes : dict
        Of :data:`FIRST` and :data:`SECOND`.
    sizes : ExpertSizes
    name : str
        The layer's name, for messages.
    num_threads : int

    Raises
    ------
    UnsupportedError
        A tensor is missing or invalid, or the experts cannot share a stack.
    ValueError
        This process's share has a size that no kernel supports.
    """
    source = Experts(tensors, schemes, sizes, name)
    orders = source.orders()
    leading = source.pieces(0)
    width = sizes.inter * len(leading[0])
    builders = [
        new_builder(backend, sizes.num_experts, n, pieces[0][0], orders[product])
        for product, (pieces, n) in enumerate(zip(leading, (width, sizes.hidden), strict=True))
    ]
    biases: list[list[Any]] = [[None] * sizes.num_experts, [None] * sizes.num_experts]

    def pack(expert: int) -> None:
        for product, pieces in enumerate(source.pieces(expert) if expert else leading):
            column = 0
            for weight, _ in pieces:
                builders[product].add(expert, column, weight)
                column += weight.n
            biases[product][expert] = [(bias, weight.n) for weight, bias in pieces]

    call_in_parallel(pack, sizes.num_experts, num_threads, lambda done: None)
    gate_up, down = (builder.finish(stacked_biases(rows)) for builder, rows in zip(builders, biases, strict=True))
    return gate_up, down


class Experts:
    """The canonical weights of experts, as :func:`pack_experts` takes them."""

    def __init__(self, tensors: LayerTensors, schemes: dict[str, Scheme], sizes: ExpertSizes, name: str) -> None:
        self._tensors, self._schemes, self._sizes, self._name = tensors, schemes, sizes, name
        self._fused = {product: tensors.pop((ALL, product)) for product in (FIRST, SECOND)}

    def orders(self) -> list[list[Any]]:
        """The ``g_idx`` of each expert in the first and in the second product: None for K's own order."""
        sizes = self._sizes
        if all(scheme.order is None for scheme in self._schemes.values()):
            return [[None] * sizes.num_experts] * 2
        return [
            [self._order(expert, part, k) for expert in range(sizes.num_experts)]
            for part, k in ((GATE, sizes.hidden), (SECOND, sizes.inter))
        ]

    def pieces(self, expert: int) -> list[list[Piece]]:
        """This process's share of an expert's two products: gate, if there is one, and up; down."""
        sizes = self._sizes
        return [
            [self._share(weight, sizes.hidden, sizes.inter, bias) for weight, bias in self._first(expert)],
            # Each process has some rows of down: one of them adds the bias.
            [
                self._share(weight, sizes.inter, sizes.hidden, bias if sizes.rank == 0 else None)
                for weight, bias in [self._weight(expert, SECOND)]
            ],
        ]

    def _order(self, expert: int, part: str, k: int) -> Any:
        """The ``g_idx`` of this process's rows of a weight."""
        scheme = self._schemes[SECOND if part == SECOND else FIRST]
        order = order_of(self._tensors.get((expert, part)), scheme, self._label(expert, part))
        if order is None or len(order) == k:
            return order
        start = start_of_share(len(order), k, self._sizes.rank, self._sizes.ranks)
        return order[start : start + k]

    def _first(self, expert: int) -> list[Piece]:
        if not self._fused[FIRST]:
            return [self._weight(expert, part) for part in ((GATE, UP) if self._sizes.gated else (GATE,))]
        weight, bias = self._weight(expert, FIRST)
        halves = enumerate(deinterleaved(weight))
        return [(half, None if bias is None else bias[first::2]) for first, half in halves]

    def _weight(self, expert: int, part: str) -> Piece:
        product = SECOND if part == SECOND else FIRST
        fused = self._fused[product]
        arrays = {suffix: array[expert] for suffix, array in fused.items()} or self._tensors.pop((expert, part))
        return canonical(arrays, self._schemes[product], self._label(expert, part))

    def _share(self, weight: CanonicalWeight, k: int, n: int, bias: Any) -> Piece:
        rank, ranks = self._sizes.rank, self._sizes.ranks
        if bias is not None:
            start = start_of_share(len(bias), n, rank, ranks)
            bias = bias[start : start + n].astype(np.float32)
        return share(weight, k, n, rank, ranks), bias

    def _label(self, expert: int, part: str) -> str:
        return f"{self._name}, expert {expert}, {part}"
