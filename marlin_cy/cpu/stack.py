"""Stacks and linear layers over the CPU's packed store."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.arguments import integer
from marlin_cy.cpu import _products, fork
from marlin_cy.cpu._store import CpuGptqStore
from marlin_cy.cpu.context import workspace_of
from marlin_cy.interface import Context
from marlin_cy.stacks.base import PackedLinear, PackedStack
from marlin_cy.stacks.builder import CheckedStackBuilder
from marlin_cy.stacks.dispatches import as_dispatches
from marlin_cy.weights.canonical import CanonicalWeight
from marlin_cy.weights.sizes import StackSizes
from marlin_cy.weights.stored import StoredWeight

__all__ = ["CpuLinear", "CpuMarlinExpertStack", "CpuStackBuilder"]


class CpuMarlinExpertStack(PackedStack):
    """Experts in packed int4 tiles.

    Parameters
    ----------
    store : CpuGptqStore
    num_experts, n_per_expert, k : int
        Of the store.
    bias : float32 ``[num_experts, n_per_expert]``, optional
    """

    store_type = CpuGptqStore
    store: CpuGptqStore

    def zero_workspace(self, ctx: Context) -> None:
        """Zero the scratch memory of the context, its split-K slots included.

        No call needs this, because each call writes its scratch memory before it reads it.
        """
        workspace_of(ctx).zero_scratch()

    def gemm_phase_batched(
        self,
        ctx: Context,
        input: npt.NDArray[Any],
        dispatches: npt.NDArray[np.int64] | Iterable[Iterable[int]],
        output: npt.NDArray[Any],
        k: int,
    ) -> None:
        workspace = workspace_of(ctx)
        if integer("k", k) != self.store.k:
            raise ValueError(f"k: got {k}, expected {self.store.k}, the stack's")
        fork.run(_products.gemm_batched, workspace, self.store, self.bias, input, as_dispatches(dispatches), output)

    def gemm_phase_vllm(
        self,
        ctx: Context,
        input: npt.NDArray[Any],
        sorted_token_ids: npt.NDArray[np.int32],
        expert_ids: npt.NDArray[np.int32],
        num_tokens_past_padded: npt.NDArray[np.int32] | int,
        output: npt.NDArray[Any],
        prob_m: int,
        moe_block_size: int,
        top_k: int,
    ) -> None:
        workspace = workspace_of(ctx)
        if isinstance(num_tokens_past_padded, np.ndarray):
            if num_tokens_past_padded.size != 1:
                raise ValueError(
                    f"num_tokens_past_padded: got shape {num_tokens_past_padded.shape}, expected one int32"
                )
            num_tokens_past_padded = num_tokens_past_padded.item()
        fork.run(
            _products.gemm_vllm,
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

    def make_expert_linear(
        self, expert_offset: int, expert_n: int, bias_host: npt.ArrayLike | None = None
    ) -> CpuLinear:
        return CpuLinear(self, integer("expert_offset", expert_offset), integer("expert_n", expert_n), bias_host)


class CpuLinear(PackedLinear):
    """A view of columns of a :class:`CpuMarlinExpertStack`. The parameters are those of the base class."""

    def _placed(self, bias: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return bias

    def forward(self, ctx: Context, input: npt.NDArray[Any], out: npt.NDArray[Any], m: int) -> None:
        fork.run(
            _products.linear,
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
    """Packs weights directly into a new store. The parameters are those of the base class."""

    def __init__(self, sizes: StackSizes) -> None:
        self._store = CpuGptqStore(sizes)
        super().__init__(sizes)

    def add_stored(self, expert: int, column_offset: int, weight: StoredWeight) -> None:
        self._check_place(expert, column_offset, weight)
        with self._reserved(expert, column_offset, weight.n):
            self._store.pack_stored(expert, column_offset, weight)

    def _pack(self, expert: int, column_offset: int, weight: CanonicalWeight) -> None:
        self._store.pack(expert, column_offset, weight)

    def _stack(self, bias: npt.NDArray[np.float32] | None) -> CpuMarlinExpertStack:
        store = self._store
        return CpuMarlinExpertStack(store, store.num_experts, store.n, store.k, bias)
