"""The launches of attention: ``decoder_attention.cl`` over a layer's cache, and grouped-query attention around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyopencl as cl

from marlin_cy.decoder.plan import AttentionPlan, RopeTable
from marlin_cy.decoder.program import PAGE_TOKENS
from marlin_cy.opencl.buffers import Rows
from marlin_cy.opencl.decoder.attention_mma import TilesKernel, tiles_kernel
from marlin_cy.opencl.decoder.projections import ProjectionGroup
from marlin_cy.opencl.tiers.configuration import FLOAT32

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend
    from marlin_cy.opencl.capabilities import Capabilities
    from marlin_cy.opencl.decoder.cache import KvPool
    from marlin_cy.opencl.decoder.maker import Maker
    from marlin_cy.opencl.decoder.merged import Merger
    from marlin_cy.opencl.decoder.projections import Uploads
    from marlin_cy.opencl.decoder.step import Known

__all__ = ["Attend", "GroupedAttention", "Rotation", "Shape", "place_heads"]

ATTEND_ITEMS = 128
HEAD_ITEMS, CPU_HEAD_ITEMS = 64, 8
MOST_HEADS = 8
"""Heads of a tile, at most: a work-item keeps a sum of eight columns for each in registers."""
TILE_QUERIES = 32
"""Queries of a tile of several rows: each value that is read meets as many as fit into local memory and registers."""
MOST_SET_QUERIES = 8
CHUNK = 8  # of decoder.cl


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

    def tiles_kernel(self, backend: OpenClBackend, output_type: int) -> TilesKernel | None:
        """The tensor-core kernel for tiles of several rows; None if the portable one is used."""
        return tiles_kernel(self.shape, self.pool.type_code, output_type, backend)

    def tile_rows(self, backend: OpenClBackend, output_type: int) -> int:
        """Rows of a tile of several rows, at most."""
        kernel = self.tiles_kernel(backend, output_type)
        return self.shape.tile_rows(backend.runtime.capabilities) if kernel is None else kernel.rows

    def record(
        self,
        maker: Maker,
        q: Rows,
        q_head_stride: int,
        output: Rows,
        tile_rows: int,
        most_splits: int,
        tiles: TilesKernel | None = None,
    ) -> None:
        """Record the launches for tiles of one row, and for tiles of ``tile_rows`` rows.

        ``most_splits``: splits of all tiles of one row together, at most, unless they have one split each. ``tiles``:
        the tensor-core kernel for tiles of several rows; the one that :meth:`tiles_kernel` gives unless given.
        """
        shape, layout = self.shape, maker.layout
        room = most_splits * shape.num_heads
        partial = maker.ctx.reserve("decoder splits", 4 * room * shape.value_dim)
        stats = maker.ctx.reserve("decoder statistics of splits", 8 * room)
        blocks = shape.head_blocks
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
        splits = {"partial": partial, "stats": stats}
        cache = {
            "keys": self.pool.keys,
            "values": self.pool.values,
            "num_kv_heads": shape.num_kv_heads,
            "key_head": PAGE_TOKENS * shape.head_dim,
            "value_head": PAGE_TOKENS * (shape.head_dim if self.pool.values is self.pool.keys else shape.value_dim),
            "scale": self.scale,
            "soft_cap": self.soft_cap,
            "window": self.window,
        }
        types = {"CACHE_TYPE": self.pool.type_code, "OUTPUT_TYPE": output.type_code, "ALIGNED": 1}

        def attend(rows: int, tiles: int, size: Callable[[Known], tuple[int, ...] | None]) -> None:
            macros = {**types, **shape.macros(rows)}
            local = ATTEND_ITEMS, 1, 1
            maker.record(
                "decoder_attention", "attend", macros, size, local, "attend", **own, **cache, **splits, tiles=tiles
            )

        def few(known: Known) -> tuple[int, ...] | None:
            return (known.few_tiles * ATTEND_ITEMS, blocks, known.splits) if known.few_tiles else None

        def many(known: Known) -> tuple[int, ...] | None:
            return (known.many_tiles * ATTEND_ITEMS, blocks, 1) if known.many_tiles else None

        def merge(known: Known) -> tuple[int, ...] | None:
            return (known.few_tiles * items, shape.num_heads) if known.few_tiles and known.splits > 1 else None

        attend(1, layout.few_tiles, few)
        items = 8 if maker.ctx.backend.runtime.capabilities.is_cpu else min(256, max(32, shape.value_dim))
        maker.record(
            "decoder_attention",
            "merge_splits",
            # The macros of `attend`, so that the program is the same.
            {**types, **shape.macros(1)},
            merge,
            (items, 1),
            "merge_splits",
            **own,
            **splits,
            tiles=layout.few_tiles,
            value_dim=shape.value_dim,
        )
        if maker.rows > 1:
            kernel = tiles or self.tiles_kernel(maker.ctx.backend, output.type_code)
            if kernel is None:
                attend(tile_rows, layout.many_tiles, many)
            else:
                groups = shape.num_heads // kernel.heads
                kernel.record(
                    maker.ctx,
                    output.type_code,
                    lambda known: (groups, known.many_tiles) if known.many_tiles else None,
                    **own,
                    **cache,
                    tiles=layout.many_tiles,
                )


@dataclass(frozen=True, eq=False)
class Rotation:
    """A table of RoPE on the device.

    Attributes
    ----------
    cosine, sine : pyopencl.Buffer or None
    pairs : int
        0 without rotation.
    interleaved : bool
    """

    cosine: cl.Buffer | None
    sine: cl.Buffer | None
    pairs: int
    interleaved: bool

    @classmethod
    def of(cls, uploads: Uploads, table: RopeTable | None) -> Rotation:
        """The table of a layer."""
        if table is None or not table.pairs:
            return cls(None, None, 0, False)
        return cls(uploads(table.cos, "RoPE"), uploads(table.sin, "RoPE"), table.pairs, table.interleaved)


def place_heads(
    maker: Maker,
    pool: KvPool,
    rotation: Rotation,
    num_heads: int,
    num_kv_heads: int,
    *,
    q: Rows,
    q_head_stride: int,
    q_width: int,
    kv: Rows,
    k_width: int,
    v_width: int,
    eps: float,
    q_offset: int = 0,
    q_norm: cl.Buffer | None = None,
    out: Rows | None = None,
    out_offset: int = 0,
    out_head_stride: int = 0,
    k_offset: int = 0,
    v_offset: int = 0,
    k_norm: cl.Buffer | None = None,
    k_norm_values: int = 0,
    k_rope_begin: int = 0,
) -> None:
    """Record ``place_heads``, which documents the arguments. ``out`` None: queries stay where they are."""
    items = CPU_HEAD_ITEMS if maker.ctx.backend.runtime.capabilities.is_cpu else HEAD_ITEMS
    if out is None:
        out, out_offset, out_head_stride = q, q_offset, q_head_stride
    groups = num_heads + num_kv_heads * (2 if v_width else 1)
    maker.record(
        "decoder_heads",
        "place_heads",
        {"CACHE_TYPE": pool.type_code, "HEAD_ITEMS": items},
        (maker.rows * items, groups),
        (items, 1),
        "place_heads",
        batch=maker.step,
        q=q.data,
        q_offset=q_offset,
        q_row_stride=q.width,
        q_head_stride=q_head_stride,
        q_width=q_width,
        out=out.data,
        out_offset=out_offset,
        out_row_stride=out.width,
        out_head_stride=out_head_stride,
        q_norm=q_norm,
        kv=kv.data,
        k_offset=k_offset,
        v_offset=v_offset,
        kv_row_stride=kv.width,
        k_width=k_width,
        v_width=v_width,
        k_norm=k_norm,
        k_norm_values=k_norm_values,
        k_rope_begin=k_rope_begin,
        eps=eps,
        cosine=rotation.cosine,
        sine=rotation.sine,
        pairs=rotation.pairs,
        interleaved=int(rotation.interleaved),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        keys=pool.keys,
        values=pool.values,
    )


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
        self._rotation = Rotation.of(uploads, plan.rope)
        self._q_norm = uploads.optional(plan.q_norm, "norms of heads")
        self._k_norm = uploads.optional(plan.k_norm, "norms of heads")
        self.attend = Attend(
            Shape(plan.num_heads, plan.num_kv_heads, plan.head_dim, plan.head_dim),
            pool,
            plan.scale,
            plan.soft_cap or 0.0,
            plan.window or 0,
            uploads.optional(plan.sinks, "sinks"),
            plan.head_dim if plan.gated else 0,
        )

    def attended_type(self, row_type: int) -> int:
        """The element type of attention's output, where quantised products read rows of ``row_type``."""
        return row_type if self.output.quantised else FLOAT32

    def record(self, maker: Maker, x: Rows, out: Rows, row_type: int, tile_rows: int, most_splits: int) -> None:
        """Record the layer: ``out`` is its output."""
        plan, width = self._plan, self._plan.head_dim
        projected = maker.room("heads", self.inputs.width)
        self.inputs.record(maker, x, projected, "q, k, v")
        head_stride = 2 * width if plan.gated else width
        k_offset = plan.num_heads * head_stride
        place_heads(
            maker,
            self.attend.pool,
            self._rotation,
            plan.num_heads,
            plan.num_kv_heads,
            q=projected,
            q_head_stride=head_stride,
            q_width=width,
            q_norm=self._q_norm,
            kv=projected,
            k_offset=k_offset,
            v_offset=k_offset + plan.num_kv_heads * width,
            k_width=width,
            v_width=width,
            k_norm=self._k_norm,
            k_norm_values=width,
            eps=self._norm_eps,
        )
        attended = maker.room("attention", plan.num_heads * width, self.attended_type(row_type))
        self.attend.record(maker, projected, head_stride, attended, tile_rows, most_splits)
        self.output.record(maker, attended, out, "o")
