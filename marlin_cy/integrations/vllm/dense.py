"""Unquantised layers of vLLM on CPUs without AVX512, where vLLM leaves them to PyTorch.

PyTorch multiplies bfloat16 there by dot products, one output at a time: a product of 16 rows takes three times as long
as by this library. Both sum in float32 and round once.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform

from marlin_cy.integrations.modules import Contexts, array_of
from marlin_cy.integrations.vllm import operators

__all__ = ["DenseHeadMethod", "DenseLinearMethod", "dense_method", "has_own_kernels"]


class DenseMethod:
    """How vLLM runs one unquantised layer: linear, or the output layer.

    Parameters
    ----------
    name : str
        The layer's name in vLLM.
    contexts : Contexts
    """

    def __init__(self, name: str, contexts: Contexts) -> None:
        super().__init__()
        self._contexts = contexts
        self._weight: Any = None
        self._width = 0  # torch.compile must not look at a bfloat16 array
        self._key = operators.known_as(name, self)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Called by vLLM after the weights are loaded."""
        super().process_weights_after_loading(layer)  # type: ignore[misc]
        weight = layer.weight.detach()
        if weight.dtype is torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous():
            self._weight, self._width = array_of(weight), len(weight)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The layer's output, eager or compiled."""
        output: torch.Tensor
        if not self._width or x.dtype is not torch.bfloat16:
            output = super().apply(layer, x, bias)  # type: ignore[misc]
        elif torch.compiler.is_compiling():
            output = operators.linear(x, bias, self._key, self._width)
        else:
            output = self.compute(x, bias)
        return output

    def compute(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x @ weight.T + bias``."""
        out = x.new_empty((*x.shape[:-1], self._width))
        if out.numel():
            added = None if bias is None else array_of(bias.detach().float())
            rows, columns = x.contiguous(), out
            if x.ndim != 2:
                rows, columns = rows.view(-1, x.shape[-1]), out.view(-1, self._width)
            self._contexts.backend.dense(self._contexts.ctx, rows, self._weight, added, columns)
        return out


class DenseLinearMethod(DenseMethod, UnquantizedLinearMethod):
    """How vLLM runs an unquantised linear layer."""


class DenseHeadMethod(DenseMethod, UnquantizedEmbeddingMethod):
    """How vLLM runs an unquantised output layer."""


def dense_method(layer: torch.nn.Module, name: str, contexts: Contexts) -> Any:
    """How vLLM runs an unquantised linear or output layer. None: vLLM decides."""
    is_linear = isinstance(layer, LinearBase)
    if has_own_kernels():
        return UnquantizedLinearMethod() if is_linear else None
    return (DenseLinearMethod if is_linear else DenseHeadMethod)(name, contexts)


def has_own_kernels() -> bool:
    """Whether vLLM has fast kernels of its own: oneDNN and its attention want AVX512; ZenDNN brings its own."""
    return bool(torch.cpu._is_avx512_supported()) or current_platform.is_zen_cpu()
