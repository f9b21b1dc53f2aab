from typing import TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["group_values_of_tiles", "transpose", "words_of_awq", "words_of_marlin", "words_of_tiles"]

_Item = TypeVar("_Item", np.uint8, np.uint16, np.uint32)

def group_values_of_tiles(
    tiles: npt.NDArray[np.uint8],
    places: npt.NDArray[np.int64],
    size: int,
    rows: npt.NDArray[np.int32],
    groups: int,
    n: int,
) -> npt.NDArray[np.uint8]: ...
def transpose(array: npt.NDArray[_Item]) -> npt.NDArray[_Item]: ...
def words_of_awq(qweight: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]: ...
def words_of_marlin(packed: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]: ...
def words_of_tiles(
    tiles: npt.NDArray[np.uint8],
    header_bytes: int,
    k: int,
    n: int,
    positions: npt.NDArray[np.int32] | None = None,
    bits: int = 4,
) -> npt.NDArray[np.uint32]: ...
