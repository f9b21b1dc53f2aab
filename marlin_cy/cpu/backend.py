"""The CPU backend: makes contexts, buffers, stacks and linear layers, and runs MoE layers."""

import numpy as np

from marlin_cy.cpu import _layer, _routing, fork
from marlin_cy.cpu._dispatch import choose_isa
from marlin_cy.cpu.context import CpuContext, workspace_of
from marlin_cy.cpu.stack import CpuLinear, CpuMarlinExpertStack, CpuStackBuilder
from marlin_cy.interface import Backend
from marlin_cy.moe.topk_arguments import as_topk
from marlin_cy.stacks.builder import checked_stack_sizes

__all__ = ["CpuBackend"]


class CpuBackend(Backend):
    """The CPU. A buffer is an ``ndarray``."""

    @property
    def name(self):
        return "cpu"

    def __repr__(self):
        return f"CpuBackend(isa={choose_isa()[0]!r})"

    def new_context(self, *, num_threads=None, compute_dtype="int16", isa=None):
        """A :class:`CpuContext`; the options are documented there."""
        return CpuContext(self, num_threads, compute_dtype, isa)

    def from_host(self, array):
        return np.ascontiguousarray(array)

    def to_host(self, buffer):
        return buffer

    def empty(self, shape, dtype):
        return np.empty(shape, dtype)

    def new_stack_builder(
        self, num_experts, k, n_per_expert, *, group_size, g_idx=None, codes="uint4", scale_dtype=np.float16
    ):
        return CpuStackBuilder(
            *checked_stack_sizes(num_experts, k, n_per_expert, group_size, g_idx, codes, scale_dtype)
        )

    def _linear(self, stack, bias):
        return CpuLinear(stack, 0, stack.n_per_expert, bias)

    def _route(self, ctx, router_logits, routing):
        return fork.run(_routing.route, workspace_of(ctx), router_logits, routing)

    def _topk(self, topk_ids, topk_weights, num_experts):
        return as_topk(topk_ids, topk_weights, num_experts)

    def _moe_forward(self, ctx, layer, hidden_states, out, router_logits, topk_ids, topk_weights):
        for name, stack in layer._stacks():
            if not isinstance(stack, CpuMarlinExpertStack):
                raise TypeError(f"ctx: got a CPU context, but the layer's {name} is a {type(stack).__name__}")
        fork.run(
            _layer.moe_forward,
            workspace_of(ctx),
            layer,
            hidden_states,
            out,
            router_logits,
            topk_ids,
            topk_weights,
        )
