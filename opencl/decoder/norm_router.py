"""The launch of ``decoder_router.cl``: for few rows the norm, the router's product, and the choice of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from marlin_cy.opencl.decoder.projections import CPU_TEAM, TEAM, DenseMatrix
from marlin_cy.opencl.layer.align import arrival_program, few_arguments, few_local_bytes
from marlin_cy.opencl.layer.routing import Chosen, route_arguments, routing_macros

if TYPE_CHECKING:
    import pyopencl as cl

    from marlin_cy.moe.routing import Routing
    from marlin_cy.opencl.backend import OpenClBackend
    from marlin_cy.opencl.buffers import Rows
    from marlin_cy.opencl.decoder.maker import Maker
    from marlin_cy.opencl.gemm.work import RoutedBlocks

__all__ = ["COUNTERS", "MOST_FUSED_ROWS", "Choice", "NormRouter", "NormRows"]

FUSED_ITEMS, CPU_FUSED_ITEMS = 256, 16
MOST_FUSED_ROWS = 4
"""Rows up to which the norm and the router's product are one launch: each row reads the router's weights."""
COUNTERS = "decoder counters of routing"
"""The workspace buffer of the work-groups, and of the rows, that have arrived."""


class NormRows(NamedTuple):
    """What is normed: ``y = x + added``, and ``output = rms_norm(y, weight)``."""

    x: Rows
    added: Rows
    y: Rows
    weight: cl.Buffer
    eps: float
    output: Rows


class Choice(NamedTuple):
    """Where the launch puts the experts that it chooses, and the pairs that it aligns."""

    chosen: Chosen
    work: RoutedBlocks


@dataclass(frozen=True, eq=False)
class NormRouter:
    """The launch for a router.

    Attributes
    ----------
    router : DenseMatrix
    routing : Routing
    """

    router: DenseMatrix
    routing: Routing

    def fits(self, backend: OpenClBackend) -> bool:
        """Whether the norm and the router's product can be one launch."""
        return self.router.k % 8 == 0 and self._local_bytes() <= backend.runtime.capabilities.local_memory

    def chooses(self, backend: OpenClBackend, rows: int) -> bool:
        """Whether there is local memory for the choice of experts, too."""
        pairs = 8 * FUSED_ITEMS
        needed = self._local_bytes() + pairs + few_local_bytes(rows, self.routing)
        return needed <= backend.runtime.capabilities.local_memory

    def _local_bytes(self) -> int:
        width: int = self.router.k
        return 4 * (width + FUSED_ITEMS)

    def record(self, maker: Maker, rows: NormRows, logits: Rows, choice: Choice | None, arrived: cl.Buffer) -> None:
        """Record the launch.

        Parameters
        ----------
        maker : Maker
        rows : NormRows
        logits : Rows
        choice : Choice or None
            None: experts are chosen by a later launch.
        arrived : pyopencl.Buffer
            The counter of that launch.
        """
        ctx, router = maker.ctx, self.router
        items = CPU_FUSED_ITEMS if maker.is_cpu else FUSED_ITEMS
        team = CPU_TEAM if maker.is_cpu else TEAM
        teams = items // team
        macros = {
            "WIDTH": router.k,
            "WEIGHT_TYPE": router.type_code,
            "OUTPUT_TYPE": rows.output.type_code,
            "TEAM": team,
            "TEAMS": teams,
            "ALIGNED": 1,
        }
        more: dict[str, Any] = {"arrived": arrived}
        options: tuple[str, ...] = ()
        label = "norm_router"
        if choice is not None:
            program, options = arrival_program(ctx.backend.runtime.capabilities)
            macros |= {"ROUTES": 1, **program, **routing_macros(self.routing)}
            of_route = route_arguments(ctx, self.routing, choice.chosen)
            more = {
                "arrived": ctx.reserve(COUNTERS, 4 * (MOST_FUSED_ROWS + 1)),
                "correction": of_route.pop("bias"),
                **of_route,
                **few_arguments(ctx, choice.work, self.routing.num_experts),
            }
            label = "norm_router, route, align"
        maker.record(
            "decoder_router",
            "norm_router",
            macros,
            (-(-router.n // teams) * items, maker.rows),
            (items, 1),
            label,
            options,
            x=rows.x.data,
            added=rows.added.data,
            y=rows.y.data,
            weight=rows.weight,
            output=rows.output.data,
            eps=rows.eps,
            router=router.buffer,
            bias=router.bias,
            logits=logits.data,
            n=router.n,
            **more,
        )
