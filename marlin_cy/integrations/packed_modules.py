"""The modules of a transformers model that run packed: where they are, and how they are replaced."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from marlin_cy.errors import CheckpointError
from marlin_cy.integrations import needs_extra
from marlin_cy.integrations.expert_modules import (
    WeightedRowsExperts,
    check_experts,
    experts_modules,
    takes_weighted_rows,
)
from marlin_cy.integrations.modules import Contexts, MarlinLinear, array_of, experts_runner, linear_runner, tensor_over

with needs_extra():
    import torch
    from torch import nn
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

if TYPE_CHECKING:
    from marlin_cy.checkpoints.checkpoint import Checkpoint

__all__ = ["PackedModules", "Progress", "linear_modules", "scaled_tensors", "weight_finder"]


def linear_modules(model: Any, checkpoint: Checkpoint) -> tuple[dict[str, str], list[str]]:
    """The quantised linear layers of a checkpoint, as a model has them.

    Layers that transformers ignores, or that only predict further tokens, are left out.

    Returns
    -------
    linears : dict
        ``{name: path}`` of the layers that are linear layers of the model too.
    others : list of str
        The names of those that the model has in another form: routers, embeddings, and layers that transformers merges.

    Raises
    ------
    CheckpointError
        The model has no such weight.
    """
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    state, modules = model.state_dict(), dict(model.named_modules())
    find, linears, others = weight_finder(model, state), {}, []
    for name in checkpoint.linears:
        if checkpoint.is_passed_over(name):
            continue
        weight, converted = find(f"{name}.weight")
        path = weight.removesuffix(".weight")
        if converted is None and type(modules.get(path)) is nn.Linear:
            linears[name] = path
        elif weight in state or converted is not None:
            others.append(name)
        elif not any(re.search(pattern, weight) for pattern in ignored):
            raise CheckpointError(f"{name}: transformers' {type(model).__name__} has no such linear layer")
    return linears, others


def weight_finder(model: Any, state: Mapping[str, Any]) -> Callable[[str], tuple[str, list[str] | None]]:
    """A function that finds the weight of a model for a tensor's name, by transformers' conversion table.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    state : mapping
        Its ``state_dict``.

    Returns
    -------
    callable
        ``find(name)`` is ``(weight, patterns)``. A converter may merge tensors, or split one: then it makes a weight of
        each of the patterns, and ``weight`` is the first. Without a converter, ``patterns`` is None.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]

    def find(name: str) -> tuple[str, list[str] | None]:
        weight, source = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if source is not None:
            return weight, next((entry.target_patterns for entry in converters if source in entry.source_patterns), [])
        # Some renamings, meant for other names, spoil the names of modules.
        return (name if weight not in state and name in state else weight), None

    return find


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

    Parameters
    ----------
    checkpoint : Checkpoint
    tensors : dict of str to torch.Tensor
        The tensors that transformers will load. Quantised weights that do not run packed are added to it, dequantised.
    dtype : torch.dtype
        Of these weights.

    Attributes
    ----------
    linears : dict of str to MarlinLinear
    experts : dict of int to torch.nn.Module
        By layer. They keep their class. Transformers forwards their calls to their attribute ``packed``, through
        the function that ``transformers.py`` registers.
    """

    def __init__(self, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        self._checkpoint, self._tensors, self._dtype = checkpoint, tensors, dtype
        self.linears: dict[str, MarlinLinear] = {}
        self.experts: dict[int, Any] = {}
        self._shapes: dict[str, torch.Size] = {}

    def replace(self, model: Any) -> None:
        """Remove the quantised weights from a model on the meta device, before transformers loads its weights."""
        linears, others = linear_modules(model, self._checkpoint)
        for name in others:
            self._tensors |= dequantized_tensors(self._checkpoint, name, self._dtype)
        self._tensors |= scaled_tensors(self._checkpoint, self._dtype)
        for name, path in linears.items():
            parent, _, attribute = path.rpartition(".")
            parent = model.get_submodule(parent)
            linear = getattr(parent, attribute)
            self._check_bias(name, linear)
            self.linears[name] = MarlinLinear(linear.in_features, linear.out_features)
            setattr(parent, attribute, self.linears[name])
        for layer, path in experts_modules(model, self._checkpoint).items():
            module = model.get_submodule(path)
            check_experts(path, module, self._checkpoint.moe_spec.activation)
            if takes_weighted_rows(module):
                parent, _, attribute = path.rpartition(".")
                module = WeightedRowsExperts(self._checkpoint.moe_spec.num_experts)
                setattr(model.get_submodule(parent), attribute, module)
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
            experts = self._checkpoint.experts(layer)
            if not getattr(module, "has_bias", False) and experts.has_bias:
                block = self._checkpoint.moe_block(layer)
                raise self._error(f"{block}.experts", "they have biases, and the model's experts have none")
            module.packed = experts_runner(experts, contexts)
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


def dequantized_tensors(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A quantised linear layer's dense weight, and its bias unless it is zero, by their names."""
    weight, bias = checkpoint.dequantized(name), f"{name}.bias"
    tensors = {f"{name}.weight": torch.from_numpy(weight).to(dtype)}
    if bias in checkpoint.tensor_names and (values := checkpoint.tensor(bias)).any():
        tensors[bias] = torch.from_numpy(values.astype("float32")).to(dtype)
    return tensors


def scaled_tensors(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights in FP8 and int8 that are not of experts of a packed layer, each element rounded once."""
    packed, like = {*checkpoint.quantized_tensors}, array_of(torch.empty(0, dtype=dtype, device="cpu"))
    return {
        name: tensor_over(checkpoint.scaled.weight(module, like.dtype))
        for module in checkpoint.scaled.scales
        if (name := f"{module}.weight") not in packed and not checkpoint.is_passed_over(name)
    }
