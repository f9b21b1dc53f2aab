"""PyTorch's own int4 product, ``_weight_int4pack_mm_for_cpu``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.peers.forms import zeros_of
from bench.peers.torch_calls import GROUP_SIZES, int4_linear, missing_int4, pack_int4
from bench.peers.torch_dense import TorchPeer
from marlin_cy.errors import UnsupportedError
from marlin_cy.weights.canonical import CanonicalWeight, unpack_words

__all__ = ["TorchInt4"]

COLUMNS = 16  # that are packed together


class TorchInt4(TorchPeer):
    """4-bit codes, bfloat16 scales and offsets, bfloat16 activations."""

    name, accuracy, group_sizes = "torch_int4", "bf16", GROUP_SIZES

    def available(self) -> str | None:
        missing = super().available()
        if missing is None:
            import torch

            missing = missing_int4(torch)
        return missing

    def _linear(self, torch: Any, weight: CanonicalWeight) -> tuple[Callable[[Any], Any], Any]:
        if weight.n % COLUMNS:
            raise UnsupportedError(f"weight: got N {weight.n}, expected a multiple of {COLUMNS}")
        codes = torch.from_numpy(unpack_words(weight.words).T.astype(np.int32))
        scale = weight.scale.astype(np.float32)
        offset = scale * (8 - zeros_of(weight).astype(np.float32))  # PyTorch computes scale * (code - 8) + offset
        scales_and_offsets = torch.from_numpy(np.stack([scale, offset], axis=2)).bfloat16()
        return int4_linear(torch, pack_int4(torch, codes), scales_and_offsets, weight.group_size), torch.bfloat16
