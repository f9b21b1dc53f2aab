"""The CPU backend: makes contexts, buffers, stacks and linear layers, and runs MoE layers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from marlin_cy.arguments import positive_argument
from marlin_cy.command_line import ArgumentGroup, DoctorReport, Precision
from marlin_cy.cpu import _layer, _routing, fork
from marlin_cy.cpu._dispatch import choose_isa
from marlin_cy.cpu._store import CpuGptqStore
from marlin_cy.cpu._workspace import PLANES
from marlin_cy.cpu.context import CpuContext, workspace_of
from marlin_cy.cpu.operations import CpuOperations
from marlin_cy.cpu.stack import CpuMarlinExpertStack, CpuStackBuilder
from marlin_cy.distributed.group import checksum
from marlin_cy.interface import Backend, Context, MoePlan, StackBuilder
from marlin_cy.stacks.builder import checked_stack_sizes

if TYPE_CHECKING:
    from marlin_cy.cpu.decoder.program import CpuDecoder
    from marlin_cy.cpu.layer_measurement import CpuLayerMeasurement
    from marlin_cy.decoder.plan import DecoderPlan
    from marlin_cy.moe.routing import Routing
    from marlin_cy.weights.packed_tiles import PackedTiles

__all__ = ["CpuBackend"]

COMPUTE_DTYPE = "int16"


class CpuBackend(CpuOperations, Backend):
    """The CPU. A buffer is an ``ndarray``."""

    @property
    def name(self) -> str:
        return "cpu"

    def __repr__(self) -> str:
        return f"CpuBackend(isa={choose_isa()[0]!r})"

    def new_context(
        self, *, num_threads: int | None = None, compute_dtype: str = COMPUTE_DTYPE, isa: str | None = None
    ) -> CpuContext:
        """A :class:`CpuContext`; its class documents the options."""
        return CpuContext(self, num_threads, compute_dtype, isa)

    def from_host(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.ascontiguousarray(array)

    def to_host(self, buffer: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return buffer

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        return np.empty(shape, dtype)

    def new_stack_builder(
        self,
        num_experts: int,
        k: int,
        n_per_expert: int,
        *,
        group_size: int,
        g_idx: npt.NDArray[Any] | Sequence[npt.NDArray[Any] | None] | None = None,
        codes: str = "uint4",
        scales: str | npt.DTypeLike = "float16",
    ) -> StackBuilder:
        return CpuStackBuilder(checked_stack_sizes(num_experts, k, n_per_expert, group_size, g_idx, codes, scales))

    @property
    def has_shards(self) -> bool:
        return True

    def stack_from_packed(
        self, packed: PackedTiles, columns: Sequence[tuple[int, int]] | None = None
    ) -> CpuMarlinExpertStack:
        """A stack whose kernels read the tiles of the packed folder in place."""
        store = CpuGptqStore.from_packed(
            packed.num_experts,
            packed.k,
            packed.n,
            packed.group_size,
            list(packed.g_idx),
            packed.codes,
            packed.scales,
            packed.data.reshape(-1),
            columns,
        )
        bias = packed.bias
        if bias is not None and columns is not None:
            bias = np.concatenate([bias[:, begin:end] for begin, end in columns], axis=1)
        return CpuMarlinExpertStack(store, store.num_experts, store.n, store.k, bias)

    def route(
        self, ctx: Context, router_logits: npt.NDArray[Any], routing: Routing
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        result: tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]
        result = fork.run(_routing.route, workspace_of(ctx), router_logits, routing)
        return result

    def moe_forward(
        self,
        ctx: Context,
        plan: MoePlan,
        hidden_states: npt.NDArray[Any],
        out: npt.NDArray[Any],
        router_logits: npt.NDArray[Any] | None,
        topk_ids: npt.NDArray[np.int32] | None,
        topk_weights: npt.NDArray[np.float32] | None,
    ) -> None:
        for name, stack in plan.stacks():
            if not isinstance(stack, CpuMarlinExpertStack):
                raise TypeError(f"ctx: got a CPU context, but the layer's {name} is a {type(stack).__name__}")
        if plan.shard is not None:
            plan.shard.shard.group.agree(
                "layer",
                {
                    "hidden_states": checksum(hidden_states),
                    "out": checksum(out.dtype, out.shape),
                    "router_logits": checksum(router_logits),
                    "topk_ids": checksum(topk_ids),
                    "topk_weights": checksum(topk_weights),
                    "compute_dtype": checksum(workspace_of(ctx).planes),
                },
            )
        fork.run(
            _layer.moe_forward,
            workspace_of(ctx),
            plan,
            hidden_states,
            out,
            router_logits,
            topk_ids,
            topk_weights,
        )

    def new_decoder(
        self, ctx: Context, plan: DecoderPlan, num_pages: int, num_states: int, cache_dtype: str
    ) -> CpuDecoder:
        from marlin_cy.cpu.decoder.program import CpuDecoder

        return CpuDecoder(ctx, plan, num_pages, num_states, cache_dtype)

    @classmethod
    def add_arguments(cls, group: ArgumentGroup) -> None:
        group.add_argument(
            "--threads", type=positive_argument, metavar="N", help="threads of a call; default: one for each CPU"
        )
        group.add_argument(
            "--compute-dtype",
            choices=sorted(PLANES),
            help=f"what activations are quantised to; default: {COMPUTE_DTYPE}",
        )

    def context_from_arguments(self, arguments: argparse.Namespace) -> dict[str, Any]:
        return {"num_threads": arguments.threads, "compute_dtype": arguments.compute_dtype or COMPUTE_DTYPE}

    def describe(self, ctx: Context) -> str:
        assert isinstance(ctx, CpuContext)
        return f"{ctx.isa}, {ctx.num_threads} threads, {ctx.compute_dtype}"

    def layer_measurement(self, arguments: argparse.Namespace) -> CpuLayerMeasurement:
        from marlin_cy.cpu.layer_measurement import CpuLayerMeasurement

        return CpuLayerMeasurement(self, self.new_context(**self.context_from_arguments(arguments)))

    @classmethod
    def precisions(cls) -> Sequence[Precision]:
        return [Precision(name, "float32", {"compute_dtype": name}) for name in PLANES]

    @classmethod
    def doctor(cls) -> DoctorReport:
        from marlin_cy.cpu.doctor import report

        return report()
