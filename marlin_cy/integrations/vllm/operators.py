"""Layers of this library as operators of PyTorch, over which ``torch.compile`` passes without looking inside.

vLLM keeps compiled models on disk, and other processes load them. A layer is therefore known by its name, and found in
the context of vLLM's current forward pass, as vLLM does with attention.

Operators read and write tensors in place. A call has few steps in Python: the weights of a layer have just gone through
the CPU's caches, so that each step waits for memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context

from marlin_cy.cpu._buffers import accept_tensors

__all__ = ["experts", "known_as", "linear", "routed_experts"]

LIBRARY = torch.library.Library("marlin_cy_vllm", "FRAGMENT")

accept_tensors(torch.Tensor, {getattr(torch, name): name for name in ("float32", "float16", "bfloat16")})


def known_as(name: str, method: Any) -> str:
    """Make a layer's method known to the operators of the model that vLLM is making; the name that they take."""
    key = f"{name}.marlin_cy"
    get_current_vllm_config().compilation_config.static_forward_context[key] = method
    return key


def _linear(x: torch.Tensor, bias: torch.Tensor | None, key: str, out_features: int) -> torch.Tensor:
    output: torch.Tensor = get_forward_context().no_compile_layers[key].compute(x, bias)
    return output


def _experts(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, key: str) -> torch.Tensor:
    output: torch.Tensor = get_forward_context().no_compile_layers[key].compute(x, topk_ids, topk_weights)
    return output


def _routed_experts(x: torch.Tensor, router_logits: torch.Tensor, key: str) -> torch.Tensor:
    output: torch.Tensor = get_forward_context().no_compile_layers[key].route_and_compute(x, router_logits)
    return output


def _linear_shape(x: torch.Tensor, bias: torch.Tensor | None, key: str, out_features: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _experts_shape(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, key: str) -> torch.Tensor:
    return x.new_empty(x.shape)


def _routed_experts_shape(x: torch.Tensor, router_logits: torch.Tensor, key: str) -> torch.Tensor:
    return x.new_empty(x.shape)


def define(schema: str, function: Callable[..., torch.Tensor], shape: Callable[..., torch.Tensor]) -> None:
    """Define an operator by its schema, its function on CPUs, and what gives the shape of its result."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, function, "CPU")
    LIBRARY.impl(name, shape, "Meta")
    # There are no gradients: calls need not stop at autograd.
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")


define("linear(Tensor x, Tensor? bias, str key, SymInt out_features) -> Tensor", _linear, _linear_shape)
define("experts(Tensor x, Tensor topk_ids, Tensor topk_weights, str key) -> Tensor", _experts, _experts_shape)
define("routed_experts(Tensor x, Tensor router_logits, str key) -> Tensor", _routed_experts, _routed_experts_shape)

linear = torch.ops.marlin_cy_vllm.linear
"""``linear(x, bias, key, out_features)``: the output of a linear layer, packed or not."""

experts = torch.ops.marlin_cy_vllm.experts
"""``experts(x, topk_ids, topk_weights, key)``: the weighted sum of a layer's routed experts."""

routed_experts = torch.ops.marlin_cy_vllm.routed_experts
"""``routed_experts(x, router_logits, key)``: the same by the logits of the router."""
