"""Weights as a backend holds them: stacks of experts, linear layers, and the builders that fill them.

These are abstract classes with their documentation. :mod:`marlin_cy.interface` has the other abstract classes and
defines a buffer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from marlin_cy.interface import Context
    from marlin_cy.weights.canonical import CanonicalWeight
from marlin_cy.weights.stored import StoredWeight

__all__ = ["Buffer", "Dispatches", "Linear", "MarlinExpertStack", "StackBuilder", "WeightMetadata"]

Buffer: TypeAlias = Any
"""An array of a backend's own type: ``numpy.ndarray`` on the CPU, ``pyopencl.array.Array`` on OpenCL."""

Dispatches: TypeAlias = Sequence[Sequence[int]] | npt.NDArray[np.signedinteger[Any]]
"""``(expert_idx, in_row_offset, out_row_offset, m)`` for each run of rows, or an integer array ``[D, 4]``."""


@dataclass(frozen=True)
class WeightMetadata:
    """How a weight was quantised, and how large it is.

    Attributes
    ----------
    bits : int
        Bits of a code: 4.
    group_size : int
        Consecutive rows of K that share a scale and a zero point.
    act_order : bool
        True when groups are not runs of consecutive rows (``desc_act``).
    packed_bytes : int
        Size of the packed weight, padding included.
    """

    bits: int
    group_size: int
    act_order: bool
    packed_bytes: int


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
        """Bits, group size, row order and size."""

    @abstractmethod
    def forward(self, ctx: Context, input: Buffer, out: Buffer, m: int) -> None:
        """``out[:m] = input[:m] @ W + bias``.

        Parameters
        ----------
        ctx : Context
        input : buffer ``[rows, in_features]`` or flat
            float32, float16 or bfloat16; contiguous; ``rows >= m``.
        out : buffer ``[rows, out_features]`` or flat
            Any of the three dtypes; contiguous, writeable, without overlap with ``input``; ``rows >= m``.
            Rows from ``m`` on keep their values.
        m : int
            Rows to compute; 0 does nothing.

        Raises
        ------
        TypeError, ValueError
            The message names the argument, the value it got and the value that was expected.
        """


class MarlinExpertStack(ABC):
    """The 4-bit weights of E experts for one projection: ``[k, n_per_expert]`` each, all in one store."""

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
        """E, the number of experts."""

    @property
    @abstractmethod
    def n_tile(self) -> int:
        """A view begins and ends at a multiple of this number of columns; it divides 64."""

    @property
    @abstractmethod
    def metadata(self) -> WeightMetadata:
        """As :attr:`Linear.metadata`; ``packed_bytes`` counts all experts."""

    @property
    @abstractmethod
    def bias(self) -> npt.NDArray[np.float32] | None:
        """The bias of each expert, ``[num_experts, n_per_expert]`` on the host, or None.

        :meth:`gemm_phase_batched`, :meth:`gemm_phase_vllm` and MoE layers add it to each row of an expert's
        product. A view from :meth:`make_expert_linear` does not add it; the view has its own bias.
        """

    @property
    def requires_vllm_moe(self) -> bool:
        """True when only :meth:`gemm_phase_vllm` works on this stack."""
        return False

    def as_any(self) -> Any:
        """The stack itself, typed as its own class, for code that needs its store."""
        return self

    @abstractmethod
    def zero_workspace(self, ctx: Context) -> None:
        """Zero the per-expert workspace slots that split-K products use.

        CUDA kernels need the call once before a batch of :meth:`gemm_phase_batched` calls. The call is optional
        on a backend whose kernels write each slot before they read it. Both built-in backends are of this kind.
        """

    @abstractmethod
    def gemm_phase_batched(self, ctx: Context, input: Buffer, dispatches: Dispatches, output: Buffer, k: int) -> None:
        """Multiply runs of rows by their experts.

        For each dispatch ``(expert_idx, in_row_offset, out_row_offset, m)``::

            output[out_row_offset : out_row_offset + m] = input[in_row_offset : in_row_offset + m] @ W[expert_idx]

        Parameters
        ----------
        ctx : Context
        input : buffer ``[rows, k]`` or flat
        dispatches : sequence of 4-tuples of int, or int64 ndarray ``[D, 4]``
            May be empty. A dispatch with an ``m`` of 0 does nothing. Dispatches may share input rows, but not
            output rows.
        output : buffer ``[rows, n_per_expert]`` or flat
            Rows that no dispatch names keep their values.
        k : int
            Must equal the stack's ``k``.

        Raises
        ------
        TypeError
            An argument of an unsupported type or dtype.
        IndexError
            ``expert_idx`` or a range of rows is out of bounds.
        ValueError
            Any other invalid argument.
        """

    @abstractmethod
    def gemm_phase_vllm(
        self,
        ctx: Context,
        input: Buffer,
        sorted_token_ids: Buffer,
        expert_ids: Buffer,
        num_tokens_past_padded: Buffer | int,
        output: Buffer,
        prob_m: int,
        moe_block_size: int,
        top_k: int,
    ) -> None:
        """Multiply blocks of routed rows by their experts, as vLLM's ``moe_wna16_marlin_gemm`` does.

        Block ``b`` is ``sorted_token_ids[b * moe_block_size : (b + 1) * moe_block_size]``. Blocks end at
        ``num_tokens_past_padded``. Block ``b`` uses expert ``expert_ids[b]``; -1 skips the block. A slot with
        id ``s`` computes ``output[s] = input[s // top_k] @ W``. Ids of ``prob_m * top_k`` or more are padding.

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
            Rows that no slot names keep their values.
        prob_m : int
            Number of rows of ``input`` that are used.
        moe_block_size, top_k : int
            At least 1. ``top_k`` is 1 where ``input`` has one row for each slot id.

        Raises
        ------
        TypeError, ValueError, IndexError
            As :meth:`gemm_phase_batched`.

        See Also
        --------
        marlin_cy.moe_align_block_size : computes the three routing arrays.
        """

    @abstractmethod
    def make_expert_linear(self, expert_offset: int, expert_n: int, bias_host: npt.ArrayLike | None = None) -> Linear:
        """A view of columns ``[expert_offset, expert_offset + expert_n)`` of the stacked N.

        The stacked N is ``num_experts * n_per_expert`` columns, expert after expert: expert ``e`` is
        ``make_expert_linear(e * n_per_expert, n_per_expert)``. The view shares the stack's store.

        Parameters
        ----------
        expert_offset, expert_n : int
            Multiples of :attr:`n_tile`.
        bias_host : array ``[expert_n]``, optional
            Added to every row, in float32.

        Raises
        ------
        IndexError
            Columns outside the stack.
        ValueError
            Not a multiple of :attr:`n_tile`, or a bias of another shape.
        UnsupportedError
            The view spans experts whose rows of K are in different orders (``desc_act``).
        """


class StackBuilder(ABC):
    """Fills a stack one weight at a time, so that memory never holds a whole checkpoint twice."""

    @abstractmethod
    def add(self, expert: int, column_offset: int, weight: CanonicalWeight) -> None:
        """Pack ``weight`` into columns ``[column_offset, column_offset + weight.n)`` of an expert.

        Several threads may call it at once for different columns. The built-in backends release the GIL
        while they pack.

        Parameters
        ----------
        expert : int
        column_offset : int
            A multiple of 8.
        weight : CanonicalWeight
            Its ``k``, ``group_size``, ``g_idx``, ``codes`` and scale dtype must be the builder's.
        """

    def add_stored(self, expert: int, column_offset: int, weight: StoredWeight) -> None:
        """As :meth:`add`, for a weight in a checkpoint's own form.

        The default is to add the canonical form. A backend that can pack the weight directly overrides it.
        """
        self.add(expert, column_offset, weight.canonical())

    @abstractmethod
    def finish(self, bias: npt.ArrayLike | None = None) -> MarlinExpertStack:
        """The stack; a ValueError if a column of an expert was not added.

        Parameters
        ----------
        bias : float array ``[num_experts, n_per_expert]``, optional
            Added to every row of an expert's product, in float32; copied.
        """
