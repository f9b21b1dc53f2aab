"""The interface that a backend implements, and its documentation.

The names come from the Rust traits ``MarlinExpertStack<B>`` and ``Linear<B>`` of ferrum-kernels.
A *buffer* is an array of the backend's own type: an ``ndarray`` on the CPU, a ``pyopencl.array.Array``
on OpenCL. Activations are float32, float16 or bfloat16 (``ml_dtypes.bfloat16`` in NumPy), row-major and
contiguous.

A call checks all its arguments before it does any work: a call that raises has changed neither its
outputs nor its context.

``docs/adding-a-backend.md`` has a complete small backend. :mod:`marlin_cy.command_line` documents what a backend
may add to the commands.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from marlin_cy.arguments import integer, sequence
from marlin_cy.command_line import CommandLine
from marlin_cy.decoder.operations import DecoderOperations
from marlin_cy.errors import UnsupportedError
from marlin_cy.formats import gptq
from marlin_cy.stacks.interface import Buffer, Dispatches, Linear, MarlinExpertStack, StackBuilder, WeightMetadata
from marlin_cy.stacks.moe_plan import MoePlan
from marlin_cy.weights.sizes import checked_group_size, g_idx_per_expert

if TYPE_CHECKING:
    import argparse

    from marlin_cy.commands.measure import LayerMeasurement
    from marlin_cy.decoder.plan import DecoderPlan
    from marlin_cy.decoder.program import DecoderProgram
    from marlin_cy.moe.routing import Routing
    from marlin_cy.weights.packed_tiles import PackedTiles

__all__ = [
    "Backend",
    "Buffer",
    "Context",
    "Dispatches",
    "Linear",
    "MarlinExpertStack",
    "MoePlan",
    "StackBuilder",
    "WeightMetadata",
]


class Context(ABC):
    """The threads or the command queue that calls use, and the workspace that they share.

    One thread may use a context at a time; a second one gets :class:`~marlin_cy.errors.ContextInUse`. Any number
    of contexts may exist, and run at once. The workspace grows on demand; every stack that is given the context
    uses it.
    """

    @property
    @abstractmethod
    def backend(self) -> Backend:
        """The backend whose :meth:`Backend.new_context` made the context."""


class Backend(DecoderOperations, CommandLine, ABC):
    """A kind of device: makes contexts, buffers and weights, and runs MoE layers."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the backend: ``"cpu"``, ``"opencl"``."""

    @property
    def has_shards(self) -> bool:
        """Whether layers and models may be shared out over the hosts of a :class:`~marlin_cy.distributed.Group`."""
        return False

    @abstractmethod
    def new_context(self, *args: Any, **options: Any) -> Context:
        """A context. Each backend documents its own options, all of which are keywords."""
        # With `*args` and `**options` of type Any, type checkers accept any parameters of a subclass's method.

    @abstractmethod
    def from_host(self, array: npt.NDArray[Any]) -> Buffer:
        """A buffer with the values of ``array``; where buffers are ndarrays, it may be ``array`` itself."""

    @abstractmethod
    def to_host(self, buffer: Buffer) -> npt.NDArray[Any]:
        """The values of ``buffer`` as an ndarray, after all work enqueued on ``buffer`` has finished."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        """An uninitialised buffer."""

    @abstractmethod
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
        """A builder for a stack whose weights arrive one by one.

        Parameters
        ----------
        num_experts, k, n_per_expert : int
        group_size : int
            As in :meth:`load_gptq`.
        g_idx : int32 ``[k]``, or a sequence of ``num_experts`` of these (or None), optional
            Group of each row of K: one array for all experts, or one for each expert.
        codes : str
            A row of :data:`marlin_cy.weights.code_types.CODE_TYPES`: the values that the codes stand for.
        scales : str or dtype
            A row of :data:`marlin_cy.weights.scale_records.SCALE_RECORDS`: what a group stores beside its codes. A
            dtype is the record of scales of this dtype with zero points.

        Raises
        ------
        TypeError, ValueError, IndexError
            An argument that no weight can have.
        UnsupportedError
            The backend has no kernels for such weights.
        """

    @abstractmethod
    def route(self, ctx: Context, router_logits: Buffer, routing: Routing) -> tuple[Buffer, Buffer]:
        """The experts of each token and their weights, as :class:`~marlin_cy.moe.routing.Routing` defines them.

        Parameters
        ----------
        ctx : Context
        router_logits : buffer ``[tokens, num_experts]``
            float32, float16 or bfloat16; not checked before.
        routing : Routing

        Returns
        -------
        topk_ids : int32 buffer ``[tokens, top_k]``
        topk_weights : float32 buffer ``[tokens, top_k]``
        """

    @abstractmethod
    def moe_forward(
        self,
        ctx: Context,
        plan: MoePlan,
        hidden_states: Buffer,
        out: Buffer,
        router_logits: Buffer | None,
        topk_ids: Buffer | None,
        topk_weights: Buffer | None,
    ) -> None:
        """Write a MoE layer's output, as :class:`~marlin_cy.moe.MoeLayer` defines it, to ``out``.

        Either ``router_logits`` is given, or ``topk_ids`` and ``topk_weights`` are.

        Parameters
        ----------
        ctx : Context
        plan : MoePlan
            Its stacks may belong to another backend: check their types.
        hidden_states : buffer ``[tokens, hidden_size]``
            float32, float16 or bfloat16; not checked before.
        out : buffer ``[tokens, hidden_size]``
            Of any of these dtypes; not checked before.
        router_logits : buffer ``[tokens, num_experts]`` or None
            Of any of these dtypes; not checked before.
        topk_ids, topk_weights : buffer ``[tokens, any number]`` or None
            As :meth:`topk_arguments` returned them.
        """

    def topk_arguments(
        self, topk_ids: Any, topk_weights: Any, num_experts: int
    ) -> tuple[Buffer | npt.NDArray[np.int32], Buffer | npt.NDArray[np.float32]]:
        """Check the experts and weights that a caller chose, and copy them where they are on the host.

        Parameters
        ----------
        topk_ids, topk_weights
            The arguments of :meth:`~marlin_cy.moe.MoeLayer.forward_routed`.
        num_experts : int

        Returns
        -------
        topk_ids, topk_weights
            Passed to :meth:`moe_forward`. Unless a backend overrides this method, they are ndarrays, int32 and
            float32 ``[tokens, any number]``, and each id is -1 to ``num_experts - 1``.

        Raises
        ------
        TypeError, ValueError, IndexError
            The message names the argument.
        """
        from marlin_cy.moe.topk_arguments import as_topk

        return as_topk(topk_ids, topk_weights, num_experts)

    def linear_of(self, stack: MarlinExpertStack, bias: npt.ArrayLike | None) -> Linear:
        """A linear layer over all columns of a stack of one expert, with ``bias`` (``[n_per_expert]`` or None)."""
        return stack.make_expert_linear(0, stack.n_per_expert, bias)

    def stack_from_packed(
        self, packed: PackedTiles, columns: Sequence[tuple[int, int]] | None = None
    ) -> MarlinExpertStack | None:
        """A stack that uses the tiles of a packed folder in place, or None if the backend cannot.

        If the result is None, the caller unpacks the tiles and passes them to a :meth:`new_stack_builder`.

        Parameters
        ----------
        packed : PackedTiles
            ``data`` is mapped from a file, and stays valid as long as something refers to it.
        columns : one or two pairs of int, optional
            Use only the columns ``begin`` to ``end - 1`` of each pair, and do not read the others. They begin at tiles,
            and all but the last end with a tile. Passed only if :attr:`has_shards`.
        """
        return None

    def new_decoder(
        self, ctx: Context, plan: DecoderPlan, num_pages: int, num_states: int, cache_dtype: str
    ) -> DecoderProgram:
        """A program for a whole model, and the memory of its cache.

        Parameters
        ----------
        ctx : Context
            The program's steps use it.
        plan : DecoderPlan
            Its quantised weights belong to this backend. The program refers to its arrays.
        num_pages : int
            Pages of the cache, of :data:`~marlin_cy.decoder.program.PAGE_TOKENS` positions each.
        num_states : int
            Slots of recurrent state; 0 if no layer has recurrent state.
        cache_dtype : {"float16", "bfloat16", "float32"}
            Dtype of keys and values in the cache.

        Raises
        ------
        UnsupportedError
            The backend has no decoder, or not for this plan.
        MemoryError
            The cache does not fit into memory.
        """
        raise UnsupportedError(f"the {self.name} backend has no decoder for whole models")

    def context_from_arguments(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """The options of :meth:`new_context`, from a command line with the options of :meth:`add_arguments`."""
        return {}

    def describe(self, ctx: Context) -> str:
        """A short description of a context's device and settings."""
        return self.name

    def layer_measurement(self, arguments: argparse.Namespace) -> LayerMeasurement:
        """How ``marlin-cy run`` measures a layer; by default, by the time until the output is on the host."""
        from marlin_cy.commands.measure import LayerMeasurement

        return LayerMeasurement(self, self.new_context(**self.context_from_arguments(arguments)))

    def load_gptq(
        self,
        qweight: npt.NDArray[Any],
        scales: npt.NDArray[Any],
        qzeros: npt.NDArray[Any],
        g_idx: npt.NDArray[Any] | None = None,
        bias: npt.ArrayLike | None = None,
        *,
        bits: int,
        group_size: int,
        k: int,
        n: int,
        checkpoint_format: str = "gptq",
    ) -> Linear:
        """One projection from GPTQ tensors on the host.

        Parameters
        ----------
        qweight : int32 ``[k * bits / 32, n]``
            Lowest bits first along K.
        scales : float16, bfloat16 or float32 ``[k/group_size, n]``
            Finite. They are kept exactly.
        qzeros : int32 ``[k/group_size, n * bits / 32]``
            Lowest bits first along N; stored minus one when ``checkpoint_format`` is ``"gptq"``.
        g_idx : int32 ``[k]``, optional
            Group of each row of K.
        bias : array ``[n]``, optional
            Added to every row, in float32.
        bits : int
            4 or 8; anything else is an :class:`~marlin_cy.errors.UnsupportedError`.
        group_size : int
            32, 64, a multiple of 128, or -1 for one group of all of K; with 8 bits also 16.
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
            1, k, n, group_size=weight.group_size, g_idx=weight.g_idx, codes=weight.codes, scales=weight.scales
        )
        builder.add(0, 0, weight)
        return self.linear_of(builder.finish(), bias)

    def load_gptq_stacked(
        self,
        qweights: Sequence[npt.NDArray[Any]] | npt.NDArray[Any],
        scales: Sequence[npt.NDArray[Any]] | npt.NDArray[Any],
        qzeros: Sequence[npt.NDArray[Any]] | npt.NDArray[Any],
        g_idx: npt.NDArray[Any] | Sequence[npt.NDArray[Any] | None] | None = None,
        *,
        bits: int,
        group_size: int,
        k: int,
        n_per_expert: int,
        checkpoint_format: str = "gptq",
    ) -> MarlinExpertStack:
        """A stack from GPTQ tensors on the host, one entry for each expert.

        Parameters
        ----------
        qweights, scales, qzeros : sequences of arrays, or arrays with a leading axis of experts
            Each entry as in :meth:`load_gptq`.
        g_idx : int32 ``[k]``, or a sequence of one (or None) for each expert, optional
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
                    f"{name}: got {len(entries)} entries, expected one per expert: {len(qweights)}, as in qweights"
                )
        if len(qweights) == 0:
            raise ValueError("qweights: got no experts, expected at least one")

        def canonical(expert: int) -> Any:
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
            codes=first.codes,
            scales=first.scales,
        )
        builder.add(0, 0, first)
        for expert in range(1, len(qweights)):
            builder.add(expert, 0, canonical(expert))
        return builder.finish()
