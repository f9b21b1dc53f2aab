"""Packed layers as operators of PyTorch, over which ``torch.compile`` passes without looking inside.

An operator takes tensors and numbers. A layer is therefore known by a number, which is part of the compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

from marlin_cy.integrations import needs_extra

with needs_extra():
    import torch

__all__ = ["experts", "linear", "number_of"]

_NUMBERS = count()
_RUNNERS: WeakValueDictionary[int, Any] = WeakValueDictionary()


def number_of(runner: Callable[..., torch.Tensor]) -> int:
    """A new number for a runner of a packed layer. It is forgotten with the runner."""
    number = next(_NUMBERS)
    _RUNNERS[number] = runner
    return number


def _linear(input: torch.Tensor, runner: int, out_features: int) -> torch.Tensor:
    output: torch.Tensor = _RUNNERS[runner](input)
    return output


def _experts(
    hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, runner: int
) -> torch.Tensor:
    output: torch.Tensor = _RUNNERS[runner](hidden_states, topk_ids, topk_weights)
    return output


def _linear_shape(input: torch.Tensor, runner: int, out_features: int) -> torch.Tensor:
    return input.new_empty((*input.shape[:-1], out_features))


def _experts_shape(
    hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, runner: int
) -> torch.Tensor:
    return hidden_states.new_empty(hidden_states.shape)


# The schemas are written out: PyTorch cannot read annotations that are text, which they are in this module.
linear = torch.library.custom_op(
    "marlin_cy::linear", _linear, mutates_args=(), schema="(Tensor input, int runner, int out_features) -> Tensor"
)
"""``linear(input, number, out_features)``: the output of a packed linear layer."""

experts = torch.library.custom_op(
    "marlin_cy::experts",
    _experts,
    mutates_args=(),
    schema="(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, int runner) -> Tensor",
)
"""``experts(hidden_states, topk_ids, topk_weights, number)``: the output of a layer's packed routed experts."""

linear.register_fake(_linear_shape)
experts.register_fake(_experts_shape)
