from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.cpu._workspace import Workspace

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int32]

def append_to_cache(
    workspace: Workspace, keys: Array, values: Array, k: Array, v: Array, page_table: Indices, start: int
) -> None: ...
def attention(
    workspace: Workspace,
    q: Array,
    keys: Array,
    values: Array,
    page_table: Indices,
    start: int,
    out: Array,
    scale: float,
    window: int | None,
    sinks: Array | None,
    soft_cap: float | None,
) -> None: ...
