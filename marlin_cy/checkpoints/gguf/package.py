"""What the package ``gguf`` (the extra ``gguf``) knows: types of tensors, and their values."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.errors import UnsupportedError
from marlin_cy.extras import needs

__all__ = ["dequantised", "tensor_type"]

Bytes = npt.NDArray[np.uint8]


@cache
def tensor_type(number: int) -> tuple[str, int, int] | None:
    """``(name, values of a block, bytes of a block)`` of a type of tensors; None for a number that has none."""
    constants = _package()
    try:
        found = constants.GGMLQuantizationType(number)
    except ValueError:
        return None
    return found.name, *constants.GGML_QUANT_SIZES[found]


def dequantised(data: Bytes, type_name: str) -> npt.NDArray[np.float32]:
    """The values of rows of blocks, float32.

    Parameters
    ----------
    data : uint8 ``[..., bytes of a row]``
    type_name : str

    Raises
    ------
    UnsupportedError
        The package cannot read the type.
    """
    gguf = _package()
    try:
        with np.errstate(all="ignore"):
            values: npt.NDArray[np.float32] = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[type_name])
    except NotImplementedError as error:
        raise UnsupportedError(f"type {type_name}: {error}") from error
    return values


@cache
def _package() -> Any:
    with needs("gguf", "gguf"):
        import gguf
    return gguf
