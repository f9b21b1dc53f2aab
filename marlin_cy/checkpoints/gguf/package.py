"""Types of tensors, and the values of those that only the package ``gguf`` (the extra ``gguf``) can read.

The package takes a quarter of a second to import, so it is imported only for types that this library has no row for.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.checkpoints.gguf.blocks import BLOCK_TYPES
from marlin_cy.errors import UnsupportedError
from marlin_cy.extras import needs

__all__ = ["dequantised", "tensor_type"]

Bytes = npt.NDArray[np.uint8]

OWN_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2)} | {
    row.number: (row.name, row.block, row.nbytes) for row in BLOCK_TYPES.values()
}
"""What :func:`tensor_type` returns for the types that this library reads itself."""


@cache
def tensor_type(number: int) -> tuple[str, int, int] | None:
    """``(name, values of a block, bytes of a block)`` of a type of tensors; None for a number that has none."""
    if number in OWN_TYPES:
        return OWN_TYPES[number]
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
