"""The launches of multi-head latent attention, absorbed: all heads read one latent row of each position."""

from __future__ import annotations

from typing import TYPE_CHECKING

from marlin_cy.decoder.plan import LatentAttentionPlan
from marlin_cy.opencl.decoder.attention import Attend, Kernels, Shape
from marlin_cy.opencl.decoder.heads import Rotation, place_heads
from marlin_cy.opencl.decoder.projections import DenseMatrix, ProjectionGroup
from marlin_cy.opencl.tiers.configuration import FLOAT32

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend
    from marlin_cy.opencl.buffers import Rows
    from marlin_cy.opencl.decoder.cache import KvPool
    from marlin_cy.opencl.decoder.maker import Maker
    from marlin_cy.opencl.decoder.merged import Merger
    from marlin_cy.opencl.decoder.projections import Uploads
    from marlin_cy.opencl.decoder.step import Cuts

__all__ = ["LatentAttention"]


class LatentAttention:
    """A layer of latent attention.

    ::

        x ── q_a, kv_a ──> [q_a | latent, k_rope]       one row, if both read x
             rms_norm, q_b ──> heads of [nope | rope]
             k_up of nope ──> query [latent | rope]      place_heads writes the rotated part, and appends the key
             attend ──> latents ── v_up ──> values ── o

    Parameters
    ----------
    uploads : Uploads
    merger : Merger
    plan : LatentAttentionPlan
    pool : KvPool
    """

    def __init__(self, uploads: Uploads, merger: Merger, plan: LatentAttentionPlan, pool: KvPool) -> None:
        self._plan = plan
        second = plan.q_b if plan.q_a is None else plan.q_a
        self._first = ProjectionGroup(uploads, [plan.kv_a, second], merger)
        self._q_b = None if plan.q_a is None else ProjectionGroup(uploads, [plan.q_b])
        self._q_a_norm = uploads.optional(plan.q_a_norm, "norm of latent queries")
        self._kv_a_norm = uploads(plan.kv_a_norm, "norm of latents")
        self._k_up = DenseMatrix(uploads, plan.k_up)
        self._v_up = DenseMatrix(uploads, plan.v_up)
        self.output = ProjectionGroup(uploads, [plan.o])
        self._rotation = Rotation.of(uploads, plan.rope)
        self.attend = Attend(
            Shape(plan.num_heads, 1, plan.latent_dim + plan.rope_dim, plan.latent_dim), pool, plan.scale
        )

    def kernels(self, backend: OpenClBackend, row_type: int) -> Kernels:
        """The tensor-core kernels that the backend's device runs; ``row_type`` as for :meth:`record`."""
        return self.attend.kernels(backend, FLOAT32)

    def record(self, maker: Maker, x: Rows, out: Rows, row_type: int, cuts: Cuts) -> None:
        """Record the layer: ``out`` is its output."""
        plan = self._plan
        key_width, head_width = plan.latent_dim + plan.rope_dim, plan.nope_dim + plan.rope_dim
        first = maker.room("latents", self._first.width)
        self._first.record(maker, x, first, "kv_a, q_a")
        heads, q_offset = first, key_width
        if self._q_b is not None:
            assert self._q_a_norm is not None and plan.q_a is not None
            type_code = row_type if self._q_b.quantised else FLOAT32
            compressed = maker.room("latent queries", plan.q_a.out_features, type_code)
            maker.norm(first, self._q_a_norm, plan.norm_eps, compressed, x_offset=key_width)
            heads, q_offset = maker.room("heads", self._q_b.width), 0
            self._q_b.record(maker, compressed, heads, "q_b")
        queries = maker.room("queries", plan.num_heads * key_width)
        self._k_up.record(
            maker, heads, queries, x_offset=q_offset, x_batch=head_width, out_batch=key_width, label="k_up"
        )
        place_heads(
            maker,
            self.attend.pool,
            self._rotation,
            plan.num_heads,
            1,
            q=heads,
            q_offset=q_offset + plan.nope_dim,
            q_head_stride=head_width,
            q_width=plan.rope_dim,
            out=queries,
            out_offset=plan.latent_dim,
            out_head_stride=key_width,
            kv=first,
            k_width=key_width,
            v_width=0,
            k_norm=self._kv_a_norm,
            k_norm_values=plan.latent_dim,
            k_rope_begin=plan.latent_dim,
            eps=plan.norm_eps,
        )
        latents = maker.room("attended latents", plan.num_heads * plan.latent_dim)
        self.attend.record(maker, queries, key_width, latents, cuts)
        values = maker.room("attention", plan.num_heads * plan.v_head_dim)
        self._v_up.record(maker, latents, values, x_batch=plan.latent_dim, out_batch=plan.v_head_dim, label="v_up")
        self.output.record(maker, values, out, "o")
