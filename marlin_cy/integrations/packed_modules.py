"""The modules of a transformers model that run packed: where they are, and how they are replaced."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.integrations import needs_extra
from marlin_cy.integrations.modules import Contexts, MarlinLinear, experts_runner, linear_runner

with needs_extra():
    import torch
    from torch import nn
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

if TYPE_CHECKING:
    from marlin_cy.checkpoints.checkpoint import Checkpoint

__all__ = ["PackedModules", "Progress", "experts_modules", "linear_modules"]


def experts_modules(model: nn.Module, checkpoint: Checkpoint) -> dict[int, str]:
    """``{layer: path}`` of the modules with a model's routed experts, for layers whose experts are quantised.

    Raises
    ------
    CheckpointError
        The model has experts in other layers than the checkpoint.
    """
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        # Transformers' decorator of experts classes sets these attributes.
        if hasattr(module, "is_transposed") and hasattr(module, "has_bias"):
            layer = re.search(r"(?:^|\.)layers\.(\d+)\.", path)
            assert layer is not None, path
            found[int(layer[1])] = path
    layers = sorted(checkpoint.moe_layers + checkpoint.dense_moe_layers)
    if sorted(found) != layers:
        raise CheckpointError(
            f"got experts in layers {layers}, but transformers' {type(model).__name__} has them in {sorted(found)}",
            file=checkpoint.path,
        )
    return {layer: found[layer] for layer in checkpoint.moe_layers}


def linear_modules(model: Any, names: Iterable[str]) -> dict[str, str]:
    """``{name: path}``: for each linear layer of a checkpoint, the path of its module in a model.

    Layers that transformers ignores (those of multi-token prediction) are left out.

    Raises
    ------
    CheckpointError
        The model has no such linear layer.
    UnsupportedError
        Transformers merges several such layers into one weight.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    state, modules = model.state_dict(), dict(model.named_modules())
    found = {}
    for name in names:
        weight, converter = rename_source_key(f"{name}.weight", renamings, converters, model.base_model_prefix, state)
        if converter is not None:
            raise UnsupportedError(f"{name}: transformers' {type(model).__name__} merges it with other layers")
        path = weight.removesuffix(".weight")
        if type(modules.get(path)) is nn.Linear:
            found[name] = path
        elif not any(re.search(pattern, weight) for pattern in ignored):
            raise CheckpointError(f"{name}: transformers' {type(model).__name__} has no such linear layer")
    return found


class Progress:
    """Reports the layers that are packed, and the share of the current layer's experts.

    It is the ``progress`` of :func:`~marlin_cy.open_checkpoint`, which calls it for each expert.

    Attributes
    ----------
    parts : int
        Number of layers.
    """

    def __init__(self, progress: Callable[[float, int, str], None] | None) -> None:
        if progress is not None and not callable(progress):
            raise TypeError(f"progress: got {type(progress).__name__}, expected a callable or None")
        self._progress, self.parts, self._finished = progress, 1, 0

    def __call__(self, done: float, total: int, description: str) -> None:
        if self._progress is not None and done < total:
            self._progress(self._finished + done / total, self.parts, description)

    def finish(self, description: str) -> None:
        """Report that a layer is packed."""
        self._finished += 1
        if self._progress is not None:
            self._progress(self._finished, self.parts, description)


class PackedModules:
    """The modules of a model that run packed, by their names in the checkpoint.

    Attributes
    ----------
    linears : dict of str to MarlinLinear
    experts : dict of int to torch.nn.Module
        By layer. They keep their class. Transformers forwards their calls to their attribute ``packed``, through
        the function that ``transformers.py`` registers.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.linears: dict[str, MarlinLinear] = {}
        self.experts: dict[int, Any] = {}
        self._shapes: dict[str, torch.Size] = {}

    def replace(self, model: Any) -> None:
        """Remove the quantised weights from a model on the meta device, before transformers loads its weights."""
        for name, path in linear_modules(model, self._checkpoint.linears).items():
            parent, _, attribute = path.rpartition(".")
            parent = model.get_submodule(parent)
            linear = getattr(parent, attribute)
            self._check_bias(name, linear)
            self.linears[name] = MarlinLinear(linear.in_features, linear.out_features)
            setattr(parent, attribute, self.linears[name])
        for layer, path in experts_modules(model, self._checkpoint).items():
            module = model.get_submodule(path)
            if not getattr(module, "has_gate", True) or getattr(module, "has_post_expert_norm", False):
                raise UnsupportedError(f"{path}: experts without a gate, or with a norm, are not supported")
            for name, _ in list(module.named_parameters(recurse=False)):
                delattr(module, name)
            module._is_hf_initialized = True  # no parameter is left to initialise
            self.experts[layer] = module
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def check_shapes(self, model: nn.Module) -> None:
        """Refuse weights of other shapes than the model's. Older transformers with a quantiser accept them."""
        for name, tensor in model.state_dict().items():
            if tensor.shape != self._shapes[name]:
                raise self._error(name, f"got shape {tuple(tensor.shape)}, expected {tuple(self._shapes[name])}")

    def fill(self, contexts: Contexts, report: Progress) -> None:
        """Pack the layers."""
        report.parts = len(self.linears) + len(self.experts)
        for name, module in self.linears.items():
            linear = self._checkpoint.linear(name)
            got, expected = (linear.in_features, linear.out_features), (module.in_features, module.out_features)
            if got != expected:
                raise self._error(name, f"got {got[0]} to {got[1]} features, expected {expected[0]} to {expected[1]}")
            module.packed = linear_runner(linear, contexts)
            report.finish(name)
        for layer, module in self.experts.items():
            module.packed = experts_runner(self._checkpoint.moe_layer(layer, shared_expert=False), contexts)
            report.finish(f"layer {layer}")

    def _check_bias(self, name: str, module: nn.Linear) -> None:
        """Refuse a bias that only the model or only the checkpoint has, except zeros, which AutoGPTQ always writes."""
        bias = f"{name}.bias"
        has_bias = bias in self._checkpoint.tensor_names
        if module.bias is not None and not has_bias:
            raise self._error(bias, "missing")
        if module.bias is None and has_bias and self._checkpoint.tensor(bias).any():
            raise self._error(bias, "the model's layer has no bias")

    def _error(self, tensor: str, reason: str) -> CheckpointError:
        return CheckpointError(reason, file=self._checkpoint.path, tensor=tensor)
