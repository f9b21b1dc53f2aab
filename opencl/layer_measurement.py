"""How ``marlin-cy run`` measures a MoE layer on an OpenCL device."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from marlin_cy.commands.measure import LayerMeasurement, LayerResult, common_figures, repeated
from marlin_cy.commands.output import gigabytes
from marlin_cy.opencl.context import OpenClContext
from marlin_cy.opencl.device import describe
from marlin_cy.opencl.tiers.configuration import FLOAT16_ROWS, FLOAT32_ROWS, PLANES
from marlin_cy.opencl.timing import copy_bandwidth, times_of

if TYPE_CHECKING:
    from marlin_cy.commands.activations import LayerActivations
    from marlin_cy.moe.layer import MoeLayer
    from marlin_cy.opencl.backend import OpenClBackend

__all__ = ["OpenClLayerMeasurement", "OpenClLayerResult"]

# Relative error of a layer's output: one part depends on how kernels store activations, one on the output's dtype.
ROWS_BOUNDS = {FLOAT32_ROWS: 1e-5, PLANES: 2e-4, FLOAT16_ROWS: 1e-3}
DTYPE_BOUNDS = {np.dtype(np.float32): 0.0, np.dtype(np.float16): 1e-3, np.dtype(ml_dtypes.bfloat16): 5e-3}


@dataclasses.dataclass(frozen=True)
class OpenClLayerResult(LayerResult):
    """The result of running one layer on an OpenCL device.

    Attributes
    ----------
    device_seconds : float
        From the start of the first command to the end of the last one, in the median pass.
        ``weight_bytes_per_second`` is computed from it.
    kernel_seconds : float
        The sum of the commands' durations.
    copy_share : float
        ``weight_bytes_per_second`` divided by the bytes per second that a copy on the device reads and writes.
    """

    device_seconds: float
    kernel_seconds: float
    copy_share: float


class OpenClLayerMeasurement(LayerMeasurement):
    """Measures layers by OpenCL events, and compares them with the copy bandwidth of the device."""

    columns = (">events\nms", ">first to\nlast, ms", ">wall\nms", ">weights\nGB/s", ">share of\ncopy GB/s")
    backend: OpenClBackend
    context: OpenClContext

    def __init__(self, backend: OpenClBackend) -> None:
        super().__init__(backend, backend.new_context(profiling=True))
        self._tier = backend.tier
        self._bandwidth = float("nan")

    def prepare(self) -> None:
        self._bandwidth = copy_bandwidth(self.context)

    def measure(self, index: int, layer: MoeLayer, fed: LayerActivations, repeats: int | None) -> OpenClLayerResult:
        backend, context = self.backend, self.context
        hidden, logits = backend.from_host(fed.hidden_states), backend.from_host(fed.router_logits)
        buffer = layer(context, hidden, logits)
        out = backend.to_host(buffer)
        device_times = []

        def one_pass() -> float:
            start = time.perf_counter()
            with context.profile() as events:
                layer(context, hidden, logits, out=buffer)
            context.finish()
            seconds = time.perf_counter() - start
            device_times.append(times_of(events))
            return seconds

        wall = repeated(one_pass, repeats)
        topk_ids, _ = layer.route(context, logits)
        common = common_figures(index, layer, fed, out, backend.to_host(topk_ids))
        device_seconds = statistics.median(times.span for times in device_times)
        rate = common["weight_bytes"] / device_seconds
        return OpenClLayerResult(
            **common,
            repeats=len(wall),
            seconds=statistics.median(wall),
            weight_bytes_per_second=rate,
            device_seconds=device_seconds,
            kernel_seconds=statistics.median(times.kernels for times in device_times),
            copy_share=rate / self._bandwidth,
        )

    def error_bound(self, dtype: npt.DTypeLike) -> float:
        prepared = self._tier.inputs(self.backend.runtime.capabilities).prepared_type
        return max(ROWS_BOUNDS[prepared], DTYPE_BOUNDS[np.dtype(dtype)])

    def about(self) -> dict[str, Any]:
        has = self.backend.runtime.capabilities
        return {
            "device": has.name,
            "platform": has.platform,
            "driver": has.driver_version,
            "tier": self._tier.name,
            "copy_bandwidth_bytes_per_second": self._bandwidth,
        }

    def description(self) -> str:
        return f"{describe(self.backend.device)}, tier {self._tier.name}"

    def cells(self, result: LayerResult) -> tuple[str, ...]:
        assert isinstance(result, OpenClLayerResult)
        return (
            f"{result.kernel_seconds * 1e3:.3f}",
            f"{result.device_seconds * 1e3:.3f}",
            f"{result.seconds * 1e3:.3f}",
            f"{result.weight_bytes_per_second / 1e9:#.3g}",
            f"{result.copy_share:.0%}",
        )

    def notes(self) -> list[str]:
        return [
            "Times of a pass: the sum of its OpenCL events; from the first event's start to the last one's end, which "
            "GB/s are computed from; and until the call's results are there.",
            f"A copy on the device moves {gigabytes(self._bandwidth)}, reads and writes together. "
            "A share above 100% means that weights came from cache.",
        ]
