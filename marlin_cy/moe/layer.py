"""The Mixture-of-Experts layer, on any backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from marlin_cy.activations import ACTIVATIONS
from marlin_cy.arguments import flag, float_vector
from marlin_cy.errors import UnsupportedError
from marlin_cy.interface import Context, MarlinExpertStack, MoePlan
from marlin_cy.moe.routing import Routing

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from marlin_cy.distributed.shard import LayerShard
    from marlin_cy.interface import Backend, Buffer
    from marlin_cy.moe.routing import RoutingOptions

__all__ = ["MoeLayer", "SharedExpert"]


class SharedExpert:
    """An expert that processes every token, in addition to the routed experts.

    Its output for a token ``x`` is added to the output of the routed experts::

        g * ((act(gate) * up) @ W_down)      gate, up = split(x @ W_gate_up)
        g = 1, or 1 / (1 + exp(-(x . gate_weight)))

    Parameters
    ----------
    gate_up, down : MarlinExpertStack
        Stacks of one expert. Their widths are those of :class:`MoeLayer`, except that the intermediate size may
        differ.
    gate_weight : float array ``[k]``, optional
        A finite array on the host, kept as float32. Source: ``shared_expert_gate`` of Qwen2-MoE.
    inner : int, optional
        Intermediate columns of ``gate_up`` if other hosts have the others, see ``shard`` of :class:`MoeLayer`.

    Raises
    ------
    TypeError, ValueError
        An invalid argument. The message names the argument.
    """

    def __init__(
        self,
        gate_up: MarlinExpertStack,
        down: MarlinExpertStack,
        gate_weight: npt.ArrayLike | None = None,
        *,
        inner: int | None = None,
    ) -> None:
        check_stacks(gate_up, down, inner=inner)
        if gate_up.num_experts != 1:
            raise ValueError(f"gate_up: got {gate_up.num_experts} experts, expected 1")
        self.gate_up, self.down = gate_up, down
        self.gate_weight: npt.NDArray[np.float32] | None = None
        if gate_weight is not None:
            self.gate_weight = float_vector("gate_weight", gate_weight, gate_up.k)

    def __repr__(self) -> str:
        return f"SharedExpert({self.gate_up.k} -> {self.down.k} -> {self.down.n_per_expert})"


class MoeLayer:
    """Route tokens to experts, run the experts, and sum their weighted outputs.

    For each token ``x`` with selected experts ``e_j`` and weights ``w_j``::

        gate, up = split(x @ W_gate_up[e_j])
        out = sum_j w_j * ((act(gate) * up) @ W_down[e_j])         shared expert first, then j in ascending order

    :class:`~marlin_cy.moe.routing.Routing` documents how experts and weights are selected; this class takes its
    parameters. The activations have the names and formulas of transformers and vLLM:

    ==============  ==============================================================================
    "silu"          ``gate / (1 + exp(-gate)) * up``
    "gelu"          ``gate * 0.5 * (1 + erf(gate / sqrt(2))) * up``
    "gelu_tanh"     ``gate * 0.5 * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 * gate**3))) * up``
    "swigluoai"     with ``gate = min(gate, 7)`` and ``up = min(max(up, -7), 7)``:
                    ``gate / (1 + exp(-1.702 * gate)) * (up + 1)``. Source: gpt-oss.
    "silu_clamp10"  "silu" with ``gate = min(gate, 10)`` and ``up = min(max(up, -10), 10)``. Source: DeepSeek-V4.
    "relu2"         ``max(up, 0) ** 2``. The first product has up columns alone. Source: Nemotron-H.
    ==============  ==============================================================================

    The bias of ``gate_up``, if any, is added before the activation. The bias of ``down`` is added before the
    expert's output is multiplied by its weight.

    Parameters
    ----------
    gate_up : MarlinExpertStack
        ``[k, 2 * intermediate]`` for each expert: gate columns first, then up columns. ``[k, intermediate]`` if the
        activation has no gate.
    down : MarlinExpertStack
        ``[intermediate, k]`` for each expert.
    top_k : int
        Number of experts for each token.
    activation : {"silu", "gelu", "gelu_tanh", "swigluoai", "silu_clamp10", "relu2"}
    apply_router_weight_on_input : bool
        Multiply a token by its weight before the first product instead of after the second. ``top_k`` must
        be 1. Source: vLLM's argument of that name, for Llama 4.
    shared_expert : SharedExpert, optional
        Its output is added. It uses the same backend and the same activation.
    shard : LayerShard, optional
        The stacks have this host's columns. :func:`~marlin_cy.open_checkpoint` and
        :meth:`marlin_cy.distributed.Group.layer` make such layers.
    norm_topk_prob, scoring, correction_bias, num_groups, topk_groups, group_score, routed_scaling_factor, expert_scale,
    mixer_jitter
        As in :class:`~marlin_cy.moe.routing.Routing`.

    Raises
    ------
    TypeError, ValueError
        Stacks whose sizes do not match, or invalid routing parameters.
    UnsupportedError
        An unknown activation.
    """

    def __init__(
        self,
        gate_up: MarlinExpertStack,
        down: MarlinExpertStack,
        *,
        top_k: int,
        activation: str = "silu",
        apply_router_weight_on_input: bool = False,
        shared_expert: SharedExpert | None = None,
        shard: LayerShard | None = None,
        **routing: Unpack[RoutingOptions],
    ) -> None:
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise UnsupportedError(f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        gated = ACTIVATIONS[activation].gated
        check_stacks(gate_up, down, gated, None if shard is None else shard.width(shard.inner))
        selection = Routing(gate_up.num_experts, top_k, **routing)
        on_input = flag("apply_router_weight_on_input", apply_router_weight_on_input)
        if on_input and selection.top_k != 1:
            raise ValueError(f"apply_router_weight_on_input: got top_k {selection.top_k}, expected 1")
        if shared_expert is not None:
            if not isinstance(shared_expert, SharedExpert):
                raise TypeError(f"shared_expert: got {type(shared_expert).__name__}, expected a SharedExpert")
            widths = shared_expert.gate_up.k, shared_expert.down.n_per_expert
            inner = None if shard is None or shard.shared is None else shard.width(shard.shared)
            check_stacks(shared_expert.gate_up, shared_expert.down, gated, inner)
            if widths != (gate_up.k, down.n_per_expert):
                raise ValueError(
                    f"shared_expert: got {widths[0]} -> {widths[1]}, expected {gate_up.k} -> {down.n_per_expert}"
                )
        self._plan = MoePlan(gate_up, down, selection, activation, on_input, shared_expert, shard)

    @classmethod
    def of_plan(cls, plan: MoePlan) -> MoeLayer:
        """A layer of a plan that was checked."""
        layer = cls.__new__(cls)
        layer._plan = plan
        return layer

    def __repr__(self) -> str:
        return (
            f"MoeLayer({self.num_experts} experts, top {self.top_k}, "
            f"{self.hidden_size} -> {self.intermediate_size} -> {self._plan.output_size})"
        )

    @property
    def plan(self) -> MoePlan:
        """The layer as backends take it."""
        return self._plan

    @property
    def gate_up(self) -> MarlinExpertStack:
        """The stack of the first product."""
        return self._plan.gate_up

    @property
    def down(self) -> MarlinExpertStack:
        """The stack of the second product."""
        return self._plan.down

    @property
    def has_bias(self) -> bool:
        """Whether one of the products of routed experts has a bias."""
        return any(getattr(stack, "bias", None) is not None for stack in (self.gate_up, self.down))

    @property
    def routing(self) -> Routing:
        """How experts and weights are chosen."""
        return self._plan.routing

    @property
    def activation(self) -> str:
        """Name of the activation."""
        return self._plan.activation

    @property
    def apply_router_weight_on_input(self) -> bool:
        """Whether a token's weight multiplies the token, not the expert's output."""
        return self._plan.apply_router_weight_on_input

    @property
    def shared_expert(self) -> SharedExpert | None:
        """The expert that every token goes to, or None."""
        return self._plan.shared_expert

    @property
    def top_k(self) -> int:
        """Number of experts for each token."""
        return self.routing.top_k

    @property
    def norm_topk_prob(self) -> bool:
        """Whether the weights of a token are normalised to a sum of 1."""
        return self.routing.norm_topk_prob

    @property
    def num_experts(self) -> int:
        """Number of routed experts."""
        return self.gate_up.num_experts

    @property
    def hidden_size(self) -> int:
        """Width of a token."""
        return self.gate_up.k

    @property
    def intermediate_size(self) -> int:
        """Width between the two products."""
        return self.down.k

    def __call__(
        self, ctx: Context, hidden_states: Buffer, router_logits: Buffer, *, out: Buffer | None = None
    ) -> Buffer:
        """Route by ``router_logits`` and run the experts.

        Parameters
        ----------
        ctx : Context
        hidden_states : buffer ``[tokens, hidden_size]``
            float32, float16 or bfloat16.
        router_logits : buffer ``[tokens, num_experts]``
            float32, float16 or bfloat16. A NaN or a positive infinity makes the token's output NaN.
        out : buffer ``[tokens, hidden_size]``, optional
            Receives the result; float32, float16 or bfloat16. By default a new buffer with the dtype of
            ``hidden_states``.

        Returns
        -------
        buffer ``[tokens, hidden_size]``
            ``out``.
        """
        if router_logits is None:
            raise TypeError("router_logits: got None, expected a buffer of the backend")
        backend = backend_of(ctx)
        out = self._output(backend, hidden_states, out)
        backend.moe_forward(ctx, self._plan, hidden_states, out, router_logits, None, None)
        return out

    def forward_routed(
        self, ctx: Context, hidden_states: Buffer, topk_ids: Any, topk_weights: Any, *, out: Buffer | None = None
    ) -> Buffer:
        """Run experts that the caller has selected.

        Parameters
        ----------
        ctx, hidden_states, out
            As in :meth:`__call__`.
        topk_ids : int32 or int64 array ``[tokens, choices]``, or int32 buffer
            Experts of each token. An id of -1 is skipped. Host arrays are copied and checked. Device buffers are
            not read back; the device skips ids that are out of range.
        topk_weights : float array, or float32 buffer ``[tokens, choices]``
            Routing weights, applied without normalisation; on the same device as ``topk_ids``. With
            ``apply_router_weight_on_input``, ``choices`` must be 1.
        """
        backend = backend_of(ctx)
        ids, weights = backend.topk_arguments(topk_ids, topk_weights, self.num_experts)
        if self.apply_router_weight_on_input and ids.shape[1] != 1:
            raise ValueError(
                f"topk_ids: got shape {ids.shape}, expected [tokens, 1], as apply_router_weight_on_input is set"
            )
        out = self._output(backend, hidden_states, out)
        backend.moe_forward(ctx, self._plan, hidden_states, out, None, ids, weights)
        return out

    def route(self, ctx: Context, router_logits: Buffer) -> tuple[Buffer, Buffer]:
        """``(topk_ids, topk_weights)``, int32 and float32 ``[tokens, top_k]``: the routing alone."""
        return backend_of(ctx).route(ctx, router_logits, self.routing)

    def _output(self, backend: Backend, hidden_states: Buffer, out: Buffer | None) -> Buffer:
        if out is not None:
            return out
        shape = getattr(hidden_states, "shape", None)
        if shape is None:
            raise TypeError(f"hidden_states: got {type(hidden_states).__name__}, expected a buffer of the backend")
        if len(shape) != 2:
            raise ValueError(f"hidden_states: got shape {shape}, expected [tokens, {self.hidden_size}]")
        return backend.empty((shape[0], self._plan.output_size), hidden_states.dtype)


def backend_of(ctx: Context) -> Backend:
    """The backend that made a context.

    Raises
    ------
    TypeError
        ``ctx`` is not a :class:`~marlin_cy.Context`.
    """
    if not isinstance(ctx, Context):
        raise TypeError(f"ctx: got {type(ctx).__name__}, expected a Context from a backend's new_context")
    return ctx.backend


def check_stacks(
    gate_up: MarlinExpertStack, down: MarlinExpertStack, gated: bool | None = None, inner: int | None = None
) -> None:
    """Check that two stacks fit as the two products of a layer.

    ``gated``: whether the activation has a gate; None if either will do. ``inner``: intermediate columns of
    ``gate_up``; None for the ``k`` of ``down``.

    Raises
    ------
    TypeError, ValueError
        Naming the stack.
    """
    for name, stack in (("gate_up", gate_up), ("down", down)):
        if not all(hasattr(stack, attribute) for attribute in ("num_experts", "k", "n_per_expert")):
            raise TypeError(f"{name}: got {type(stack).__name__}, expected a MarlinExpertStack")
    if gate_up.num_experts != down.num_experts:
        raise ValueError(f"down: got {down.num_experts} experts, expected {gate_up.num_experts}, as in gate_up")
    width = down.k if inner is None else inner
    if gated is None:
        gated = gate_up.n_per_expert != width
    if gated and gate_up.n_per_expert != 2 * width:
        raise ValueError(
            f"gate_up: got n_per_expert {gate_up.n_per_expert}, expected {2 * width}, twice the k of down: "
            "gate columns, then up columns"
        )
    if not gated and gate_up.n_per_expert != width:
        raise ValueError(
            f"gate_up: got n_per_expert {gate_up.n_per_expert}, expected {width}, the k of down: up columns, as the "
            "activation has no gate"
        )
