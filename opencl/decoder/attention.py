"""The launches of attention: ``decoder_attention.cl`` over a layer's cache, and grouped-query attention around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pyopencl as cl

from marlin_cy.decoder.plan import AttentionPlan
from marlin_cy.decoder.program import PAGE_TOKENS
from marlin_cy.opencl.buffers import Rows
from marlin_cy.opencl.decoder.attention_mma import (
    MOST_SPLITS,
    RowsKernel,
    TilesKernel,
    chosen,
    rows_kernels,
    tiles_kernels,
)
from marlin_cy.opencl.decoder.heads import Rotation, place_heads
from marlin_cy.opencl.decoder.projections import ProjectionGroup
from marlin_cy.opencl.tiers.configuration import FLOAT32

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend
    from marlin_cy.opencl.capabilities import Capabilities
    from marlin_cy.opencl.decoder.cache import KvPool
    from marlin_cy.opencl.decoder.maker import Maker
    from marlin_cy.opencl.decoder.merged import Merger
    from marlin_cy.opencl.decoder.projections import Uploads
    from marlin_cy.opencl.decoder.step import Cuts, Known

__all__ = ["Attend", "GroupedAttention", "Kernels", "Shape"]

ATTEND_ITEMS = 128
MOST_HEADS = 8
"""Heads of a tile, at most: a work-item keeps a sum of eight columns for each in registers."""
TILE_QUERIES = 32
"""Queries of a tile of several rows: each value that is read meets as many as fit into local memory and registers."""
MOST_SET_QUERIES = 8
CHUNK = 8  # of decoder.cl
GROUPS_PER_UNIT = 4
"""Work-groups for each compute unit into which attention to single rows is split."""
FILLED = 1.5
"""Tiles by tensor cores for each compute unit, of which two are resident, that make larger tiles worth it."""
MMA_TILES_PER_UNIT = 2
"""Tiles by tensor cores that are resident on a compute unit."""
ROW_SPLITS, TILE_SPLITS = 0, 1  # STEP_SPLITS and STEP_TILE_SPLITS of decoder.cl
MMA_GROUPS_PER_UNIT = 1
"""The same for tensor cores: a work-group has more loads in flight, and the last one joins the splits."""


class Kernels(NamedTuple):
    """Tensor-core kernels; none where the portable kernel is used.

    Attributes
    ----------
    rows : RowsKernel or None
        For single rows.
    tiles : list of TilesKernel
        For tiles of several rows, the largest first.
    split : TilesKernel or None
        The last of ``tiles``, with splits.
    """

    rows: RowsKernel | None
    tiles: list[TilesKernel]
    split: TilesKernel | None = None


@dataclass(frozen=True)
class Shape:
    """The sizes of attention over a layer's cache, and how they are divided among work-items.

    Attributes
    ----------
    num_heads, num_kv_heads, head_dim, value_dim : int
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int

    @property
    def heads(self) -> int:
        """HEADS of the kernel: the largest divisor of the heads that read the same keys, up to MOST_HEADS."""
        per_kv = self.num_heads // self.num_kv_heads
        return max(heads for heads in range(1, MOST_HEADS + 1) if per_kv % heads == 0)

    @property
    def head_blocks(self) -> int:
        """Work-groups of a tile."""
        return self.num_heads // self.heads

    def tile_rows(self, device: Capabilities) -> int:
        """Rows of a tile of several rows."""
        rows = max(1, (TILE_QUERIES if self.value_dim <= 256 else TILE_QUERIES // 2) // self.heads)
        while rows > 1 and self.local_bytes(rows) > device.local_memory:
            rows -= 1
        return rows

    def local_bytes(self, rows: int) -> int:
        """Local memory of a work-group."""
        macros = self.macros(rows)
        queries = macros["QUERIES"]
        room = max(queries * self.head_dim, ATTEND_ITEMS * CHUNK)
        return 4 * (room + queries * macros["KEYS"] + ATTEND_ITEMS + 3 * queries + rows)

    def macros(self, rows: int) -> dict[str, int]:
        """The kernel's macros for tiles of ``rows`` rows."""
        queries, lanes = rows * self.heads, self.value_dim // CHUNK
        query_sets = max(
            sets for sets in (1, 2, 4, 8, 16) if sets == 1 or (queries % sets == 0 and sets * lanes <= ATTEND_ITEMS)
        )
        if queries <= MOST_HEADS:
            query_sets = 1
        key_sets = max(sets for sets in (1, 2, 4, 8) if sets == 1 or sets * query_sets * lanes <= ATTEND_ITEMS)
        score_lanes = ATTEND_ITEMS // query_sets
        return {
            "ATTEND_ITEMS": ATTEND_ITEMS,
            "HEAD_DIM": self.head_dim,
            "VALUE_DIM": self.value_dim,
            "QUERIES": queries,
            "HEADS": self.heads,
            "QUERY_SETS": query_sets,
            "KEY_SETS": key_sets,
            "KEYS": max(32, score_lanes),
        }


@dataclass(frozen=True, eq=False)
class Attend:
    """Attention over a layer's cache.

    Attributes
    ----------
    shape : Shape
    pool : KvPool
    scale, soft_cap : float
        ``soft_cap`` is 0 without one.
    window : int
        0 without one.
    sinks : pyopencl.Buffer or None
    gate_offset : int
        Where a head's gate begins, from its query on; 0 without a gate.
    """

    shape: Shape
    pool: KvPool
    scale: float
    soft_cap: float = 0.0
    window: int = 0
    sinks: cl.Buffer | None = None
    gate_offset: int = 0

    def kernels(self, backend: OpenClBackend, output_type: int) -> Kernels:
        """The tensor-core kernels that the backend's device runs."""
        of = self.shape, self.pool.type_code, self.pool.segments
        builds = [chosen([kernel], output_type, backend) for kernel in tiles_kernels(*of)]
        tiles = [kernel for kernel in builds if kernel is not None]
        split = chosen([replace(tiles[-1], split=True)], output_type, backend) if tiles else None
        return Kernels(chosen(rows_kernels(*of), output_type, backend), tiles, split)

    def tiles_kernel(self, device: Capabilities, kernels: Kernels, rows: int) -> TilesKernel | None:
        """The tensor-core kernel for tiles of a step of ``rows`` rows.

        The one with the largest tiles of which there are enough for the device; None where the portable one is used.
        """
        wanted = FILLED * device.compute_units
        for kernel in kernels.tiles[:-1]:
            if -(-rows // kernel.rows) * (self.shape.num_heads // kernel.heads) >= wanted:
                return kernel
        return kernels.tiles[-1] if kernels.tiles else None

    def tile_rows(self, device: Capabilities, kernels: Kernels, rows: int) -> int:
        """Rows of a tile of several rows, at most, of a step of ``rows`` rows."""
        kernel = self.tiles_kernel(device, kernels, rows)
        return self.shape.tile_rows(device) if kernel is None else kernel.rows

    def most_splits(self, device: Capabilities, kernels: Kernels) -> int:
        """Splits of all single rows together, at most, unless they have one split each."""
        if kernels.rows is None:
            return max(1, GROUPS_PER_UNIT * device.compute_units // self.shape.head_blocks)
        blocks = self.shape.num_heads // kernels.rows.heads
        return min(MOST_SPLITS, max(1, MMA_GROUPS_PER_UNIT * device.compute_units // blocks))

    def most_tile_splits(self, device: Capabilities, kernels: Kernels, rows: int) -> int:
        """Splits of all tiles of several rows together, at most, of a step of ``rows`` rows; 1: no tile has any."""
        kernel = self.tiles_kernel(device, kernels, rows)
        if kernel is None:
            return max(1, GROUPS_PER_UNIT * device.compute_units // self.shape.head_blocks)
        if kernels.split is None or kernel is not kernels.tiles[-1]:
            return 1
        return max(1, MMA_TILES_PER_UNIT * device.compute_units * kernel.heads // self.shape.num_heads)

    def record(
        self,
        maker: Maker,
        q: Rows,
        q_head_stride: int,
        output: Rows,
        cuts: Cuts,
        kernels: Kernels | None = None,
    ) -> None:
        """Record the launches for single rows, and for tiles of several. ``kernels``: :meth:`kernels` unless given."""
        shape, layout, ctx = self.shape, maker.layout, maker.ctx
        tile_rows, most_splits, most_tile_splits = cuts
        found = kernels or self.kernels(ctx.backend, output.type_code)
        room = max(most_splits, most_tile_splits * tile_rows if most_tile_splits > 1 else 0) * shape.num_heads
        splits = {
            "partial": ctx.reserve("decoder splits", 4 * room * shape.value_dim),
            "stats": ctx.reserve("decoder statistics of splits", 8 * room),
        }
        own = {
            "batch": maker.step,
            "q": q.data,
            "q_row_stride": q.width,
            "q_head_stride": q_head_stride,
            "num_heads": shape.num_heads,
            "sinks": self.sinks,
            "gate_offset": self.gate_offset,
            "output": output.data,
        }
        cache = {
            **self.pool.arguments,
            "num_kv_heads": shape.num_kv_heads,
            "key_head": PAGE_TOKENS * shape.head_dim,
            "value_head": PAGE_TOKENS * (shape.head_dim if self.pool.shares_values else shape.value_dim),
            "scale": self.scale,
            "soft_cap": self.soft_cap,
            "window": self.window,
        }
        rows, tiles = {**own, "tiles": layout.few_tiles}, {**own, **cache, "tiles": layout.many_tiles}
        if found.rows is None:
            self._record_rows(maker, output.type_code, rows, cache, splits)
        else:
            groups = shape.num_heads // found.rows.heads
            counters = {"arrived": ctx.reserve("decoder counters of splits", 4 * groups * maker.rows)}
            found.rows.record(
                ctx,
                output.type_code,
                lambda known: (groups, known.few_tiles, known.splits) if known.few_tiles else None,
                {**rows, **cache, **splits, **counters},
            )
        if maker.rows == 1:
            return
        kernel = self.tiles_kernel(ctx.backend.runtime.capabilities, found, maker.rows)
        if kernel is None:
            self._record_attend(
                maker,
                output.type_code,
                tile_rows,
                lambda known: (known.many_tiles, shape.head_blocks, known.tile_splits) if known.many_tiles else None,
                {**tiles, **splits},
            )
            if most_tile_splits > 1:
                of_tiles = {**own, **splits, "tiles": layout.many_tiles, "splits_at": TILE_SPLITS}
                self._record_merge(
                    maker, output.type_code, tile_rows, lambda known: (known.many_tiles, known.tile_splits), of_tiles
                )
            return
        blocks = shape.num_heads // kernel.heads
        kernel.record(
            ctx,
            output.type_code,
            lambda known: (blocks, known.many_tiles, 1) if known.many_tiles and known.tile_splits == 1 else None,
            tiles,
        )
        if most_tile_splits > 1:
            assert found.split is not None
            counters = {"arrived": ctx.reserve("decoder counters of tiles", 4 * blocks * maker.rows)}
            found.split.record(
                ctx,
                output.type_code,
                lambda known: (blocks, known.many_tiles, known.tile_splits) if known.tile_splits > 1 else None,
                {**tiles, **splits, **counters},
            )

    def _record_rows(
        self, maker: Maker, output_type: int, rows: dict[str, Any], cache: dict[str, Any], splits: dict[str, Any]
    ) -> None:
        """Record the portable launches for single rows: attention, and the sum of the splits."""
        shape = self.shape
        self._record_attend(
            maker,
            output_type,
            1,
            lambda known: (known.few_tiles, shape.head_blocks, known.splits) if known.few_tiles else None,
            {**rows, **cache, **splits},
        )
        self._record_merge(
            maker,
            output_type,
            1,
            lambda known: (known.few_tiles, known.splits),
            {**rows, **splits, "splits_at": ROW_SPLITS},
        )

    def _record_merge(
        self,
        maker: Maker,
        output_type: int,
        tile_rows: int,
        of_tiles: Callable[[Known], tuple[int, int]],
        values: dict[str, Any],
    ) -> None:
        """Record the launch that joins splits; ``of_tiles``: the tiles, and the splits of each."""
        items = 8 if maker.is_cpu else min(256, max(32, self.shape.value_dim))

        def merge(known: Known) -> tuple[int, ...] | None:
            tiles, splits = of_tiles(known)
            return (tiles * tile_rows * items, self.shape.num_heads) if tiles and splits > 1 else None

        maker.record(
            "decoder_attention",
            "merge_splits",
            self._macros(output_type, tile_rows),  # those of `attend`, so that the program is the same
            merge,
            (items, 1),
            "merge_splits",
            **values,
            value_dim=self.shape.value_dim,
        )

    def _record_attend(
        self,
        maker: Maker,
        output_type: int,
        tile_rows: int,
        groups: Callable[[Known], tuple[int, int, int] | None],
        values: dict[str, Any],
    ) -> None:
        """Record the portable kernel for tiles of a number of rows."""

        def size(known: Known) -> tuple[int, ...] | None:
            found = groups(known)
            return None if found is None else (found[0] * ATTEND_ITEMS, *found[1:])

        macros, local = self._macros(output_type, tile_rows), (ATTEND_ITEMS, 1, 1)
        maker.record("decoder_attention", "attend", macros, size, local, "attend", **values)

    def _macros(self, output_type: int, tile_rows: int) -> dict[str, int]:
        return {**self.pool.macros, "OUTPUT_TYPE": output_type, "ALIGNED": 1, **self.shape.macros(tile_rows)}


class GroupedAttention:
    """A layer of grouped-query attention.

    Parameters
    ----------
    uploads : Uploads
    merger : Merger
    plan : AttentionPlan
    pool : KvPool
    norm_eps : float
        Epsilon of the norms of heads.
    """

    def __init__(self, uploads: Uploads, merger: Merger, plan: AttentionPlan, pool: KvPool, norm_eps: float) -> None:
        self._plan, self._norm_eps = plan, norm_eps
        self.inputs = ProjectionGroup(uploads, [plan.q, plan.k, plan.v], merger)
        self.output = ProjectionGroup(uploads, [plan.o])
        self.rotation = Rotation.of(uploads, plan.rope)
        self.q_norm = uploads.optional(plan.q_norm, "norms of heads")
        self.k_norm = uploads.optional(plan.k_norm, "norms of heads")
        self.attend = Attend(
            Shape(plan.num_heads, plan.num_kv_heads, plan.head_dim, plan.head_dim),
            pool,
            plan.scale,
            plan.soft_cap or 0.0,
            plan.window or 0,
            uploads.optional(plan.sinks, "sinks"),
            plan.head_dim if plan.gated else 0,
        )

    def kernels(self, backend: OpenClBackend, row_type: int) -> Kernels:
        """The tensor-core kernels that the backend's device runs; ``row_type`` as for :meth:`record`."""
        return self.attend.kernels(backend, self._attended_type(row_type))

    def _attended_type(self, row_type: int) -> int:
        return row_type if self.output.quantised else FLOAT32

    def record(self, maker: Maker, x: Rows, out: Rows, row_type: int, cuts: Cuts) -> None:
        """Record the layer: ``out`` is its output."""
        plan, width = self._plan, self._plan.head_dim
        projected = maker.room("heads", self.inputs.width, shares="down")
        self.inputs.record(maker, x, projected, "q, k, v")
        head_stride = 2 * width if plan.gated else width
        k_offset = plan.num_heads * head_stride
        place_heads(
            maker,
            self.attend.pool,
            self.rotation,
            plan.num_heads,
            plan.num_kv_heads,
            q=projected,
            q_head_stride=head_stride,
            q_width=width,
            q_norm=self.q_norm,
            kv=projected,
            k_offset=k_offset,
            v_offset=k_offset + plan.num_kv_heads * width,
            k_width=width,
            v_width=width,
            k_norm=self.k_norm,
            k_norm_values=width,
            eps=self._norm_eps,
        )
        attended = maker.room("attention", plan.num_heads * width, self._attended_type(row_type), shares="gate_up")
        self.attend.record(maker, projected, head_stride, attended, cuts)
        self.output.record(maker, attended, out, "o")
