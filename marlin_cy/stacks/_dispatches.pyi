import numpy as np
import numpy.typing as npt

def check_dispatches(
    dispatches: npt.NDArray[np.int64], num_experts: int, input_rows: int, output_rows: int
) -> int: ...
def check_disjoint(dispatches: npt.NDArray[np.int64]) -> int: ...
