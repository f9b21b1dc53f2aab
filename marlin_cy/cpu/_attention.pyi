from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.cpu._workspace import Workspace

_Array = npt.NDArray[Any]
_Indices = npt.NDArray[np.int32]

def append_to_cache(
    workspace: Workspace, keys: _Array, values: _Array, k: _Array, v: _Array, page_table: _Indices, start: int
) -> None: ...
def attention(
    workspace: Workspace,
    q: _Array,
    keys: _Array,
    values: _Array,
    page_table: _Indices,
    start: int,
    out: _Array,
    scale: float,
    window: int | None,
    sinks: _Array | None,
    soft_cap: float | None,
) -> None: ...
