"""A checkpoint whose layers are packed into a model while transformers loads the model's other weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from marlin_cy.errors import CheckpointError
from marlin_cy.integrations import needs_extra
from marlin_cy.integrations.modules import Contexts
from marlin_cy.integrations.packed_modules import PackedModules, Progress, weight_finder

with needs_extra():
    import torch
    from safetensors.torch import save_file

if TYPE_CHECKING:
    from marlin_cy.checkpoints.checkpoint import Checkpoint

__all__ = ["NAME", "Packing", "name_pattern", "packed_names", "quantised_names"]

NAME = "marlin_cy"
"""Name of the experts implementation and of the quantisation method in transformers' registries."""


class Packing:
    """Replaces modules before transformers' loader runs, and fills them afterwards. Each is done once.

    Parameters
    ----------
    checkpoint : Checkpoint
        Without problems. It reports to ``report``.
    tensors : dict of str to torch.Tensor
        Weights for the loader, by their names in the checkpoint. Quantised weights that do not run packed are added
        to it, dequantised.
    dtype : torch.dtype
        Of these weights.
    context_options : dict
        Of the backend's ``new_context``.
    report : Progress
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tensors: dict[str, torch.Tensor],
        dtype: torch.dtype,
        context_options: Mapping[str, Any],
        report: Progress,
    ) -> None:
        self._checkpoint, self._tensors, self._report = checkpoint, tensors, report
        self._contexts = Contexts(checkpoint.backend, context_options)
        self._modules = PackedModules(checkpoint, tensors, dtype)
        self._written: TemporaryDirectory[str] | None = None

    def replace(self, model: Any) -> None:
        """Remove the quantised weights from a model on the meta device, and let the loader pass over them.

        Raises
        ------
        CheckpointError, UnsupportedError
            The model has no such modules; or the files have tensors of quantised layers that the model does not have.
        """
        self._modules.replace(model)
        model.set_experts_implementation(NAME)
        if self._checkpoint.has_own_head:
            untie(model)
        passed_over = model._keys_to_ignore_on_load_unexpected  # None, a list or a set, by the version of transformers
        kind = list if passed_over is None else type(passed_over)
        checkpoint = self._checkpoint
        names = {name for name in checkpoint.tensor_names if checkpoint.is_passed_over(name)}
        names |= quantised_names(checkpoint) - self._tensors.keys()
        patterns = set(map(name_pattern, names))
        refuse_lookalikes(checkpoint, names, patterns, model)
        model._keys_to_ignore_on_load_unexpected = kind([*(passed_over or ()), *patterns])

    def write_tensors(self) -> list[str]:
        """Write the tensors for the loader to a file; an empty list if there are none. :meth:`fill` removes it."""
        if not self._tensors:
            return []
        self._written = TemporaryDirectory()
        file = str(Path(self._written.name) / "dequantised.safetensors")
        save_file(self._tensors, file, metadata={"format": "pt"})
        return [file]

    def fill(self, model: Any) -> None:
        """Pack the layers, and close the checkpoint."""
        if self._written is not None:
            self._written.cleanup()
        self._modules.check_shapes(model)
        self._modules.fill(self._contexts, self._report)
        self._checkpoint.close()
        model.requires_grad_(False)


def untie(model: Any) -> None:
    """Let a model use its own output layer, which was replaced, instead of the embeddings."""
    model.config.tie_word_embeddings = False
    parameters = dict(model.named_parameters(remove_duplicate=False))
    model.all_tied_weights_keys = {
        target: source for target, source in model.all_tied_weights_keys.items() if target in parameters
    }


def name_pattern(name: str) -> str:
    """A regular expression for this name and names that differ from it in numbers only, wherever they begin."""
    pattern = re.sub(r"\d+", r"\\d+", re.escape(name))
    return rf"(?:^|\.){pattern}$"


def refuse_lookalikes(checkpoint: Checkpoint, names: set[str], patterns: set[str], model: Any) -> None:
    """Refuse tensors that ``patterns`` would let transformers pass over, although they are not in ``names``.

    Weights and biases may have the names of quantised ones in other layers: transformers looks for those itself. What
    is left of a layer without its codes is named by the weight that the model then lacks.
    """
    for name in checkpoint.tensor_names:
        if name not in names and not name.endswith((".weight", "bias")) and name_pattern(name) in patterns:
            weight, state = f"{name.rpartition('.')[0]}.weight", model.state_dict()
            if weight_finder(model, state)(weight)[0] in state:
                raise CheckpointError("missing", file=checkpoint.path, tensor=weight)
            raise CheckpointError("the model has no such weight", file=checkpoint.path, tensor=name)


def quantised_names(checkpoint: Checkpoint) -> set[str]:
    """The names of tensors that belong to quantised layers."""
    return packed_names(checkpoint) | {f"{module}.weight" for module in checkpoint.scaled.scales}


def packed_names(checkpoint: Checkpoint) -> set[str]:
    """As :func:`quantised_names`, without the weights that transformers gets dequantised, by the same names."""
    biases = (f"{name}.bias" for name in checkpoint.linears)
    return {*checkpoint.quantized_tensors, *biases, *checkpoint.scaled.scales.values()}
