"""The launches of feed-forward networks: dense ones, and Mixture-of-Experts blocks by the layers' own kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pyopencl as cl

from marlin_cy.decoder.plan import MlpPlan, MoeFfnPlan
from marlin_cy.errors import UnsupportedError
from marlin_cy.opencl.buffers import Rows
from marlin_cy.opencl.checks.routing import is_fused_routing_correct
from marlin_cy.opencl.context import ARRIVED
from marlin_cy.opencl.decoder.maker import Combination
from marlin_cy.opencl.decoder.projections import CPU_TEAM, TEAM, DenseMatrix, ProjectionGroup
from marlin_cy.opencl.gemm.prepare import activation_number, has_one_order, needs_preparation
from marlin_cy.opencl.gemm.work import RoutedBlocks
from marlin_cy.opencl.layer.align import (
    aligns_as_it_routes,
    arrival_program,
    check_experts,
    enqueue_align,
    enqueue_route_align,
    few_arguments,
    few_local_bytes,
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
from marlin_cy.opencl.layer.routing import (
    Chosen,
    check_routing,
    enqueue_route,
    route_arguments,
    routing_macros,
)
from marlin_cy.opencl.stack import OpenClMarlinExpertStack
from marlin_cy.opencl.tiers.configuration import FLOAT32

if TYPE_CHECKING:
    from marlin_cy.opencl.decoder.maker import Maker, Residual
    from marlin_cy.opencl.decoder.projections import Uploads
    from marlin_cy.opencl.recording import RecordingContext

__all__ = ["Mlp", "MoeFfn"]

GLU_ITEMS = 64
FUSED_ITEMS, CPU_FUSED_ITEMS = 256, 16
MOST_FUSED_ROWS = 4
"""Rows up to which the norm and the router's product are one launch: each row reads the router's weights."""


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


class Choice(NamedTuple):
    """Where a launch puts the experts that it chooses, and the pairs that it aligns."""

    chosen: Chosen
    work: RoutedBlocks


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
        chooses = None
        if self._fuses(maker, residual, x):
            if aligns and self._chooses(maker, early):
                chooses = Choice(chosen, routing_arrays(ctx, chosen, rows * top_k, layer.num_experts))
            self._record_norm_router(maker, residual, norm, eps, x, logits, chooses)
        else:
            residual.norm(maker, norm, eps, x, arrived=self._arrived)
            self.router.record(maker, x, logits, label="router")
        prepared = None
        if chooses is not None:
            work = chooses.work
            routed = enqueue_weigh(ctx, x, chosen) if weighed_before else x
        elif aligns:
            work, prepared = enqueue_route_align(ctx, logits, layer.routing, chosen, gate_up, early)
            routed = enqueue_weigh(ctx, x, chosen) if weighed_before else x
        else:
            enqueue_route(ctx, logits, layer.routing, chosen, None)
            routed = enqueue_weigh(ctx, x, chosen) if weighed_before else x
            work, prepared = enqueue_align(ctx, chosen, gate_up, routed)
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

    def _fuses(self, maker: Maker, residual: Residual, x: Rows) -> bool:
        """Whether the norm and the router's product are one launch."""
        local_memory = maker.ctx.backend.runtime.capabilities.local_memory
        fits = x.width % 8 == 0 and 4 * (x.width + FUSED_ITEMS) <= local_memory
        return fits and maker.rows <= MOST_FUSED_ROWS and isinstance(residual.pending, Rows)

    def _chooses(self, maker: Maker, early: Rows | None) -> bool:
        """Whether that launch chooses the experts, too: it prepares no rows, and needs local memory for all steps.

        ``early``: the experts' rows, or None if they are weighed first.
        """
        ctx, routing = maker.ctx, self.plan.routing
        needed = 4 * (self.plan.hidden_size + 3 * FUSED_ITEMS) + few_local_bytes(maker.rows, routing)
        if needed > ctx.backend.runtime.capabilities.local_memory:
            return False
        gate_up, _ = self.stacks
        return early is None or not (needs_preparation(ctx, gate_up.store, early) and has_one_order(gate_up.store))

    def _record_norm_router(
        self,
        maker: Maker,
        residual: Residual,
        norm: cl.Buffer,
        eps: float,
        x: Rows,
        logits: Rows,
        chooses: Choice | None,
    ) -> None:
        """Record the norm and the router's product as one launch, which ``chooses`` experts, too, unless None."""
        assert isinstance(residual.pending, Rows)
        # Two buffers take turns, because a work-group may still read x when another writes y.
        before = residual.x
        names = ("x", "y") if before.data is maker.room("y", x.width).data else ("y", "x")
        after = maker.room(names[0], x.width)
        items = CPU_FUSED_ITEMS if maker.is_cpu else FUSED_ITEMS
        team = CPU_TEAM if maker.is_cpu else TEAM
        teams = items // team
        ctx, routing = maker.ctx, self.plan.routing
        macros = {
            "WIDTH": x.width,
            "WEIGHT_TYPE": self.router.type_code,
            "OUTPUT_TYPE": x.type_code,
            "TEAM": team,
            "TEAMS": teams,
            "ALIGNED": 1,
        }
        more: dict[str, Any] = {"arrived": self._arrived}
        options: tuple[str, ...] = ()
        label = "norm_router"
        if chooses is not None:
            program, options = arrival_program(ctx.backend.runtime.capabilities)
            macros |= {"ROUTES": 1, **program, **routing_macros(routing)}
            of_route = route_arguments(ctx, routing, chooses.chosen)
            more = {
                "arrived": ctx.reserve("decoder counters of routing", 4 * (MOST_FUSED_ROWS + 1)),
                "correction": of_route.pop("bias"),
                **of_route,
                **few_arguments(ctx, chooses.work, routing.num_experts),
            }
            label = "norm_router, route, align"
        maker.record(
            "decoder_router",
            "norm_router",
            macros,
            (-(-logits.width // teams) * items, maker.rows),
            (items, 1),
            label,
            options,
            x=before.data,
            added=residual.pending.data,
            y=after.data,
            weight=norm,
            output=x.data,
            eps=eps,
            router=self.router.buffer,
            bias=self.router.bias,
            logits=logits.data,
            n=logits.width,
            **more,
        )
        residual.x, residual.pending = after, None
