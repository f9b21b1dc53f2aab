"""A Mixture-of-Experts layer as backends take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from marlin_cy.stacks.interface import MarlinExpertStack

if TYPE_CHECKING:
    from marlin_cy.distributed.shard import LayerShard
    from marlin_cy.moe.layer import SharedExpert
    from marlin_cy.moe.routing import Routing

__all__ = ["MoePlan"]


@dataclass(frozen=True, eq=False)
class MoePlan:
    """A MoE layer as :meth:`marlin_cy.Backend.moe_forward` takes it; :class:`~marlin_cy.moe.MoeLayer` has checked it.

    Attributes
    ----------
    gate_up : MarlinExpertStack
        ``[hidden_size, 2 * intermediate_size]`` for each expert: gate columns, then up columns. Up columns alone if the
        activation has no gate.
    down : MarlinExpertStack
        ``[intermediate_size, hidden_size]`` for each expert.
    routing : Routing
    activation : str
        A name in :data:`marlin_cy.activations.ACTIVATIONS`.
    apply_router_weight_on_input : bool
        The weight of a token multiplies the token, not the expert's output; ``top_k`` is 1.
    shared_expert : SharedExpert or None
        Has ``gate_up``, ``down`` (stacks of one expert) and ``gate_weight``: float32 ``[hidden_size]`` on the
        host, or None.
    shard : LayerShard or None
        The stacks have only some columns; the other hosts of a :class:`~marlin_cy.distributed.Group` have the others.
    """

    gate_up: MarlinExpertStack
    down: MarlinExpertStack
    routing: Routing
    activation: str
    apply_router_weight_on_input: bool
    shared_expert: SharedExpert | None
    shard: LayerShard | None = None

    @property
    def output_size(self) -> int:
        """Width of an output."""
        return self.down.n_per_expert if self.shard is None else int(self.shard.outputs[-1])

    @property
    def num_experts(self) -> int:
        """Number of routed experts."""
        return self.gate_up.num_experts

    @property
    def top_k(self) -> int:
        """Number of experts for each token, where the layer routes."""
        return self.routing.top_k

    @property
    def hidden_size(self) -> int:
        """Width of a token."""
        return self.gate_up.k

    @property
    def intermediate_size(self) -> int:
        """Width between the two products."""
        return self.down.k

    def stacks(self) -> list[tuple[str, MarlinExpertStack]]:
        """``(name, stack)`` of all the layer's stacks."""
        stacks = [("gate_up", self.gate_up), ("down", self.down)]
        if self.shared_expert is not None:
            stacks += [
                ("shared_expert.gate_up", self.shared_expert.gate_up),
                ("shared_expert.down", self.shared_expert.down),
            ]
        return stacks
