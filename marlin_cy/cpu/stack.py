"""The CPU backend: contexts, stacks and linear layers over the packed store."""

import os

import numpy as np

from marlin_cy.arguments import integer
from marlin_cy.builder import CheckedStackBuilder, checked_stack_sizes
from marlin_cy.cpu import _gemm, _moe, fork
from marlin_cy.cpu._dispatch import choose_isa
from marlin_cy.cpu._store import CpuGptqStore
from marlin_cy.cpu._workspace import PLANES, Workspace, available_cpus
from marlin_cy.interface import Backend, Context
from marlin_cy.moe.chosen import as_topk
from marlin_cy.packed import PackedLinear, PackedStack, as_dispatches

__all__ = ["CpuBackend", "CpuContext", "CpuLinear", "CpuMarlinExpertStack", "CpuStackBuilder"]


def default_num_threads():
    """``OMP_NUM_THREADS`` if it is set to a number, else the CPUs that this process may run on."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if wanted.strip().isdecimal() and int(wanted) > 0:
        return int(wanted)
    return available_cpus()


class CpuContext(Context):
    """Threads, precision and workspace of CPU calls.

    Parameters
    ----------
    backend : CpuBackend
    num_threads : int, optional
        Threads a call uses; the CPUs that this process may run on (or ``OMP_NUM_THREADS``) unless given.
    compute_dtype : {"int16", "int8"}
        What activations are quantised to, per row and group of K. "int16": relative error 2.5e-5 of a
        product on normal data. "int8": 6.5e-3, and up to twice as fast where arithmetic is the limit.
    isa : str, optional
        Instruction set to use; the best of this machine (or ``MARLIN_CY_ISA``) unless given.

    Raises
    ------
    TypeError, ValueError
        An option that is not one of these.
    """

    def __init__(self, backend, num_threads=None, compute_dtype="int16", isa=None):
        threads = default_num_threads() if num_threads is None else integer("num_threads", num_threads)
        if not 1 <= threads <= 4096:
            raise ValueError(f"num_threads: got {threads}, expected 1 to 4096")
        if not isinstance(compute_dtype, str) or compute_dtype not in PLANES:
            raise ValueError(f"compute_dtype: got {compute_dtype!r}, expected one of {', '.join(PLANES)}")
        if isa is not None and not isinstance(isa, str):
            raise TypeError(f"isa: got {type(isa).__name__}, expected str or None")
        self._backend = backend
        self._compute_dtype = compute_dtype
        self.workspace = Workspace(threads, compute_dtype, isa)

    def __repr__(self):
        return f"CpuContext(num_threads={self.num_threads}, compute_dtype={self.compute_dtype!r}, isa={self.isa!r})"

    @property
    def backend(self):
        return self._backend

    @property
    def num_threads(self):
        """Threads a call uses."""
        return self.workspace.num_threads

    @property
    def compute_dtype(self):
        """ "int16" or "int8"."""
        return self._compute_dtype

    @property
    def isa(self):
        """Name of the instruction set in use."""
        return self.workspace.isa


def workspace_of(ctx):
    """The workspace of a CPU context."""
    if not isinstance(ctx, CpuContext):
        raise TypeError(f"ctx: got {type(ctx).__name__}, expected a CpuContext from CpuBackend.new_context")
    return ctx.workspace


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
        return fork.run(_moe.route, workspace_of(ctx), router_logits, routing)

    def _topk(self, topk_ids, topk_weights, num_experts):
        return as_topk(topk_ids, topk_weights, num_experts)

    def _moe_forward(self, ctx, layer, hidden_states, out, router_logits, topk_ids, topk_weights):
        for name, stack in layer._stacks():
            if not isinstance(stack, CpuMarlinExpertStack):
                raise TypeError(f"ctx: got a CPU context, but the layer's {name} is a {type(stack).__name__}")
        fork.run(
            _moe.moe_forward,
            workspace_of(ctx),
            layer,
            hidden_states,
            out,
            router_logits,
            topk_ids,
            topk_weights,
        )
