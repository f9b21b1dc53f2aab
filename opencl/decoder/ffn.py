"""The launches of feed-forward networks: dense ones, and Mixture-of-Experts blocks by the layers' own kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyopencl as cl

from marlin_cy.decoder.plan import MlpPlan, MoeFfnPlan
from marlin_cy.errors import UnsupportedError
from marlin_cy.opencl.buffers import Rows
from marlin_cy.opencl.checks.routing import is_fused_routing_correct
from marlin_cy.opencl.context import ARRIVED
from marlin_cy.opencl.decoder.maker import Combination
from marlin_cy.opencl.decoder.norm_router import MOST_FUSED_ROWS, Choice, NormRouter, NormRows
from marlin_cy.opencl.decoder.projections import DenseMatrix, ProjectionGroup
from marlin_cy.opencl.gemm.prepare import activation_number, has_one_order, needs_preparation
from marlin_cy.opencl.layer.align import (
    Aligned,
    aligns_as_it_routes,
    check_experts,
    enqueue_align,
    enqueue_route_align,
    routing_arrays,
)
from marlin_cy.opencl.layer.forward import (
    Shared,
    enqueue_products,
    enqueue_shared,
    enqueue_shared_factor,
    enqueue_weigh,
    stacks_of,
)
from marlin_cy.opencl.layer.routing import Chosen, check_routing, enqueue_route
from marlin_cy.opencl.stack import OpenClMarlinExpertStack
from marlin_cy.opencl.tiers.configuration import FLOAT32

if TYPE_CHECKING:
    from marlin_cy.opencl.decoder.maker import Maker, Residual
    from marlin_cy.opencl.decoder.projections import Uploads
    from marlin_cy.opencl.recording import RecordingContext

__all__ = ["Mlp", "MoeFfn"]

GLU_ITEMS = 64


class Mlp:
    """A dense feed-forward network, or a shared expert.

    Parameters
    ----------
    uploads : Uploads
    plan : MlpPlan

    Attributes
    ----------
    gate_up, down : ProjectionGroup
    activation : str
    inner : int
        The width between them.
    """

    def __init__(self, uploads: Uploads, plan: MlpPlan) -> None:
        self.activation, self.inner = plan.activation, plan.down.in_features
        self.gate_up = ProjectionGroup(uploads, [plan.gate, plan.up])
        self.down = ProjectionGroup(uploads, [plan.down])

    def record(self, maker: Maker, x: Rows, out: Rows) -> None:
        """Record the network: ``out`` is its output."""
        gate_up = maker.room("gate and up", self.gate_up.width)
        self.gate_up.record(maker, x, gate_up, "gate, up")
        if self.down.quantised:  # the product applies the activation
            self.down.record(maker, gate_up, out, "down", self.activation)
            return
        inner = maker.room("inner", self.inner)
        maker.record(
            "decoder_rows",
            "glu_rows",
            {"ACTIVATION": activation_number(self.activation), "OUTPUT_TYPE": inner.type_code},
            (-(-self.inner // GLU_ITEMS) * GLU_ITEMS, maker.rows),
            (GLU_ITEMS, 1),
            "glu_rows",
            input=gate_up.data,
            output=inner.data,
            width=self.inner,
        )
        self.down.record(maker, inner, out, "down")


class MoeFfn:
    """A Mixture-of-Experts block.

    Parameters
    ----------
    ctx : RecordingContext
    uploads : Uploads
    plan : MoeFfnPlan

    Attributes
    ----------
    plan : MoePlan
        Of the experts.
    router : DenseMatrix
    correction : pyopencl.Buffer or None
        The correction bias of routing, float32 ``[num_experts]``.
    shared : Mlp or None
        A shared expert that is no part of ``plan``.
    shared_gate : pyopencl.Buffer or None
        The gate of the shared expert, float32 ``[hidden size]``.
    """

    def __init__(self, ctx: RecordingContext, uploads: Uploads, plan: MoeFfnPlan) -> None:
        self.plan = layer = plan.layer.plan
        for name, stack in layer.stacks():
            if not isinstance(stack, OpenClMarlinExpertStack):
                raise UnsupportedError(f"decoder: the experts' {name} is a {type(stack).__name__}, not of this backend")
        check_routing(ctx, layer.routing)
        check_experts(ctx, layer.num_experts)
        self.router = DenseMatrix(uploads, plan.router.weight, plan.router.bias)
        self._norm_router = NormRouter(self.router, layer.routing)
        bias = layer.routing.correction_bias
        self.correction = None if bias is None else uploads.new(bias, "correction bias")
        self.shared = None if plan.shared is None else Mlp(uploads, plan.shared)
        gate = plan.shared_gate if layer.shared_expert is None else layer.shared_expert.gate_weight
        self.shared_gate = uploads.optional(gate, "gate of a shared expert")
        # The counter of `route_align`, which must be 0 before each of its launches.
        self._arrived = ctx.reserve(ARRIVED, 4)

    def record(self, maker: Maker, residual: Residual, norm: cl.Buffer, eps: float, x: Rows) -> Combination:
        """Record the norm and the block; returns what is to be added. ``x``: rows for the norm's output."""
        ctx, layer, rows = maker.ctx, self.plan, maker.rows
        logits = maker.room("router logits", layer.num_experts)
        top_k = layer.top_k
        ids, weights = (ctx.reserve(f"topk_{name}", 4 * rows * top_k) for name in ("ids", "weights"))
        chosen = Chosen(ids, 0, weights, 0, top_k)
        weighed_before = layer.apply_router_weight_on_input
        gate_up = layer.gate_up
        assert isinstance(gate_up, OpenClMarlinExpertStack)
        early = None if weighed_before else x
        aligns = aligns_as_it_routes(ctx, rows, layer.routing) and is_fused_routing_correct(
            ctx, layer.routing, logits, gate_up, early
        )
        choice, added = None, residual.pending
        if rows <= MOST_FUSED_ROWS and isinstance(added, Rows) and self._norm_router.fits(ctx.backend):
            if aligns and self._chooses(maker, early, x.type_code):
                choice = Choice(chosen, routing_arrays(ctx, chosen, rows * top_k, layer.num_experts))
            # Two buffers take turns, because a work-group may still read x when another writes y.
            before = residual.x
            after = maker.room("x" if before.data is maker.room("y", x.width).data else "y", x.width)
            of_rows = NormRows(before, added, after, norm, eps, x)
            self._norm_router.record(maker, of_rows, logits, choice, self._arrived)
            residual.x, residual.pending = after, None
        else:
            residual.norm(maker, norm, eps, x, arrived=self._arrived)
            self.router.record(maker, x, logits, label="router")
        aligned = None
        if choice is not None:
            aligned = Aligned(choice.work, None)
        elif aligns:
            aligned = enqueue_route_align(ctx, logits, layer.routing, chosen, gate_up, early)
        else:
            enqueue_route(ctx, logits, layer.routing, chosen, None)
        routed = enqueue_weigh(ctx, x, chosen) if weighed_before else x
        work, prepared = aligned or enqueue_align(ctx, chosen, gate_up, routed)
        products = enqueue_products(ctx, layer, layer.activation, routed, work, FLOAT32, prepared=prepared)
        shared = None
        if layer.shared_expert is not None:
            shared = enqueue_shared(ctx, layer.shared_expert, layer.activation, x, FLOAT32)
        elif self.shared is not None:
            added = maker.room("shared expert", x.width)
            self.shared.record(maker, x, added)
            gate = self.shared_gate
            shared = Shared(added, None if gate is None else enqueue_shared_factor(ctx, gate, x))
        return Combination(products, chosen, layer.num_experts, not weighed_before, shared)

    @property
    def stacks(self) -> tuple[OpenClMarlinExpertStack, OpenClMarlinExpertStack]:
        """``(gate_up, down)``."""
        return stacks_of(self.plan)

    def _chooses(self, maker: Maker, early: Rows | None, type_code: int) -> bool:
        """Whether the launch of the router's product chooses the experts, too: it prepares no rows.

        ``early``: the experts' rows, or None if they are weighed first; ``type_code``: of the normed rows.
        """
        backend = maker.ctx.backend
        if not self._norm_router.chooses(backend, maker.rows):
            return False
        store = self.stacks[0].store
        if early is not None and needs_preparation(maker.ctx, store, early) and has_one_order(store):
            return False
        from marlin_cy.opencl.checks.norm_router import is_choice_correct  # it imports modules of the decoder

        return is_choice_correct(backend, self._norm_router, type_code)
