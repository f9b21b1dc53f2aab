from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.cpu._workspace import Workspace

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int32]

def embedding_rows(workspace: Workspace, table: Array, tokens: Indices, out: Array) -> None: ...
def rms_norm(
    workspace: Workspace, x: Array, weight: Array | None, eps: float, out: Array, residual: Array | None
) -> None: ...
def gated_rms_norm(
    workspace: Workspace, x: Array, weight: Array | None, gate: Array, eps: float, out: Array
) -> None: ...
def l2_normalize(workspace: Workspace, x: Array, factor: float) -> None: ...
def rope(workspace: Workspace, x: Array, cos: Array, sin: Array, positions: Indices, interleaved: bool) -> None: ...
def dense(workspace: Workspace, x: Array, weight: Array, bias: Array | None, out: Array) -> None: ...
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
def short_conv(workspace: Workspace, x: Array, weight: Array, state: Array, out: Array) -> None: ...
def delta_gates(
    workspace: Workspace, a: Array, b: Array, a_log: Array, dt_bias: Array, decay: Array, beta: Array
) -> None: ...
def delta_rule(
    workspace: Workspace, q: Array, k: Array, v: Array, decay: Array, beta: Array, state: Array, out: Array
) -> None: ...
