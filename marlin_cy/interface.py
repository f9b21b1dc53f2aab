"""The interface that every backend implements, and its documentation.

The names are those of the Rust traits ``MarlinExpertStack<B>`` and ``Linear<B>`` of ferrum-kernels.
A *buffer* is whatever a backend computes on: an ``ndarray`` on the CPU, a ``pyopencl.array.Array``
on OpenCL. Activations are float32, float16 or bfloat16 (``ml_dtypes.bfloat16`` in NumPy), stored
row-major and contiguous.

All arguments are checked before any work is done: a call that raises has changed neither its
outputs nor its context.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from marlin_cy.arguments import integer, sequence
from marlin_cy.formats import gptq
from marlin_cy.weights.packed_tiles import PackedTiles
from marlin_cy.weights.sizes import checked_group_size, g_idx_per_expert

__all__ = ["Backend", "Context", "Linear", "MarlinExpertStack", "StackBuilder", "WeightMetadata"]


@dataclass(frozen=True)
class WeightMetadata:
    """What a quantised weight was made of.

    Attributes
    ----------
    bits : int
        Bits a code: 4.
    group_size : int
        Rows of K that share a scale and a zero point.
    act_order : bool
        True when groups are not runs of consecutive rows (``desc_act``).
    packed_bytes : int
        Bytes that the packed weight occupies, padding included.
    """

    bits: int
    group_size: int
    act_order: bool
    packed_bytes: int


class Context(ABC):
    """Where calls run: threads or a command queue, and the workspace that they reuse.

    A context may be used by one thread at a time (a second one gets
    :class:`~marlin_cy.errors.ContextInUse`); any number of contexts may exist and run at once.
    Its workspace grows on demand and is reused by every stack that is given this context.
    """

    @property
    @abstractmethod
    def backend(self) -> "Backend":
        """The backend that made it."""


class Linear(ABC):
    """A weight matrix ``[in_features, out_features]``, optionally with a bias."""

    @property
    @abstractmethod
    def in_features(self) -> int:
        """K, the input width."""

    @property
    @abstractmethod
    def out_features(self) -> int:
        """N, the output width."""

    @property
    @abstractmethod
    def metadata(self) -> WeightMetadata:
        """Bits, group size and the rest."""

    @abstractmethod
    def forward(self, ctx, input, out, m):
        """``out[:m] = input[:m] @ W + bias``.

        Parameters
        ----------
        ctx : Context
        input : buffer ``[rows, in_features]`` or flat
            float32, float16 or bfloat16; contiguous; ``rows >= m``.
        out : buffer ``[rows, out_features]`` or flat
            Any of the three dtypes, contiguous, writeable, not overlapping ``input``; ``rows >= m``.
            Rows from ``m`` on are not touched.
        m : int
            Rows to compute; 0 does nothing.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it got and what was expected.
        """


class MarlinExpertStack(ABC):
    """The int4 weights of E experts for one projection: each ``[k, n_per_expert]``, all in one store."""

    @property
    @abstractmethod
    def n_per_expert(self) -> int:
        """Output width of one expert."""

    @property
    @abstractmethod
    def k(self) -> int:
        """Input width, common to all experts."""

    @property
    @abstractmethod
    def num_experts(self) -> int:
        """How many experts are stacked."""

    @property
    @abstractmethod
    def n_tile(self) -> int:
        """Columns in the smallest unit at which a view may begin or end; divides 64."""

    @property
    @abstractmethod
    def metadata(self) -> WeightMetadata:
        """Bits, group size and the rest; ``packed_bytes`` counts all experts."""

    @property
    @abstractmethod
    def bias(self):
        """What is added to each expert's product, float32 ``[num_experts, n_per_expert]`` on the host, or None.

        :meth:`gemm_phase_batched`, :meth:`gemm_phase_vllm` and MoE layers add it; a view has its own.
        """

    @property
    def requires_vllm_moe(self) -> bool:
        """True when only :meth:`gemm_phase_vllm` works on this stack."""
        return False

    def as_any(self):
        """The concrete object, for a caller that must reach its store."""
        return self

    @abstractmethod
    def zero_workspace(self, ctx):
        """Zero the per-expert workspace slots that split-K products use.

        The CUDA kernels need it once before a batch of :meth:`gemm_phase_batched` calls. A backend
        whose kernels write every slot before they read it allows it to be left out.
        """

    @abstractmethod
    def gemm_phase_batched(self, ctx, input, dispatches, output, k):
        """Multiply runs of rows by their experts.

        For each dispatch ``(expert_idx, in_row_offset, out_row_offset, m)``::

            output[out_row_offset : out_row_offset + m] = input[in_row_offset : in_row_offset + m] @ W[expert_idx]

        Parameters
        ----------
        ctx : Context
        input : buffer ``[rows, k]`` or flat
        dispatches : sequence of 4-tuples of int, or int64 ndarray ``[D, 4]``
            May be empty; an ``m`` of 0 does nothing; input rows may be shared by dispatches, output
            rows may not.
        output : buffer ``[rows, n_per_expert]`` or flat
            Rows that no dispatch names are left untouched.
        k : int
            The stack's ``k``, as a check.

        Raises
        ------
        TypeError
            A dtype or type that is not accepted.
        IndexError
            ``expert_idx`` or a row range out of bounds.
        ValueError
            Anything else that contradicts the above.
        """

    @abstractmethod
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
        """The semantics of vLLM's ``moe_wna16_marlin_gemm``.

        Block ``b`` is ``sorted_token_ids[b * moe_block_size : (b + 1) * moe_block_size]``, up to
        ``num_tokens_past_padded``, and uses expert ``expert_ids[b]`` (-1 skips the block). A slot
        with id ``s`` computes ``output[s] = input[s // top_k] @ W``; ids of ``prob_m * top_k`` and
        more are padding.

        Parameters
        ----------
        ctx : Context
        input : buffer ``[>= prob_m, k]`` or flat
        sorted_token_ids : int32 buffer ``[>= num_tokens_past_padded]``
            No id below ``prob_m * top_k`` may occur twice.
        expert_ids : int32 buffer ``[>= num_tokens_past_padded / moe_block_size]``
        num_tokens_past_padded : int32 buffer of one element, or int
            A multiple of ``moe_block_size``.
        output : buffer ``[>= prob_m * top_k, n_per_expert]`` or flat
            Rows that no slot names are left untouched.
        prob_m : int
            Rows of ``input`` that take part.
        moe_block_size, top_k : int
            At least 1. Use ``top_k=1`` for rows that were gathered beforehand.

        Raises
        ------
        TypeError, ValueError, IndexError
            As :meth:`gemm_phase_batched`.

        See Also
        --------
        marlin_cy.moe_align_block_size : makes the three routing arrays.
        """

    @abstractmethod
    def make_expert_linear(self, expert_offset, expert_n, bias_host=None) -> Linear:
        """A view on columns ``[expert_offset, expert_offset + expert_n)`` of the stacked N.

        The stacked N is ``num_experts * n_per_expert`` wide, expert after expert; expert ``e`` is
        ``make_expert_linear(e * n_per_expert, n_per_expert)``. The view shares the store and copies
        nothing.

        Parameters
        ----------
        expert_offset, expert_n : int
            Multiples of :attr:`n_tile`.
        bias_host : array ``[expert_n]``, optional
            Added to every row, in float32.

        Raises
        ------
        IndexError
            The columns do not lie within the stack.
        ValueError
            Off the tile, or a bias of another shape.
        UnsupportedError
            The view spans experts whose rows of K are ordered differently (``desc_act``).
        """


class StackBuilder(ABC):
    """Fills a stack one weight at a time, so that a checkpoint is never held twice."""

    @abstractmethod
    def add(self, expert, column_offset, weight):
        """Pack ``weight`` into columns ``[column_offset, column_offset + weight.n)`` of an expert.

        May be called from several threads at once for different columns; the GIL is released while
        packing.

        Parameters
        ----------
        expert : int
        column_offset : int
            A multiple of 8.
        weight : Int4Weight
            Its ``k``, ``group_size`` and ``g_idx`` must be those that the builder was made with.
        """

    @abstractmethod
    def finish(self, bias=None) -> MarlinExpertStack:
        """The stack. Every column of every expert must have been added.

        Parameters
        ----------
        bias : float array ``[num_experts, n_per_expert]``, optional
            Added to every row of an expert's product, in float32; copied.
        """


class Backend(ABC):
    """A kind of device: makes contexts, buffers and weights."""

    @property
    @abstractmethod
    def name(self) -> str:
        """``"cpu"``, ``"opencl"``."""

    @abstractmethod
    def new_context(self, **options) -> Context:
        """A context; the options are the backend's own."""

    @abstractmethod
    def from_host(self, array):
        """A buffer holding what the ndarray ``array`` holds (on the CPU: the array itself, made contiguous)."""

    @abstractmethod
    def to_host(self, buffer):
        """The ndarray that ``buffer`` holds, after the work enqueued on it has finished."""

    @abstractmethod
    def empty(self, shape, dtype):
        """An uninitialised buffer."""

    @abstractmethod
    def new_stack_builder(
        self, num_experts, k, n_per_expert, *, group_size, g_idx=None, codes="uint4", scale_dtype=np.float16
    ) -> StackBuilder:
        """A builder for a stack whose weights arrive one by one.

        Parameters
        ----------
        num_experts, k, n_per_expert : int
        group_size : int
            As in :meth:`load_gptq`.
        g_idx : int32 ``[k]``, or a sequence of ``num_experts`` of these (or None), optional
            Group of each row of K: one for all experts, or one an expert.
        codes : {"uint4", "e2m1"}
            What the weights' codes stand for, see :class:`~marlin_cy.weights.int4.Int4Weight`.
        scale_dtype : {float16, bfloat16}
            Of the weights' scales.
        """

    def stack_from_packed(self, packed: PackedTiles) -> MarlinExpertStack | None:
        """A stack over packed tiles, without a copy where the backend can use them as they are.

        Parameters
        ----------
        packed : PackedTiles
            Kept alive by the stack if it uses the tiles.

        Returns
        -------
        MarlinExpertStack or None
            None, the default, if the backend has another layout: the caller then unpacks the tiles and adds the
            canonical weights to a builder.

        Raises
        ------
        TypeError, ValueError, IndexError, UnsupportedError
            Naming the argument.
        """
        return None

    def linear_of(self, stack, bias) -> Linear:
        """The linear layer that is all of a stack of one expert, with ``bias`` (``[n_per_expert]`` or None)."""
        return self._linear(stack, bias)

    @abstractmethod
    def _linear(self, stack, bias) -> Linear:
        """The linear layer that a stack of one expert is."""

    @abstractmethod
    def _route(self, ctx, router_logits, routing):
        """``(topk_ids, topk_weights)`` of each row of logits, by a :class:`~marlin_cy.moe.routing.Routing`."""

    @abstractmethod
    def _topk(self, topk_ids, topk_weights, num_experts):
        """What a caller chose, ``(topk_ids, topk_weights)``, checked, as :meth:`_moe_forward` takes it."""

    @abstractmethod
    def _moe_forward(self, ctx, layer, hidden_states, out, router_logits, topk_ids, topk_weights):
        """A MoE layer's forward pass; the arguments were checked by :class:`~marlin_cy.moe.MoeLayer`."""

    def load_gptq(
        self, qweight, scales, qzeros, g_idx=None, bias=None, *, bits, group_size, k, n, checkpoint_format="gptq"
    ) -> Linear:
        """One projection from GPTQ tensors on the host.

        Parameters
        ----------
        qweight : int32 ``[k/8, n]``
            Low nibble first along K.
        scales : float16 or bfloat16 ``[k/group_size, n]``
            Finite.
        qzeros : int32 ``[k/group_size, n/8]``
            Low nibble first along N; stored minus one when ``checkpoint_format`` is ``"gptq"``.
        g_idx : int32 ``[k]``, optional
            Group of each row of K.
        bias : array ``[n]``, optional
            Added to every row, in float32.
        bits : int
            4; anything else is an :class:`~marlin_cy.errors.UnsupportedError`.
        group_size : int
            32, 64, a multiple of 128, or -1 for one group of all of K.
        k, n : int
            Multiples of 32 and of 8.
        checkpoint_format : {"gptq", "gptq_v2"}
            Source: AutoGPTQ and GPTQModel, ``quantize_config.json``.
        """
        k, n = integer("k", k), integer("n", n)
        weight = gptq.to_canonical(
            qweight,
            scales,
            qzeros,
            g_idx,
            bits=bits,
            group_size=group_size,
            k=k,
            n=n,
            checkpoint_format=checkpoint_format,
        )
        builder = self.new_stack_builder(
            1, k, n, group_size=weight.group_size, g_idx=weight.g_idx, scale_dtype=weight.scale.dtype
        )
        builder.add(0, 0, weight)
        return self._linear(builder.finish(), bias)

    def load_gptq_stacked(
        self, qweights, scales, qzeros, g_idx=None, *, bits, group_size, k, n_per_expert, checkpoint_format="gptq"
    ) -> MarlinExpertStack:
        """A stack from sequences of GPTQ tensors on the host, one entry an expert.

        Parameters
        ----------
        qweights, scales, qzeros : sequences of arrays, or arrays with a leading axis of experts
            Each entry as in :meth:`load_gptq`.
        g_idx : int32 ``[k]``, or a sequence of one (or None) an expert, optional
        bits, group_size, k, n_per_expert, checkpoint_format
            As in :meth:`load_gptq`.
        """
        k, n_per_expert = integer("k", k), integer("n_per_expert", n_per_expert)
        for name, entries in (("qweights", qweights), ("scales", scales), ("qzeros", qzeros)):
            sequence(name, entries)
        gptq.check_checkpoint_format(checkpoint_format)
        group_size = checked_group_size(bits=bits, group_size=group_size, k=k, n=n_per_expert, n_name="n_per_expert")
        g_idx_of = g_idx_per_expert(g_idx, len(qweights), k)
        for name, entries in (("scales", scales), ("qzeros", qzeros)):
            if len(entries) != len(qweights):
                raise ValueError(
                    f"{name}: got {len(entries)} entries, expected one an expert: {len(qweights)}, as in qweights"
                )
        if len(qweights) == 0:
            raise ValueError("qweights: got no experts, expected at least one")

        def canonical(expert):
            return gptq.to_canonical(
                qweights[expert],
                scales[expert],
                qzeros[expert],
                g_idx_of[expert],
                bits=bits,
                group_size=group_size,
                k=k,
                n=n_per_expert,
                checkpoint_format=checkpoint_format,
                label=f" of expert {expert}",
            )

        first = canonical(0)
        builder = self.new_stack_builder(
            len(qweights),
            k,
            n_per_expert,
            group_size=group_size,
            g_idx=g_idx_of,
            scale_dtype=first.scale.dtype,
        )
        builder.add(0, 0, first)
        for expert in range(1, len(qweights)):
            builder.add(expert, 0, canonical(expert))
        return builder.finish()
