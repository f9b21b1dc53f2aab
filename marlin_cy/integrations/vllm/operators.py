"""Packed layers as operators of PyTorch, over which ``torch.compile`` passes without looking inside.

vLLM keeps compiled models on disk, and other processes load them. A layer is therefore known by its name, and found in
the context of vLLM's current forward pass, as vLLM does with attention.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context

__all__ = ["dense", "experts", "known_as", "linear"]

LIBRARY = torch.library.Library("marlin_cy_vllm", "FRAGMENT")


def known_as(name: str, method: Any) -> str:
    """Make a layer's method known to the operators of the model that vLLM is making; the name that they take."""
    key = f"{name}.marlin_cy"
    get_current_vllm_config().compilation_config.static_forward_context[key] = method
    return key


def _linear(x: torch.Tensor, key: str, out_features: int) -> torch.Tensor:
    output: torch.Tensor = get_forward_context().no_compile_layers[key].compute(x)
    return output


def _dense(x: torch.Tensor, bias: torch.Tensor | None, key: str, out_features: int) -> torch.Tensor:
    output: torch.Tensor = get_forward_context().no_compile_layers[key].compute(x, bias)
    return output


def _experts(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, key: str) -> torch.Tensor:
    output: torch.Tensor = get_forward_context().no_compile_layers[key].compute(x, topk_ids, topk_weights)
    return output


def _linear_shape(x: torch.Tensor, key: str, out_features: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _dense_shape(x: torch.Tensor, bias: torch.Tensor | None, key: str, out_features: int) -> torch.Tensor:
    return _linear_shape(x, key, out_features)


def _experts_shape(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, key: str) -> torch.Tensor:
    return x.new_empty(x.shape)


LIBRARY.define("linear(Tensor x, str key, SymInt out_features) -> Tensor")
LIBRARY.impl("linear", _linear, "CPU")
LIBRARY.impl("linear", _linear_shape, "Meta")
LIBRARY.define("dense(Tensor x, Tensor? bias, str key, SymInt out_features) -> Tensor")
LIBRARY.impl("dense", _dense, "CPU")
LIBRARY.impl("dense", _dense_shape, "Meta")
LIBRARY.define("experts(Tensor x, Tensor topk_ids, Tensor topk_weights, str key) -> Tensor")
LIBRARY.impl("experts", _experts, "CPU")
LIBRARY.impl("experts", _experts_shape, "Meta")

linear = torch.ops.marlin_cy_vllm.linear
"""``linear(x, key, out_features)``: the output of a linear layer."""

dense = torch.ops.marlin_cy_vllm.dense
"""``dense(x, bias, key, out_features)``: the output of an unquantised layer."""

experts = torch.ops.marlin_cy_vllm.experts
"""``experts(x, topk_ids, topk_weights, key)``: the weighted sum of a layer's routed experts."""
