"""Families that no row describes: names and sizes from transformers' own class and its conversion table.

Transformers routes, so that experts' names, widths and activation are all that a whole model needs. A single MoE layer
also needs its routing, so :meth:`~marlin_cy.checkpoints.checkpoint.Checkpoint.moe_layer` refuses such a family.
"""

from __future__ import annotations

import re
from typing import Any

from marlin_cy.activations import ACTIVATIONS
from marlin_cy.checkpoints.families import MoeSpec
from marlin_cy.checkpoints.family_rows import MODULE_EXPERTS, Family
from marlin_cy.errors import UnsupportedError
from marlin_cy.integrations import needs_extra
from marlin_cy.integrations.expert_modules import check_experts, layers_of_experts

with needs_extra():
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

__all__ = ["derived_family"]

Described = tuple[Family, MoeSpec, list[int]]


def derived_family(model: Any, tensor_names: list[str]) -> Described:
    """``(family, sizes, MoE layers)`` of a model on the meta device; its class says what a row would.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tensor_names : list of str
        Of the checkpoint. They tell the name of the MoE block.

    Raises
    ------
    UnsupportedError
        The class has no experts that can be replaced, or computes an activation that this library does not have.
    """
    name, layers = type(model).__name__, layers_of_experts(model)
    if not layers:
        raise UnsupportedError(f"transformers' {name} has no experts that can run packed")
    path = next(iter(layers.values()))
    module = model.get_submodule(path)
    activation = activation_of(path, module)
    names = expert_names(model) or MODULE_EXPERTS
    if not ACTIVATIONS[activation].gated:
        names = {**names, "gate": None}
    family = Family(name, block=block_of(path, names, tensor_names), routes=False, **names)
    experts, first, second = module.down_proj.shape
    hidden, inner = (second, first) if module.is_transposed else (first, second)
    spec = MoeSpec(experts, 1, hidden, inner, activation=activation)
    return family, spec, sorted(layers)


def activation_of(path: str, module: Any) -> str:
    """The activation that a module computes."""
    for activation in ACTIVATIONS:
        try:
            check_experts(path, module, activation)
        except UnsupportedError:
            continue
        return activation
    raise UnsupportedError(f"{path}: {type(module).__name__} computes none of the activations {', '.join(ACTIVATIONS)}")


def expert_names(model: Any) -> dict[str, Any] | None:
    """The names of gate, up and down in checkpoints, by transformers' conversion table; None if it has none."""
    found: dict[str, list[str]] = {}
    for entry in get_model_conversion_mapping(model):
        if isinstance(entry, WeightConverter):
            for target in entry.target_patterns:
                parts = [re.search(r"experts\.\*\.(\w+)\.weight", source) for source in entry.source_patterns]
                if "experts" in target and all(parts):
                    found[target.rpartition(".")[2]] = [part[1] for part in parts if part is not None]
    if len(found.get("gate_up_proj", ())) != 2 or len(found.get("down_proj", ())) != 1:
        return None
    gate, up = found["gate_up_proj"]
    return {"gate": gate, "up": up, "down": found["down_proj"][0]}


def block_of(path: str, names: dict[str, Any] | Any, tensor_names: list[str]) -> str:
    """The name of the MoE block in the files; that of the module if the files have no such experts."""
    first = re.escape(names["gate"] or names["up"])
    pattern = re.compile(rf"(?:^|\.)layers\.\d+\.(?:(.*)\.)?experts\.\d+\.{first}\.")
    for name in tensor_names:
        if match := pattern.search(name):
            return match[1] or ""
    inside = re.search(r"layers\.\d+\.(?:(.*)\.)?experts$", path)
    return (inside[1] or "") if inside else ""
