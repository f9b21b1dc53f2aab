"""The linear layers of experts, as a checkpoint stores them."""

from __future__ import annotations

from dataclasses import dataclass

from marlin_cy.checkpoints.families import Family, MoeSpec

__all__ = ["ExpertPart", "fused_parts", "separate_parts"]


@dataclass(frozen=True)
class ExpertPart:
    """A linear layer of an expert, as it is stored.

    Attributes
    ----------
    module : str
        The layer's name. If one tensor holds all experts, the name that they share.
    k, n : int
        Input and output width of the stored layer.
    index : int or None
        If one tensor holds all experts: the expert's index on its first axis.
    """

    module: str
    k: int
    n: int
    index: int | None = None


def separate_parts(family: Family, spec: MoeSpec, block: str, expert: int) -> list[ExpertPart]:
    """The parts of an expert whose layers are stored one by one: gate if there is one, up and down."""
    hidden, inter = spec.hidden_size, spec.intermediate_size
    *inner, down = (f"{block}.experts.{expert}.{name}" for name in family.expert_names)
    return [*(ExpertPart(name, hidden, inter) for name in inner), ExpertPart(down, inter, hidden)]


def fused_parts(family: Family, spec: MoeSpec, block: str, expert: int) -> list[ExpertPart]:
    """The parts of an expert whose layers are stored with those of all experts: gate and up, and down."""
    hidden, inter = spec.hidden_size, spec.intermediate_size
    inner = inter if family.gate is None else 2 * inter
    return [
        ExpertPart(f"{block}.experts.{family.gate_up}", hidden, inner, expert),
        ExpertPart(f"{block}.experts.{family.down}", inter, hidden, expert),
    ]
