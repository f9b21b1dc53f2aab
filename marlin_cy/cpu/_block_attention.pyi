from typing import Any, final

import numpy as np
import numpy.typing as npt

from marlin_cy.cpu._workspace import Workspace

_Indices = npt.NDArray[np.int32]

def are_supported(head_dim: int, block_size: int) -> bool: ...

@final
class BlockBatch:
    def __init__(
        self, query_starts: _Indices, lengths: _Indices, block_table: _Indices, block_size: int, kv_heads: int
    ) -> None: ...
    def attend(
        self,
        workspace: Workspace,
        q: Any,
        k: Any,
        v: Any,
        cache: Any,
        out: Any,
        scale: float,
        window: int,
        sinks: Any,
        soft_cap: float,
    ) -> None: ...
