"""The OpenCL side of ``marlin-cy run``."""

import dataclasses
import statistics
import time

import ml_dtypes
import numpy as np

from marlin_cy.commands.measure import LayerResult, common_figures, repeated
from marlin_cy.commands.output import gigabytes
from marlin_cy.opencl.device import describe
from marlin_cy.opencl.tiers.configuration import FLOAT16_ROWS, FLOAT32_ROWS, PLANES
from marlin_cy.opencl.timing import copy_bandwidth, times_of

__all__ = ["OpenClLayerResult", "OpenClPlace"]

# Relative errors of a layer's output: of what the kernels make of its activations, and of its output's dtype.
ROWS_BOUNDS = {FLOAT32_ROWS: 1e-5, PLANES: 2e-4, FLOAT16_ROWS: 1e-3}
DTYPE_BOUNDS = {np.dtype(np.float32): 0.0, np.dtype(np.float16): 1e-3, np.dtype(ml_dtypes.bfloat16): 5e-3}


@dataclasses.dataclass(frozen=True)
class OpenClLayerResult(LayerResult):
    """What one layer showed on an OpenCL device.

    Attributes
    ----------
    device_seconds : float
        From the start of the first command to the end of the last; the median pass, as all times.
        ``weight_bytes_per_second`` counts by it.
    kernel_seconds : float
        The sum of the commands' durations.
    copy_share : float
        ``weight_bytes_per_second`` over what a copy on the device reads and writes.
    """

    device_seconds: float
    kernel_seconds: float
    copy_share: float


class OpenClPlace:
    """A device, as :mod:`marlin_cy.commands.run` sees it: the likeness of ``CpuPlace``.

    Parameters
    ----------
    backend : OpenClBackend
    """

    columns = (">events\nms", ">first to\nlast, ms", ">wall\nms", ">weights\nGB/s", ">share of\ncopy GB/s")

    def __init__(self, backend):
        self.backend = backend
        self._context = self.backend.new_context(profiling=True)
        self._tier = self.backend.tier
        self._bandwidth = None

    def measure_bandwidth(self):
        """Find out what the times are held against."""
        self._bandwidth = copy_bandwidth(self._context)

    def measure(self, index, layer, fed, repeats):
        """The :class:`OpenClLayerResult` of a layer."""
        backend, context = self.backend, self._context
        hidden, logits = backend.from_host(fed.hidden_states), backend.from_host(fed.router_logits)
        buffer = layer(context, hidden, logits)
        out = backend.to_host(buffer)
        device_times = []

        def one_pass():
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

    def error_bound(self, dtype):
        """What a layer's relative error may be, with activations of this dtype."""
        prepared = self._tier.inputs(self.backend.runtime.capabilities).prepared_type
        return max(ROWS_BOUNDS[prepared], DTYPE_BOUNDS[np.dtype(dtype)])

    def about(self):
        """The keys of the report that other backends don't have."""
        has = self.backend.runtime.capabilities
        return {
            "device": has.name,
            "platform": has.platform,
            "driver": has.driver_version,
            "tier": self._tier.name,
            "copy_bandwidth_bytes_per_second": self._bandwidth,
        }

    def description(self):
        """The same in a few words."""
        return f"{describe(self.backend.device)}, tier {self._tier.name}"

    def cells(self, result):
        """A result's cells for :attr:`columns`."""
        return (
            f"{result.kernel_seconds * 1e3:.3f}",
            f"{result.device_seconds * 1e3:.3f}",
            f"{result.seconds * 1e3:.3f}",
            f"{result.weight_bytes_per_second / 1e9:#.3g}",
            f"{result.copy_share:.0%}",
        )

    def notes(self):
        """Lines below the table."""
        return [
            "Times: the sum of the OpenCL events of a pass, from the first one's start to the last one's end (weights "
            "are counted by it), and what the caller waits.",
            f"A copy on the device moves {gigabytes(self._bandwidth)}, reads and writes together; "
            "a share above 100% means that weights came from cache.",
        ]
