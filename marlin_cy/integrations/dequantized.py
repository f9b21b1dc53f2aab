"""A checkpoint's model with dense weights, run by PyTorch alone: what the packed one is held against.

The weights come from canonical form, as every backend's do. Here the backend keeps them dense, and cannot compute.
"""

import numpy as np

from marlin_cy.checkpoints.checkpoint import open_checkpoint
from marlin_cy.errors import UnsupportedError
from marlin_cy.integrations import needs_extra
from marlin_cy.integrations.transformers import dense_tensors, experts_modules, load_dense, model_on_meta
from marlin_cy.interface import Backend
from marlin_cy.reference import dequantize_weight
from marlin_cy.stacks.builder import CheckedStackBuilder, as_bias, checked_stack_sizes

with needs_extra():
    import torch

__all__ = ["dequantized_model"]


def dequantized_model(path, dtype=torch.float32):
    """A checkpoint folder as a transformers model with dense weights of a dtype.

    Parameters
    ----------
    path : path-like
        As for :func:`marlin_cy.open_checkpoint`.
    dtype : torch.dtype
        float64 and float32 hold every weight exactly; float16 and bfloat16 round it.

    Returns
    -------
    transformers.PreTrainedModel
        As transformers would load it from a checkpoint of dense weights, in evaluation mode.

    Raises
    ------
    CheckpointError, UnsupportedError
        As :func:`marlin_cy.integrations.transformers.load`.
    """
    with open_checkpoint(path, DenseBackend()) as checkpoint:
        tensors = dense_tensors(checkpoint)
        for name in checkpoint.linears:
            linear = checkpoint.linear(name)
            tensors[f"{name}.weight"] = torch.from_numpy(linear.weight.T).to(dtype)
            if linear.bias is not None and linear.bias.any():
                tensors[f"{name}.bias"] = torch.from_numpy(linear.bias)
        skeleton = model_on_meta(checkpoint)
        for layer, module in experts_modules(skeleton, checkpoint).items():
            loaded = checkpoint.moe_layer(layer, shared_expert=False)
            for name, array in experts_weights(loaded, skeleton.get_submodule(module)).items():
                tensors[f"{module}.{name}"] = torch.from_numpy(array).to(dtype)
        return load_dense(checkpoint, tensors, dtype, experts_implementation="eager")


def experts_weights(layer, module):
    """A MoE layer's weights and biases, dense, by the names and in the order of a module of transformers."""
    gate_up, down = [layer.gate_up.weight, layer.gate_up.bias], [layer.down.weight, layer.down.bias]
    # Before transformers said so of its experts, those with transposed weights had them interleaved.
    if not getattr(module, "is_concatenated", not module.is_transposed):
        gate_up = [None if array is None else interleaved(array) for array in gate_up]
    weights = {}
    for name, (weight, bias) in (("gate_up_proj", gate_up), ("down_proj", down)):
        weights[name] = weight if module.is_transposed else np.swapaxes(weight, 1, 2)
        if module.has_bias:
            weights[f"{name}_bias"] = np.zeros_like(weight[:, 0]) if bias is None else bias
    return weights


def interleaved(array):
    """Gate and up columns taken in turn, from those of gate and then those of up."""
    gate, up = np.split(array, 2, axis=-1)
    return np.stack([gate, up], axis=-1).reshape(array.shape)


class DenseLinear:
    """A dense weight ``[in_features, out_features]``, and a bias ``[out_features]`` or None."""

    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias


class DenseStack:
    """Dense weights, float32 ``[num_experts, k, n_per_expert]``, and a bias ``[num_experts, n_per_expert]`` or None."""

    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias
        self.num_experts, self.k, self.n_per_expert = weight.shape


class DenseStackBuilder(CheckedStackBuilder):
    """Expands weights. A scale of 16 bits times a code less a zero point of 5 is exact in float32."""

    def __init__(self, num_experts, k, n_per_expert, *rest):
        super().__init__(num_experts, k, n_per_expert, *rest)
        self._weight = np.empty((num_experts, k, n_per_expert), np.float32)

    def _pack(self, expert, column_offset, weight):
        self._weight[expert, :, column_offset : column_offset + weight.n] = dequantize_weight(weight)

    def _stack(self, bias):
        return DenseStack(self._weight, bias)


class DenseBackend(Backend):
    """Takes weights and gives them back dense."""

    name = "dense"

    def new_stack_builder(
        self, num_experts, k, n_per_expert, *, group_size, g_idx=None, codes="uint4", scale_dtype=np.float16
    ):
        return DenseStackBuilder(
            *checked_stack_sizes(num_experts, k, n_per_expert, group_size, g_idx, codes, scale_dtype)
        )

    def linear_of(self, stack, bias):
        bias = None if bias is None else as_bias(bias, (stack.n_per_expert,))
        return DenseLinear(stack.weight[0], bias if stack.bias is None else stack.bias[0])

    def _refuse(self, *args, **kwargs):
        raise UnsupportedError("backend 'dense': it keeps weights, and computes nothing")

    new_context = from_host = to_host = empty = route = topk_arguments = moe_forward = _refuse
