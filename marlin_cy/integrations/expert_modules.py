"""The modules of a transformers model that hold routed experts: where they are, and whether they can run packed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from marlin_cy.activations import ACTIVATIONS
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.integrations import needs_extra

with needs_extra():
    import torch
    from torch import nn

if TYPE_CHECKING:
    from marlin_cy.checkpoints.checkpoint import Checkpoint

__all__ = ["WeightedRowsExperts", "check_experts", "experts_modules", "layers_of_experts", "takes_weighted_rows"]

WEIGHTED_ROWS = ("Llama4TextExperts",)
"""Classes of experts that are called with the rows of all experts, each multiplied by its weight, and no routing."""

PROBED = 24.0
"""The largest magnitude with which an activation is compared: beyond all clamps that models have."""

TOLERANCE = 1e-5
"""Relative to the largest value. Both sides compute in float32 or wider."""


def experts_modules(model: nn.Module, checkpoint: Checkpoint) -> dict[int, str]:
    """``{layer: path}`` of the modules with a model's routed experts, for layers whose experts are quantised.

    Raises
    ------
    CheckpointError
        The model has experts in other layers than the checkpoint.
    """
    found = layers_of_experts(model)
    layers = sorted(checkpoint.moe_layers + checkpoint.dense_moe_layers)
    if sorted(found) != layers:
        raise CheckpointError(
            f"got experts in layers {layers}, but transformers' {type(model).__name__} has them in {sorted(found)}",
            file=checkpoint.path,
        )
    return {layer: found[layer] for layer in checkpoint.moe_layers}


def layers_of_experts(model: nn.Module) -> dict[int, str]:
    """``{layer: path}`` of all modules with routed experts."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        # Transformers' decorator of experts classes sets these attributes.
        if (hasattr(module, "is_transposed") and hasattr(module, "has_bias")) or takes_weighted_rows(module):
            layer = re.search(r"(?:^|\.)layers\.(\d+)\.", path)
            assert layer is not None, path
            found[int(layer[1])] = path
    return found


def takes_weighted_rows(module: nn.Module) -> bool:
    """Whether a module is called as :class:`WeightedRowsExperts` is."""
    return type(module).__name__ in WEIGHTED_ROWS


def check_experts(path: str, module: Any, activation: str) -> None:
    """Refuse experts that compute something else between their two products than an activation of this library.

    The class's own function is called with some numbers, so a class that overrides it is found too.

    Raises
    ------
    UnsupportedError
        The numbers differ, or a norm follows the experts.
    """
    if getattr(module, "has_post_expert_norm", False):
        raise UnsupportedError(f"{path}: experts with a norm are not supported")
    row = ACTIVATIONS[activation]
    if getattr(module, "has_gate", True) != row.gated:
        raise UnsupportedError(f"{path}: {type(module).__name__} computes another activation than {activation!r}")
    points = np.linspace(-PROBED, PROBED, 33)
    gate, up = (array.ravel() for array in np.meshgrid(points, points))
    with torch.device("cpu"), torch.no_grad():
        found = _activated(module, gate, up).double().numpy()
    expected = row.reference(gate, up)
    if not np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max():
        raise UnsupportedError(
            f"{path}: {type(module).__name__} computes another activation than {activation!r}, which the configuration "
            "names"
        )


def _activated(module: Any, gate: Any, up: Any) -> Any:
    """What a module computes from float64 arrays of gates and ups: a tensor."""
    if not getattr(module, "has_gate", True):
        return module.act_fn(torch.from_numpy(up))
    if not hasattr(module, "_apply_gate"):
        return module.act_fn(torch.from_numpy(gate)) * torch.from_numpy(up)
    # In versions of transformers without `is_concatenated`, transposed weights have interleaved gate and up columns.
    concatenated = getattr(module, "is_concatenated", not module.is_transposed)
    columns = np.concatenate([gate, up]) if concatenated else np.stack([gate, up], axis=1).ravel()
    return module._apply_gate(torch.from_numpy(columns)[None])[0]


class WeightedRowsExperts(nn.Module):
    """Experts that are called with the rows of all experts, each multiplied by its weight: Llama-4's.

    Rows that are zero give zeros: the experts have no biases.

    Attributes
    ----------
    packed : callable
        As that of other experts: ``(hidden_states, topk_ids, topk_weights)``.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.packed: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The experts' outputs for ``[num_experts * tokens, hidden_size]``, the rows of one expert after another's."""
        assert self.packed is not None, "packed weights were not set"
        used = hidden_states.any(dim=-1).nonzero()
        ids = used // (len(hidden_states) // self.num_experts)
        out = torch.zeros_like(hidden_states)
        out[used[:, 0]] = self.packed(hidden_states[used[:, 0]], ids, torch.ones(ids.shape))
        return out
