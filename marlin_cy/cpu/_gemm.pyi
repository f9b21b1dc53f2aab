import numpy as np
import numpy.typing as npt

def counters_after(num_threads: int, items: int) -> npt.NDArray[np.int64]: ...
