"""A host's columns of weights: of those that a checkpoint loads, and of stacks in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from marlin_cy.activations import ACTIVATIONS
from marlin_cy.distributed.shard import Columns, Cut, LayerShard, Shard
from marlin_cy.errors import UnsupportedError
from marlin_cy.interface import Backend, Linear, MarlinExpertStack, MoePlan, StackBuilder
from marlin_cy.moe.layer import MoeLayer, SharedExpert
from marlin_cy.stacks.builder import check_weight
from marlin_cy.weights.canonical import CanonicalWeight
from marlin_cy.weights.packed_tiles import PackedTiles
from marlin_cy.weights.sizes import N_TILE
from marlin_cy.weights.tile_layout import TILE_N

__all__ = ["columns_backend", "expert_columns", "layer_share", "new_layer_shard", "padded", "runs_of"]


def new_layer_shard(shard: Shard, inner: int, outputs: int, shared: int | None) -> LayerShard:
    """How a layer of these widths is shared out; ``shared`` is that of the shared expert.

    Raises
    ------
    ValueError
        There are more hosts than tiles of columns.
    """
    return LayerShard(
        shard=shard,
        inner=shard.columns("intermediate_size", inner, whole_tiles=True),
        outputs=shard.columns("hidden_size", outputs, whole_tiles=True),
        shared=None if shared is None else shard.columns("shared_intermediate_size", shared, whole_tiles=True),
    )


def expert_columns(layer: LayerShard, hidden: int, gated: bool, *, shared: bool) -> dict[tuple[int, int], Columns]:
    """The columns of this host of both products of a checkpoint's experts, by ``(k, n)`` of the whole product."""
    cut = layer.shared if shared else layer.inner
    assert cut is not None
    inner, outputs = int(cut[-1]), int(layer.outputs[-1])
    gate_up, down = product_columns(layer, cut, gated)
    # A checkpoint's outputs are as wide as its inputs. So the two keys are equal only if there are no gates; then both
    # products have the same columns.
    return {(hidden, 2 * inner if gated else inner): gate_up, (inner, outputs): down}


def product_columns(layer: LayerShard, inner: Cut, gated: bool) -> tuple[Columns, Columns]:
    """The columns of this host of both products of experts: of gate and up, and of down."""
    first = np.arange(*layer.shard.local(inner))
    gate_up = np.concatenate([first, int(inner[-1]) + first]) if gated else first
    return gate_up, np.arange(*layer.shard.local(layer.outputs))


def layer_share(shard: Shard, layer: MoeLayer) -> MoeLayer:
    """As :meth:`marlin_cy.distributed.Group.layer`."""
    plan, expert = layer.plan, layer.shared_expert
    if plan.shard is not None:
        raise ValueError("layer: is this host's share already")
    gated = ACTIVATIONS[plan.activation].gated
    cuts = new_layer_shard(shard, plan.intermediate_size, plan.output_size, None if expert is None else expert.down.k)

    def share(experts: MoePlan | SharedExpert, inner: Cut) -> tuple[MarlinExpertStack, MarlinExpertStack]:
        gate_up, down = product_columns(cuts, inner, gated)
        return kept_columns(experts.gate_up, gate_up), kept_columns(experts.down, down)

    if expert is not None and cuts.shared is not None:
        expert = SharedExpert(*share(expert, cuts.shared), expert.gate_weight, inner=cuts.width(cuts.shared))
    gate_up, down = share(plan, cuts.inner)
    return MoeLayer.of_plan(replace(plan, gate_up=gate_up, down=down, shared_expert=expert, shard=cuts))


def columns_backend(backend: Backend, columns: Mapping[tuple[int, int], Columns]) -> Backend:
    """A backend that keeps only some columns of the weights that a checkpoint loads to it.

    Parameters
    ----------
    backend : Backend
        Keeps the columns.
    columns : mapping of (int, int) to Columns
        The columns to keep of a weight ``[k, n]``, by ``(k, n)``. Weights of other sizes are refused by a ValueError.
    """
    return cast(Backend, _ColumnsBackend(backend, columns))


class _ColumnsBackend:
    """The methods of a backend that sources of weights use."""

    def __init__(self, backend: Backend, columns: Mapping[tuple[int, int], Columns]) -> None:
        self._backend, self._columns = backend, columns

    def new_stack_builder(self, num_experts: int, k: int, n_per_expert: int, **options: Any) -> StackBuilder:
        columns = self._of(k, n_per_expert)
        n = len(padded(columns))
        return _ColumnsBuilder(self._backend.new_stack_builder(num_experts, k, n, **options), columns)

    def stack_from_packed(self, packed: PackedTiles) -> MarlinExpertStack | None:
        columns = self._of(packed.k, packed.n)
        runs = runs_of(columns)
        between = [begin for begin, _ in runs] + [end for _, end in runs[:-1]]
        if len(runs) > 2 or len(columns) % N_TILE or any(column % TILE_N for column in between):
            return None
        return self._backend.stack_from_packed(packed.mapped(runs), runs)

    def linear_of(self, stack: MarlinExpertStack, bias: npt.NDArray[np.float32] | None) -> Linear:
        (columns,) = self._columns.values()
        if bias is not None:
            bias = padded_columns(np.asarray(bias)[None], columns)[0]
        return self._backend.linear_of(stack, bias)

    def _of(self, k: int, n: int) -> Columns:
        if (k, n) not in self._columns:
            expected = " or ".join(f"{k} to {n}" for k, n in self._columns)
            raise ValueError(f"got {k} to {n} features, expected {expected} by the configuration")
        return self._columns[k, n]


class _ColumnsBuilder(StackBuilder):
    """Passes on the columns to keep. The last ones are repeated up to a multiple of 8."""

    def __init__(self, builder: StackBuilder, columns: Columns) -> None:
        self._builder, self._columns = builder, columns

    def add(self, expert: int, column_offset: int, weight: CanonicalWeight) -> None:
        check_weight(weight)
        first, end = np.searchsorted(self._columns, [column_offset, column_offset + weight.n])
        if first == end:
            return
        kept = self._columns[first:end] - column_offset
        if end == len(self._columns) and first == 0:
            kept = padded(kept)
        self._builder.add(expert, int(first), weight.columns(kept))

    def finish(self, bias: npt.ArrayLike | None = None) -> MarlinExpertStack:
        return self._builder.finish(None if bias is None else padded_columns(np.asarray(bias), self._columns))


def padded(columns: Columns) -> Columns:
    """The columns, with the last one repeated up to a multiple of 8."""
    return np.pad(columns, (0, -len(columns) % N_TILE), mode="edge")


def padded_columns(rows: npt.NDArray[Any], columns: Columns) -> npt.NDArray[Any]:
    """Some columns of a matrix, as :func:`padded`."""
    return np.ascontiguousarray(rows[:, padded(columns)])


def runs_of(columns: Columns) -> list[tuple[int, int]]:
    """``(begin, end)`` of each run of consecutive columns."""
    ends = np.flatnonzero(np.diff(columns) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(columns, ends)]


def tiles_of(stack: MarlinExpertStack) -> PackedTiles:
    """The tiles of a stack of the CPU backend, without a copy.

    Raises
    ------
    UnsupportedError
        Another backend's stack.
    """
    from marlin_cy.cpu.stack import CpuMarlinExpertStack

    if not isinstance(stack, CpuMarlinExpertStack):
        raise UnsupportedError(f"layer: got a {type(stack).__name__}, hosts can share out stacks of the CPU backend")
    store = stack.store
    orders = [store.group_orders[index] for index in store.order_of]
    return PackedTiles(
        data=store.data.reshape(store.num_experts, -1),
        num_experts=store.num_experts,
        k=store.k,
        n=store.n,
        group_size=store.weight_group_size,
        g_idx=[order.g_idx(store.k, store.layout.group_size) for order in orders],
        codes=store.codes,
        scales=store.scales,
        bias=stack.bias,
    )


def kept_columns(stack: MarlinExpertStack, columns: Columns) -> MarlinExpertStack:
    """A new stack with some columns of a stack, which begin and end at tiles."""
    from marlin_cy.cpu.backend import CpuBackend

    return CpuBackend().stack_from_packed(tiles_of(stack).columns(runs_of(columns)))
