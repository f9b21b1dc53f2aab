import numpy as np
import numpy.typing as npt

def enqueue_launches(function: int, queue: int, table: npt.NDArray[np.uintp], begin: int) -> int: ...
