"""How ``marlin-cy run`` measures a MoE layer on the CPU."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy.typing as npt

from marlin_cy.commands.measure import LayerMeasurement, LayerResult
from marlin_cy.commands.output import gigabytes
from marlin_cy.cpu.context import CpuContext
from marlin_cy.interface import Backend, Buffer
from marlin_cy.moe.layer import MoeLayer

__all__ = ["ERROR_BOUNDS", "CpuLayerMeasurement", "CpuLayerResult"]

# Relative error (Frobenius) of a layer's output for each compute dtype: two products and an activation, each with the
# error of its dtype on normal data, and a margin for activations that are not normal.
ERROR_BOUNDS = {"int16": 2e-4, "int8": 3e-2}


@dataclasses.dataclass(frozen=True)
class CpuLayerResult(LayerResult):
    """The result of running one layer on the CPU.

    Attributes
    ----------
    read_share : float
        ``weight_bytes_per_second`` divided by the machine's read bandwidth with the same threads.
    """

    read_share: float


class CpuLayerMeasurement(LayerMeasurement):
    """Measures layers by the time of a call, and compares it with the read bandwidth of memory."""

    columns = (">time\nms", ">weights\nGB/s", ">share of\nread GB/s")
    context: CpuContext

    def __init__(self, backend: Backend, context: CpuContext) -> None:
        super().__init__(backend, context)
        self._bandwidth = float("nan")

    def prepare(self) -> None:
        # Imported here, so that a test can replace the function in its module.
        from marlin_cy.cpu.measure._bandwidth import read_bandwidth

        self._bandwidth = read_bandwidth(self.context.num_threads)

    def timed_pass(self, layer: MoeLayer, hidden_states: Buffer, router_logits: Buffer, out: Buffer) -> float:
        start = time.perf_counter()
        layer(self.context, hidden_states, router_logits)
        return time.perf_counter() - start

    def result(self, figures: dict[str, Any]) -> CpuLayerResult:
        return CpuLayerResult(**figures, read_share=figures["weight_bytes_per_second"] / self._bandwidth)

    def error_bound(self, dtype: npt.DTypeLike) -> float:
        return ERROR_BOUNDS[self.context.compute_dtype]

    def about(self) -> dict[str, Any]:
        return {
            "isa": self.context.isa,
            "threads": self.context.num_threads,
            "compute_dtype": self.context.compute_dtype,
            "read_bandwidth_bytes_per_second": self._bandwidth,
        }

    def cells(self, result: LayerResult) -> tuple[str, ...]:
        assert isinstance(result, CpuLayerResult)
        return (*super().cells(result), f"{result.read_share:.0%}")

    def notes(self) -> list[str]:
        return [
            f"Memory reads at {gigabytes(self._bandwidth)} with {self.context.num_threads} threads. "
            "A share above 100% means that weights came from cache."
        ]
