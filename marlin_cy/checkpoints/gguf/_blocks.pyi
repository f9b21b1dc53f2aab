import numpy as np
import numpy.typing as npt

__all__ = ["BLOCK_KINDS", "decode_blocks", "dequantise_blocks"]

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
