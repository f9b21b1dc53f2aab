"""FP8 tensors as tools write them."""

import torch

LARGEST = 448
"""The largest E4M3 number."""


def to_float8(weight, kind, block=(32, 32)):
    """``(FP8 weight, scale, float32 weight)`` of a matrix.

    ``kind`` is "tensor", "channel", "block", or "exponents": blocks whose scales are powers of two, stored as such.
    """
    n, k = weight.shape
    if kind == "tensor":
        scale = weight.abs().max()[None] / LARGEST
        wide = scale
    elif kind == "channel":
        scale = weight.abs().amax(1, keepdim=True) / LARGEST
        wide = scale
    else:
        blocks = weight.reshape(n // block[0], block[0], k // block[1], block[1])
        scale = blocks.abs().amax((1, 3)) / LARGEST
        scale = scale.log2().ceil().exp2() if kind == "exponents" else scale
        wide = torch.kron(scale, torch.ones(block))
    codes = (weight / wide).to(torch.float8_e4m3fn)
    return codes, scale.to(torch.float8_e8m0fnu) if kind == "exponents" else scale, codes.float() * wide
