"""The Mixture-of-Experts layer, on any backend."""

from marlin_cy.arguments import integer
from marlin_cy.errors import UnsupportedError
from marlin_cy.interface import Context

__all__ = ["ACTIVATIONS", "MoeLayer"]

ACTIVATIONS = ("silu",)


class MoeLayer:
    """Route tokens, run their experts, and combine what these give.

    For each token with chosen experts ``e_j`` and weights ``w_j``::

        gate, up = split(x @ W_gate_up[e_j])
        out = sum_j w_j * ((silu(gate) * up) @ W_down[e_j])        j in ascending order

    Routing is a softmax over all experts' logits, then the ``top_k`` largest probabilities (of equal
    ones the smaller index), then, with ``norm_topk_prob``, division by their sum.

    Parameters
    ----------
    gate_up : MarlinExpertStack
        ``[k, 2 * intermediate]`` an expert: gate columns first, then up columns.
    down : MarlinExpertStack
        ``[intermediate, k]`` an expert.
    top_k : int
        Experts a token.
    activation : {"silu"}
    norm_topk_prob : bool
        Whether a token's weights are made to sum to 1.

    Raises
    ------
    ValueError
        Stacks that do not fit each other, or ``top_k`` out of range.
    UnsupportedError
        An activation that is not known.
    """

    def __init__(self, gate_up, down, *, top_k, activation="silu", norm_topk_prob=True):
        if activation not in ACTIVATIONS:
            raise UnsupportedError(f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
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
        top_k = integer("top_k", top_k)
        if not 1 <= top_k <= gate_up.num_experts:
            raise ValueError(f"top_k: got {top_k}, expected 1 to {gate_up.num_experts}, the number of experts")
        self.gate_up, self.down = gate_up, down
        self.top_k, self.activation, self.norm_topk_prob = top_k, activation, bool(norm_topk_prob)

    def __repr__(self):
        return (
            f"MoeLayer({self.num_experts} experts, top {self.top_k}, "
            f"{self.hidden_size} -> {self.intermediate_size} -> {self.down.n_per_expert})"
        )

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
        backend._moe_forward(ctx, self, hidden_states, out, router_logits, None, None)
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
            Their weights, used as they are; where the ids are.
        """
        backend = backend_of(ctx)
        ids, weights = backend._topk(topk_ids, topk_weights, self.num_experts)
        out = self._output(backend, hidden_states, out)
        backend._moe_forward(ctx, self, hidden_states, out, None, ids, weights)
        return out

    def route(self, ctx, router_logits):
        """``(topk_ids, topk_weights)``, int32 and float32 ``[tokens, top_k]``: the routing alone."""
        return backend_of(ctx)._route(ctx, router_logits, self.num_experts, self.top_k, self.norm_topk_prob)

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
