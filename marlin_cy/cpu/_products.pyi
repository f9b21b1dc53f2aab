from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.cpu._store import CpuGptqStore
from marlin_cy.cpu._workspace import Workspace

def gemm_batched(
    workspace: Workspace,
    store: CpuGptqStore,
    bias: npt.NDArray[np.float32] | None,
    input: npt.NDArray[Any],
    dispatches: npt.NDArray[np.int64],
    output: npt.NDArray[Any],
) -> None: ...
def gemm_vllm(
    workspace: Workspace,
    store: CpuGptqStore,
    bias: npt.NDArray[np.float32] | None,
    input: npt.NDArray[Any],
    sorted_token_ids: npt.NDArray[np.int32],
    expert_ids: npt.NDArray[np.int32],
    num_tokens_past_padded: int,
    output: npt.NDArray[Any],
    prob_m: int,
    moe_block_size: int,
    top_k: int,
) -> None: ...
def linear(
    workspace: Workspace,
    store: CpuGptqStore,
    input: npt.NDArray[Any],
    output: npt.NDArray[Any],
    m: int,
    column_offset: int,
    width: int,
    bias: npt.NDArray[np.float32] | None,
) -> None: ...
