"""Stacks and linear layers over the CPU's packed store."""

import numpy as np

from marlin_cy.arguments import integer
from marlin_cy.cpu import _gemm, fork
from marlin_cy.cpu._store import CpuGptqStore
from marlin_cy.cpu.context import workspace_of
from marlin_cy.stacks.base import PackedLinear, PackedStack
from marlin_cy.stacks.builder import CheckedStackBuilder
from marlin_cy.stacks.dispatches import as_dispatches

__all__ = ["CpuLinear", "CpuMarlinExpertStack", "CpuStackBuilder"]


class CpuMarlinExpertStack(PackedStack):
    """Experts in packed int4 tiles.

    Parameters
    ----------
    store : CpuGptqStore
    num_experts, n_per_expert, k : int
        Of the store.
    """

    store_type = CpuGptqStore

    def zero_workspace(self, ctx):
        """Zero the split-K slots of the context. Calls write each slot before they read it, so this is optional."""
        workspace_of(ctx).zero_slots()

    def gemm_phase_batched(self, ctx, input, dispatches, output, k):
        workspace = workspace_of(ctx)
        if integer("k", k) != self.store.k:
            raise ValueError(f"k: got {k}, expected {self.store.k}, the stack's")
        fork.run(_gemm.gemm_batched, workspace, self.store, self.bias, input, as_dispatches(dispatches), output)

    def gemm_phase_vllm(
        self,
        ctx,
        input,
        sorted_token_ids,
        expert_ids,
        num_tokens_past_padded,
        output,
        prob_m,
        moe_block_size,
        top_k,
    ):
        workspace = workspace_of(ctx)
        if isinstance(num_tokens_past_padded, np.ndarray):
            if num_tokens_past_padded.size != 1:
                raise ValueError(
                    f"num_tokens_past_padded: got shape {num_tokens_past_padded.shape}, expected one int32"
                )
            num_tokens_past_padded = num_tokens_past_padded.item()
        fork.run(
            _gemm.gemm_vllm,
            workspace,
            self.store,
            self.bias,
            input,
            sorted_token_ids,
            expert_ids,
            integer("num_tokens_past_padded", num_tokens_past_padded),
            output,
            integer("prob_m", prob_m),
            integer("moe_block_size", moe_block_size),
            integer("top_k", top_k),
        )

    def make_expert_linear(self, expert_offset, expert_n, bias_host=None):
        return CpuLinear(self, integer("expert_offset", expert_offset), integer("expert_n", expert_n), bias_host)


class CpuLinear(PackedLinear):
    """A view on columns of a :class:`CpuMarlinExpertStack`; parameters as for the base class."""

    def _placed(self, bias):
        return bias

    def forward(self, ctx, input, out, m):
        fork.run(
            _gemm.linear,
            workspace_of(ctx),
            self.stack.store,
            input,
            out,
            integer("m", m),
            self._offset,
            self._width,
            self._bias,
        )


class CpuStackBuilder(CheckedStackBuilder):
    """Packs weights straight into a new store."""

    def __init__(self, num_experts, k, n_per_expert, group_size, g_idx, codes, scale_dtype):
        self._store = CpuGptqStore(num_experts, k, n_per_expert, group_size, g_idx, codes, scale_dtype)
        super().__init__(num_experts, k, n_per_expert, group_size, g_idx, codes, scale_dtype)

    def _pack(self, expert, column_offset, weight):
        self._store.pack(expert, column_offset, weight)

    def _stack(self, bias):
        store = self._store
        return CpuMarlinExpertStack(store, store.num_experts, store.n, store.k, bias)
