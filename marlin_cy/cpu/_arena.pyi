import numpy as np
import numpy.typing as npt

from marlin_cy.cpu._workspace import Workspace

def carved(workspace: Workspace, sizes: npt.NDArray[np.int64], addresses: npt.NDArray[np.int64]) -> int: ...
