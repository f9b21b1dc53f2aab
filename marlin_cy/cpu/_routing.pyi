from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from marlin_cy.cpu._workspace import Workspace
from marlin_cy.moe.routing import Routing

SCORING_KINDS: Final[Mapping[str, int]]

def route(
    workspace: Workspace, router_logits: npt.NDArray[Any], kind: Routing
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]: ...
