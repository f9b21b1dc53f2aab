import numpy as np
import numpy.typing as npt

__all__ = ["words_of_nibbles"]

def words_of_nibbles(rows: npt.NDArray[np.uint8], block_bytes: int, offset: int) -> npt.NDArray[np.uint32]: ...
