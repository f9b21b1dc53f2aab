from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.cpu._workspace import Workspace
from marlin_cy.interface import MoePlan

def moe_forward(
    workspace: Workspace,
    layer: MoePlan,
    hidden_states: npt.NDArray[Any],
    out: npt.NDArray[Any],
    router_logits: npt.NDArray[Any] | None,
    topk_ids: npt.NDArray[np.int32] | None,
    topk_weights: npt.NDArray[np.float32] | None,
) -> None: ...
