"""The operations of a decoder, one by one, as methods of a backend.

:mod:`marlin_cy.decoder.reference` has the same operations in float64. A backend's program for a whole model
(:meth:`marlin_cy.Backend.new_decoder`) computes what these methods compute; tests hold the program against them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from marlin_cy.errors import UnsupportedError

if TYPE_CHECKING:
    from marlin_cy.interface import Context

__all__ = ["DecoderOperations"]


class DecoderOperations:
    """Operations on rows of float32, as buffers of the backend. All are optional.

    A buffer is C-contiguous. Where a parameter's dtype is not named, it is float32. An output does not overlap an
    input, unless the method says that they may be the same buffer. Every method checks its arguments before it writes.

    A *cache* is two buffers of float32, float16 or bfloat16, in pages of
    :data:`~marlin_cy.decoder.program.PAGE_TOKENS` positions::

        keys    [num_pages, num_kv_heads, head_dim, PAGE_TOKENS]
        values  [num_pages, num_kv_heads, PAGE_TOKENS, value_dim]

    A sequence's *page table* is a vector of int32: position ``p`` is in page ``page_table[p // PAGE_TOKENS]``, at
    ``p % PAGE_TOKENS``.

    Raises
    ------
    TypeError, ValueError, IndexError
        An invalid argument.
    UnsupportedError
        The backend does not have the operation.
    """

    def embedding_rows(self, ctx: Context, table: Any, tokens: npt.NDArray[np.int32], out: Any) -> None:
        """``out[i] = table[tokens[i]]``.

        Parameters
        ----------
        table : float32, float16 or bfloat16 ``[vocab_size, width]``
        tokens : int32 ``[rows]``, on the host
        out : ``[rows, width]``
        """
        self._lacks("embedding_rows")

    def rms_norm(
        self, ctx: Context, x: Any, weight: Any | None, eps: float, out: Any, *, residual: Any | None = None
    ) -> None:
        """``out = x / sqrt(mean(x * x) + eps) * weight`` for each row.

        Parameters
        ----------
        x : ``[rows, width]``
            The norm of each head is that of ``[rows * heads, head_dim]``.
        weight : ``[width]`` or None
        eps : float
        out : ``[rows, width]``
            It may be ``x``.
        residual : ``[rows, width]``, optional
            ``x`` is added to it, and the norm is that of the sum.
        """
        self._lacks("rms_norm")

    def gated_rms_norm(self, ctx: Context, x: Any, weight: Any | None, gate: Any, eps: float, out: Any) -> None:
        """:meth:`rms_norm` of ``x``, times ``silu(gate)``; ``gate`` is ``[rows, width]``. ``out`` may be ``x``."""
        self._lacks("gated_rms_norm")

    def l2_normalize(self, ctx: Context, x: Any, factor: float) -> None:
        """``x = x * factor / sqrt(sum(x * x) + 1e-6)`` for each row of ``x``, ``[rows, width]``."""
        self._lacks("l2_normalize")

    def rope(
        self, ctx: Context, x: Any, cos: Any, sin: Any, positions: npt.NDArray[np.int32], *, interleaved: bool = False
    ) -> None:
        """Rotate the first ``2 * pairs`` values of each head, as :class:`~marlin_cy.decoder.plan.RopeTable` defines it.

        Parameters
        ----------
        x : ``[tokens, heads, head_dim]``
            Changed in place.
        cos, sin : ``[context_length, pairs]``
        positions : int32 ``[tokens]``, on the host
        interleaved : bool
        """
        self._lacks("rope")

    def dense(self, ctx: Context, x: Any, weight: Any, bias: Any | None, out: Any) -> None:
        """``out = x @ weight.T + bias``.

        Parameters
        ----------
        x : ``[rows, in_features]``
        weight : float32, float16 or bfloat16 ``[out_features, in_features]``
        bias : ``[out_features]`` or None
        out : ``[rows, out_features]``
        """
        self._lacks("dense")

    def append_to_cache(
        self, ctx: Context, keys: Any, values: Any, k: Any, v: Any, page_table: npt.NDArray[np.int32], start: int
    ) -> None:
        """Write the keys and values of consecutive tokens of one sequence, rounded to the cache's dtype.

        Parameters
        ----------
        keys, values : a cache
        k : ``[tokens, num_kv_heads, head_dim]``
        v : ``[tokens, num_kv_heads, value_dim]``
        page_table : int32, on the host
        start : int
            Position of the first token.
        """
        self._lacks("append_to_cache")

    def attention(
        self,
        ctx: Context,
        q: Any,
        keys: Any,
        values: Any,
        page_table: npt.NDArray[np.int32],
        start: int,
        out: Any,
        *,
        scale: float,
        window: int | None = None,
        sinks: Any | None = None,
        soft_cap: float | None = None,
    ) -> None:
        """Attention of consecutive tokens of a sequence, as :class:`~marlin_cy.decoder.plan.AttentionPlan` defines it.

        A token at position ``p`` sees the positions ``max(0, p - window + 1)`` to ``p``, which the cache holds. Other
        positions have no influence, and pages with none of these positions are not read.

        Parameters
        ----------
        q : ``[tokens, num_heads, head_dim]``
            ``num_heads`` is a multiple of the cache's ``num_kv_heads``.
        keys, values : a cache
        page_table : int32, on the host
        start : int
            Position of the first token.
        out : ``[tokens, num_heads, value_dim]``
        scale : float
        window : int, optional
        sinks : ``[num_heads]``, optional
        soft_cap : float, optional
        """
        self._lacks("attention")

    def short_conv(self, ctx: Context, x: Any, weight: Any, state: Any, out: Any) -> None:
        """``silu`` of a causal, depthwise convolution over consecutive tokens of one sequence.

        ::

            out[t, c] = silu(sum over j of weight[c, j] * row(t - (width - 1) + j)[c])

        ``row(t)`` is ``x[t]``, and ``state[width - 1 + t]`` for ``t < 0``.

        Parameters
        ----------
        x : ``[tokens, channels]``
        weight : ``[channels, width]``
        state : ``[width - 1, channels]``
            The rows before the first token, oldest first. The call replaces them by the last rows.
        out : ``[tokens, channels]``
        """
        self._lacks("short_conv")

    def delta_gates(self, ctx: Context, a: Any, b: Any, a_log: Any, dt_bias: Any, decay: Any, beta: Any) -> None:
        """``decay = exp(-exp(a_log) * softplus(a + dt_bias))`` and ``beta = sigmoid(b)``.

        Parameters
        ----------
        a, b : ``[tokens, heads]``
        a_log, dt_bias : ``[heads]``
        decay, beta : ``[tokens, heads]``
            Outputs.
        """
        self._lacks("delta_gates")

    def delta_rule(self, ctx: Context, q: Any, k: Any, v: Any, decay: Any, beta: Any, state: Any, out: Any) -> None:
        """The gated delta rule for consecutive tokens, as :class:`~marlin_cy.decoder.plan.DeltaNetPlan` defines it.

        Parameters
        ----------
        q, k : ``[tokens, num_k_heads, key_dim]``
            Normalised.
        v : ``[tokens, num_v_heads, value_dim]``
            ``num_v_heads`` is a multiple of ``num_k_heads``.
        decay, beta : ``[tokens, num_v_heads]``
        state : ``[num_v_heads, key_dim, value_dim]``
            That before the first token. The call replaces it by the state after the last one.
        out : ``[tokens, num_v_heads, value_dim]``
        """
        self._lacks("delta_rule")

    def _lacks(self, operation: str) -> NoReturn:
        name = getattr(self, "name", type(self).__name__)
        raise UnsupportedError(f"{operation}: the {name} backend does not have this operation of decoders")
