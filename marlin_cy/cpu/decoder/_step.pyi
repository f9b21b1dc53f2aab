from typing import final

import numpy as np
import numpy.typing as npt

from marlin_cy.cpu._workspace import Workspace
from marlin_cy.cpu.decoder._cache import KvPool, StatePool
from marlin_cy.decoder.plan import DecoderPlan

@final
class CpuStep:
    def __new__(
        cls,
        workspace: Workspace,
        plan: DecoderPlan,
        pools: list[KvPool | StatePool],
        state_lengths: npt.NDArray[np.int64],
    ) -> CpuStep: ...
    def run(
        self,
        tokens: npt.NDArray[np.int32],
        segments: npt.NDArray[np.int64],
        pages: npt.NDArray[np.int32],
        wanted: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.float32]: ...
