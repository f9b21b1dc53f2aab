import numpy as np
import numpy.typing as npt

def count_faults(num_threads: int, rounds_to_run: int, marks: npt.NDArray[np.int64]) -> int: ...
