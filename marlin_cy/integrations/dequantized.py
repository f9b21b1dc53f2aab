"""A checkpoint's model with dense weights, run by PyTorch alone: the reference for the packed model.

The weights come from canonical form, as in every backend. The backend of this module stores them dense and
cannot compute.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from marlin_cy.checkpoints.checkpoint import open_checkpoint
from marlin_cy.errors import UnsupportedError
from marlin_cy.integrations import needs_extra
from marlin_cy.integrations.configs import model_on_meta
from marlin_cy.integrations.expert_modules import experts_modules
from marlin_cy.integrations.packed_modules import scaled_tensors
from marlin_cy.integrations.transformers import dense_tensors, load_dense
from marlin_cy.interface import Backend, MarlinExpertStack
from marlin_cy.reference import dequantize_weight
from marlin_cy.stacks.builder import CheckedStackBuilder, StackSizes, as_bias, checked_stack_sizes

with needs_extra():
    import torch

if TYPE_CHECKING:
    import transformers

    from marlin_cy.moe.layer import MoeLayer
    from marlin_cy.weights.canonical import CanonicalWeight

__all__ = ["dequantized_model"]

Floats = npt.NDArray[np.float32]


def dequantized_model(path: str | PathLike[str], dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """Load a checkpoint folder as a transformers model with dense weights.

    Parameters
    ----------
    path : path-like
        As for :func:`marlin_cy.open_checkpoint`.
    dtype : torch.dtype
        float64 and float32 represent every weight exactly; float16 and bfloat16 round.

    Returns
    -------
    transformers.PreTrainedModel
        The model that transformers loads from a checkpoint of dense weights, in evaluation mode.

    Raises
    ------
    CheckpointError, UnsupportedError
        As :func:`marlin_cy.integrations.transformers.load`.
    """
    with open_checkpoint(path, DenseBackend()) as checkpoint:
        tensors = dense_tensors(checkpoint)
        for name in checkpoint.linears:
            if checkpoint.is_passed_over(name):
                continue
            linear = cast(DenseLinear, checkpoint.linear(name))
            tensors[f"{name}.weight"] = torch.from_numpy(linear.weight.T).to(dtype)
            if linear.bias is not None and linear.bias.any():
                tensors[f"{name}.bias"] = torch.from_numpy(linear.bias)
        tensors |= scaled_tensors(checkpoint, dtype)
        skeleton = model_on_meta(checkpoint.path)
        for layer, module in experts_modules(skeleton, checkpoint).items():
            loaded = checkpoint.experts(layer)
            for name, array in experts_weights(loaded, skeleton.get_submodule(module)).items():
                tensors[f"{module}.{name}"] = torch.from_numpy(array).to(dtype)
        return load_dense(checkpoint, tensors, dtype, experts_implementation="eager")


def experts_weights(layer: MoeLayer, module: Any) -> dict[str, Floats]:
    """Dense weights and biases of a MoE layer, by the names and in the order of a module of transformers."""
    # In versions of transformers without `is_concatenated`, transposed weights have interleaved gate and up columns.
    concatenated = getattr(module, "is_concatenated", not module.is_transposed)
    weights: dict[str, Floats] = {}
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    for name, stack in ((first, layer.gate_up), ("down_proj", layer.down)):
        dense = cast(DenseStack, stack)  # DenseBackend made it
        weight, bias = dense.weight, np.zeros_like(dense.weight[:, 0]) if dense.bias is None else dense.bias
        if name == "gate_up_proj" and not concatenated:
            weight, bias = interleaved(weight), interleaved(bias)
        weights[name] = weight if module.is_transposed else np.swapaxes(weight, 1, 2)
        if module.has_bias:
            weights[f"{name}_bias"] = bias
    return weights


def interleaved(array: Floats) -> Floats:
    """Alternating gate and up columns, from an array with all gate columns before all up columns."""
    gate, up = np.split(array, 2, axis=-1)
    return np.stack([gate, up], axis=-1).reshape(array.shape)


class DenseLinear:
    """A dense weight ``[in_features, out_features]``, and a bias ``[out_features]`` or None."""

    def __init__(self, weight: Floats, bias: Floats | None) -> None:
        self.weight, self.bias = weight, bias


class DenseStack:
    """Dense weights, float32 ``[num_experts, k, n_per_expert]``, and a bias ``[num_experts, n_per_expert]`` or None."""

    def __init__(self, weight: Floats, bias: Floats | None) -> None:
        self.weight, self.bias = weight, bias
        self.num_experts, self.k, self.n_per_expert = weight.shape


class DenseStackBuilder(CheckedStackBuilder):
    """Expands weights. The product of a 16-bit scale and a code minus a zero point (5 bits) is exact in float32."""

    def __init__(self, sizes: StackSizes) -> None:
        super().__init__(sizes)
        self._weight = np.empty((sizes.num_experts, sizes.k, sizes.n_per_expert), np.float32)

    def _pack(self, expert: int, column_offset: int, weight: CanonicalWeight) -> None:
        self._weight[expert, :, column_offset : column_offset + weight.n] = dequantize_weight(weight)

    def _stack(self, bias: Floats | None) -> Any:
        return DenseStack(self._weight, bias)


class DenseBackend(Backend):
    """Stores weights dense, and refuses everything else."""

    name = "dense"

    def new_stack_builder(
        self,
        num_experts: int,
        k: int,
        n_per_expert: int,
        *,
        group_size: int,
        g_idx: Any = None,
        codes: str = "uint4",
        scales: str | npt.DTypeLike = "float16",
    ) -> DenseStackBuilder:
        return DenseStackBuilder(checked_stack_sizes(num_experts, k, n_per_expert, group_size, g_idx, codes, scales))

    def linear_of(self, stack: MarlinExpertStack, bias: npt.ArrayLike | None) -> Any:
        dense = cast(DenseStack, stack)  # this backend made it
        own = None if bias is None else as_bias(bias, (dense.n_per_expert,))
        return DenseLinear(dense.weight[0], own if dense.bias is None else dense.bias[0])

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError("backend 'dense': it stores weights and does not compute")

    new_context = from_host = to_host = empty = route = topk_arguments = moe_forward = _refuse
