"""The Mixture-of-Experts layer, on any backend."""

from marlin_cy.activations import ACTIVATIONS
from marlin_cy.arguments import flag, float_vector
from marlin_cy.errors import UnsupportedError
from marlin_cy.interface import Context, MarlinExpertStack, MoePlan
from marlin_cy.moe.routing import Routing

__all__ = ["MoeLayer", "SharedExpert"]


class SharedExpert:
    """An expert that every token goes to, beside the routed ones.

    For one token ``x``, this is added to what the routed experts give::

        g * ((act(gate) * up) @ W_down)      gate, up = split(x @ W_gate_up)
        g = 1, or 1 / (1 + exp(-(x . gate_weight)))

    Parameters
    ----------
    gate_up, down : MarlinExpertStack
        Of one expert each; widths as in :class:`MoeLayer`, but for an intermediate size of its own.
    gate_weight : float array ``[k]``, optional
        On the host; finite, kept as float32. Source: ``shared_expert_gate`` of Qwen2-MoE.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.
    """

    def __init__(self, gate_up, down, gate_weight=None):
        check_stacks(gate_up, down)
        if gate_up.num_experts != 1:
            raise ValueError(f"gate_up: got {gate_up.num_experts} experts, expected one")
        self.gate_up, self.down = gate_up, down
        self.gate_weight = None
        if gate_weight is not None:
            self.gate_weight = float_vector("gate_weight", gate_weight, gate_up.k)

    def __repr__(self):
        return f"SharedExpert({self.gate_up.k} -> {self.down.k} -> {self.down.n_per_expert})"


class MoeLayer:
    """Route tokens, run their experts, and combine what these give.

    For each token with chosen experts ``e_j`` and weights ``w_j``::

        gate, up = split(x @ W_gate_up[e_j])
        out = sum_j w_j * ((act(gate) * up) @ W_down[e_j])         j in ascending order, after the shared expert

    How experts and weights are chosen is documented in :class:`~marlin_cy.moe.routing.Routing`, whose
    parameters this class takes. The activations, with names and formulas as in transformers and vLLM:

    ===========  ==============================================================================
    "silu"       ``gate / (1 + exp(-gate)) * up``
    "gelu"       ``gate * 0.5 * (1 + erf(gate / sqrt(2))) * up``
    "gelu_tanh"  ``gate * 0.5 * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 * gate**3))) * up``
    "swigluoai"  with ``gate = min(gate, 7)`` and ``up = min(max(up, -7), 7)``:
                 ``gate / (1 + exp(-1.702 * gate)) * (up + 1)``. Source: gpt-oss.
    ===========  ==============================================================================

    Where the stacks have a bias, it is added before the activation, and to an expert's output before its
    weight is applied.

    Parameters
    ----------
    gate_up : MarlinExpertStack
        ``[k, 2 * intermediate]`` an expert: gate columns first, then up columns.
    down : MarlinExpertStack
        ``[intermediate, k]`` an expert.
    top_k : int
        Experts a token.
    activation : {"silu", "gelu", "gelu_tanh", "swigluoai"}
    apply_router_weight_on_input : bool
        Multiply a token by its weight before the first product instead of after the second; ``top_k`` must
        be 1. Source: vLLM's argument of that name, for Llama 4.
    shared_expert : SharedExpert, optional
        Added to the output; on the same backend, with the same activation.
    norm_topk_prob, scoring, correction_bias, num_groups, topk_groups, group_score, routed_scaling_factor
        As in :class:`~marlin_cy.moe.routing.Routing`.

    Raises
    ------
    TypeError, ValueError
        Stacks that do not fit each other, or a routing that is none.
    UnsupportedError
        An activation that is not known.
    """

    def __init__(
        self,
        gate_up,
        down,
        *,
        top_k,
        activation="silu",
        apply_router_weight_on_input=False,
        shared_expert=None,
        **routing,
    ):
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise UnsupportedError(f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        check_stacks(gate_up, down)
        routing = Routing(gate_up.num_experts, top_k, **routing)
        on_input = flag("apply_router_weight_on_input", apply_router_weight_on_input)
        if on_input and routing.top_k != 1:
            raise ValueError(f"apply_router_weight_on_input: got top_k {routing.top_k}, expected 1")
        if shared_expert is not None:
            if not isinstance(shared_expert, SharedExpert):
                raise TypeError(f"shared_expert: got {type(shared_expert).__name__}, expected a SharedExpert")
            widths = shared_expert.gate_up.k, shared_expert.down.n_per_expert
            if widths != (gate_up.k, down.n_per_expert):
                raise ValueError(
                    f"shared_expert: got {widths[0]} -> {widths[1]}, expected {gate_up.k} -> {down.n_per_expert}"
                )
        self._plan = MoePlan(gate_up, down, routing, activation, on_input, shared_expert)

    def __repr__(self):
        return (
            f"MoeLayer({self.num_experts} experts, top {self.top_k}, "
            f"{self.hidden_size} -> {self.intermediate_size} -> {self.down.n_per_expert})"
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
    def top_k(self):
        """Experts a token."""
        return self.routing.top_k

    @property
    def norm_topk_prob(self):
        """Whether a token's weights are made to sum to 1."""
        return self.routing.norm_topk_prob

    @property
    def num_experts(self):
        """Experts in the layer."""
        return self.gate_up.num_experts

    @property
    def hidden_size(self):
        """Width of a token."""
        return self.gate_up.k

    @property
    def intermediate_size(self):
        """Width between the two products."""
        return self.down.k

    def __call__(self, ctx, hidden_states, router_logits, *, out=None):
        """Route by ``router_logits`` and run the experts.

        Parameters
        ----------
        ctx : Context
        hidden_states : buffer ``[tokens, hidden_size]``
            float32, float16 or bfloat16.
        router_logits : buffer ``[tokens, num_experts]``
            Of any of these dtypes. A row with a NaN or an infinity of positive sign gives NaN in that row.
        out : buffer ``[tokens, hidden_size]``, optional
            Where to put the result, of any of these dtypes; made like ``hidden_states`` unless given.

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

    def forward_routed(self, ctx, hidden_states, topk_ids, topk_weights, *, out=None):
        """Run the experts that the caller has chosen.

        Parameters
        ----------
        ctx, hidden_states, out
            As when called.
        topk_ids : int32 or int64 array ``[tokens, any number]``, or int32 buffer
            Experts of each token; -1 takes no part. Arrays on the host are checked and copied. A buffer on
            a device is not read back: there, ids out of range take no part either.
        topk_weights : float array, or float32 buffer ``[tokens, any number]``
            Their weights, used as they are; where the ids are. With ``apply_router_weight_on_input`` there is
            one a token.
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

    def route(self, ctx, router_logits):
        """``(topk_ids, topk_weights)``, int32 and float32 ``[tokens, top_k]``: the routing alone."""
        return backend_of(ctx).route(ctx, router_logits, self.routing)

    def _output(self, backend, hidden_states, out):
        if out is not None:
            return out
        shape = getattr(hidden_states, "shape", None)
        if shape is None:
            raise TypeError(f"hidden_states: got {type(hidden_states).__name__}, expected a buffer of the backend")
        if len(shape) != 2:
            raise ValueError(f"hidden_states: got shape {shape}, expected [tokens, {self.hidden_size}]")
        return backend.empty((shape[0], self.down.n_per_expert), hidden_states.dtype)


def backend_of(ctx):
    """The backend that made a context."""
    if not isinstance(ctx, Context):
        raise TypeError(f"ctx: got {type(ctx).__name__}, expected a Context from a backend's new_context")
    return ctx.backend


def check_stacks(gate_up, down):
    """Refuse two stacks that are not the two products of one layer."""
    for name, stack in (("gate_up", gate_up), ("down", down)):
        if not all(hasattr(stack, attribute) for attribute in ("num_experts", "k", "n_per_expert")):
            raise TypeError(f"{name}: got {type(stack).__name__}, expected a MarlinExpertStack")
    if gate_up.num_experts != down.num_experts:
        raise ValueError(f"down: got {down.num_experts} experts, expected {gate_up.num_experts}, as in gate_up")
    if gate_up.n_per_expert != 2 * down.k:
        raise ValueError(
            f"gate_up: got n_per_expert {gate_up.n_per_expert}, expected {2 * down.k}, twice down's k: "
            "gate columns, then up columns"
        )
