import numpy as np
import numpy.typing as npt

def align_block_size(
    topk_ids: npt.NDArray[np.int32],
    block_size: int,
    num_experts: int,
    sorted_ids: npt.NDArray[np.int32],
    expert_ids: npt.NDArray[np.int32],
) -> int: ...
