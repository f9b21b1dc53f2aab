from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from marlin_cy.weights.tile_layout import TileLayout

__all__ = ["BLOCK_KINDS", "decode_blocks", "dequantise_blocks", "pack_blocks"]

BLOCK_KINDS: tuple[str, ...]

def decode_blocks(
    number: int,
    rows: npt.NDArray[np.uint8],
    words: npt.NDArray[np.uint32],
    scale: npt.NDArray[np.uint16],
    minimum: npt.NDArray[np.uint16] | None = None,
    sub_scale: npt.NDArray[np.uint8] | None = None,
    sub_minimum: npt.NDArray[np.uint8] | None = None,
) -> None: ...
def dequantise_blocks(number: int, rows: npt.NDArray[np.uint8], values: npt.NDArray[np.float32]) -> None: ...
def pack_blocks(
    number: int,
    rows: npt.NDArray[np.uint8],
    expert: npt.NDArray[np.uint8],
    column: int,
    layout: TileLayout,
    places: Sequence[npt.NDArray[np.int64] | None],
) -> bool: ...
