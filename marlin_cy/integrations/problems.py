"""Why transformers would refuse a checkpoint, by its config and the headers of its files: no weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from marlin_cy.errors import CheckpointError, MarlinError
from marlin_cy.integrations.configs import model_on_meta
from marlin_cy.integrations.expert_modules import check_experts, experts_modules
from marlin_cy.integrations.packed_modules import linear_modules, weight_finder
from marlin_cy.integrations.packing import packed_names

if TYPE_CHECKING:
    from marlin_cy.checkpoints.checkpoint import Checkpoint

__all__ = ["transformers_problems"]


def transformers_problems(checkpoint: Checkpoint) -> list[MarlinError]:
    """Why :func:`~marlin_cy.integrations.transformers.load` would fail, beyond ``Checkpoint.problems``.

    The model's class is built on the meta device. Its weights are compared with the tensors of the checkpoint, by
    transformers' conversion table. What concerns values is not found: biases that are not zero, and the like.
    """
    try:
        return list(_problems(checkpoint, model_on_meta(checkpoint.path)))
    except MarlinError as error:
        return [error]


def _problems(checkpoint: Checkpoint, model: Any) -> Iterator[MarlinError]:
    linears, others = linear_modules(model, checkpoint)
    modules = dict(model.named_modules())
    for name, path in linears.items():
        found, expected = checkpoint.linear_sizes(name), (modules[path].in_features, modules[path].out_features)
        if found != expected:
            reason = f"got {found[0]} to {found[1]} features, expected {expected[0]} to {expected[1]}"
            yield CheckpointError(reason, file=checkpoint.path, tensor=name)
        if modules[path].bias is not None and f"{name}.bias" not in checkpoint.tensor_names:
            yield CheckpointError("missing", file=checkpoint.path, tensor=f"{name}.bias")
    experts = experts_modules(model, checkpoint)
    for path in experts.values():
        check_experts(path, modules[path], checkpoint.moe_spec.activation)
    packed = tuple(f"{path}." for path in experts.values())
    state = model.state_dict()
    filled = {f"{path}.{part}" for path in linears.values() for part in ("weight", "bias")}
    for name, target, further, shape in _targets(checkpoint, model, state, others):
        filled |= {target, *further}
        if target not in state:
            if not _is_ignored(target, model._keys_to_ignore_on_load_unexpected):
                reason = f"{type(model).__name__} has no such weight"
                yield CheckpointError(reason, file=checkpoint.path, tensor=name)
        elif shape is not None and shape != tuple(state[target].shape):
            reason = f"got shape {shape}, expected {tuple(state[target].shape)}"
            yield CheckpointError(reason, file=checkpoint.path, tensor=name)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ()) if not checkpoint.has_own_head else set()
    for name in state:
        is_needed = name not in filled and name not in tied and not name.startswith(packed)
        if is_needed and not _is_ignored(name, model._keys_to_ignore_on_load_missing):
            yield CheckpointError("missing", file=checkpoint.path, tensor=name)


def _targets(
    checkpoint: Checkpoint, model: Any, state: dict[str, Any], others: list[str]
) -> Iterator[tuple[str, str, list[str], tuple[int, ...] | None]]:
    """``(name, the model's weight, further weights, shape)`` of each tensor that transformers loads.

    A converter may split a tensor: into the weight, which has the first name, and further ones. It leaves no shape to
    compare.
    """
    find, packed = weight_finder(model, state), packed_names(checkpoint)
    shapes = {
        name: checkpoint.tensor_info(name).shape
        for name in checkpoint.tensor_names
        if name not in packed and not checkpoint.is_passed_over(name)
    }
    shapes |= {f"{name}.weight": checkpoint.linear_sizes(name)[::-1] for name in others}
    for name, shape in shapes.items():
        target, patterns = find(name)
        further = [target.replace(patterns[0], other) for other in patterns[1:]] if patterns else []
        yield name, target, further, shape if patterns is None else None


def _is_ignored(name: str, patterns: Any) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())
