"""The launch that norms and rotates the heads of queries and keys, and appends to the cache: ``decoder_heads.cl``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyopencl as cl

from marlin_cy.decoder.plan import RopeTable
from marlin_cy.opencl.buffers import Rows

if TYPE_CHECKING:
    from marlin_cy.opencl.decoder.cache import KvPool
    from marlin_cy.opencl.decoder.maker import Maker
    from marlin_cy.opencl.decoder.projections import Uploads

__all__ = ["Rotation", "place_heads"]

HEAD_ITEMS, CPU_HEAD_ITEMS = 64, 8


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
        {**pool.macros, "HEAD_ITEMS": items},
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
        **pool.arguments,
    )
