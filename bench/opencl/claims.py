"""The claims about the OpenCL backend: kernel times compared with vLLM's CUDA kernel, and the costs around a kernel."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from bench.common.processes import run_module
from bench.common.shapes import random_ids
from bench.common.timing import spread
from bench.opencl.calls import (
    PLUG_BYTES,
    ROUTED_EXPERTS,
    GemmCase,
    LayerCase,
    QueuePlug,
    Shape,
    Weights,
    by_label,
)
from bench.opencl.claim_tables import brief, print_claims
from marlin_cy.opencl.device import list_devices
from marlin_cy.opencl.timing import Times, copy_bandwidth, times_of

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend

__all__ = ["Settings", "run_show"]

SHOW_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
SHAPES = (Shape(2048, 1536, 128), Shape(768, 2048, 128, gathered=True), Shape(7168, 4096, 256))
# Times of vLLM's CUDA Marlin kernel (moe_wna16) in µs, by GPU, shape and tokens: float16, group size 128, top 8, the
# best block size, CUDA events. An empty kernel takes 3.7 µs by CUDA events and 5.1 µs by OpenCL events.
CUDA_MARLIN = {
    "H100": (
        (13.8, 26.0, 56.4, 80.7, 110, 263, 784),
        (10.9, 14.5, 35.7, 47.4, 67.9, 159, 478),
        (49.3, 165, 522, 1114, 1354, 2350, 7547),
    ),
    "H200": (
        (11.8, 22.3, 49.2, 64.9, 126, 283, 904),
        (9.7, 13.1, 30.8, 38.8, 63.2, 157, 478),
        (44.5, 135, 518, 1164, 1559, 2872, 9261),
    ),
}
QUICK_SHAPES = (
    Shape(256, 128, 16, group_size=64),
    Shape(64, 256, 16, gathered=True, group_size=64),
    Shape(512, 256, 32),
)
QUICK_TOKENS = (1, 4, 16)
LAYER_TOKENS = (1, 16, 64, 256, 1024)

ERROR_BAR = 1e-3
BANDWIDTH_BAR = 3.2 / 4.2  # weight bytes read, as a share of the bytes that a copy moves; for this shape and tokens:
BANDWIDTH_PLACE = Shape(2048, 1536, 128), 64
PORTABLE_BAR, PORTABLE_BAR_TOKENS = 3.0, 16  # time over that of the best tier, up to so many tokens
LAYER_BAR, LAYER_BAR_TOKENS = 1.35, 64  # time of a layer over that of its products
HOST_BAR = 25e-6  # seconds per call
LAUNCHES, QUICK_LAUNCHES, LAYER_CALLS = 24, 6, 24
HOST_CALLS, HOST_ROUNDS = 64, 15
CELL_SECONDS = 0.5  # of launches: slower kernels are launched fewer times
PRODUCT_PARTS = ("", ": reduce_splits")  # labels of the events of a product itself
LARGEST = 2  # the row of SHAPES that only the table of products needs


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes
    ----------
    backends : dict of str to OpenClBackend
        By tier, the best first.
    parts : tuple of str
        Some of ``"1"`` to ``"3"`` (rows of the table of products), ``"layer"``, ``"host"`` and ``"compile"``.
    tokens : tuple of int or None
        None: the default of each part.
    launches : int or None
        None: the default of each part.
    block_size : int or None
        None: the tier's choice.
    quick : bool
    """

    backends: Mapping[str, OpenClBackend]
    parts: tuple[str, ...]
    tokens: tuple[int, ...] | None
    launches: int | None
    block_size: int | None
    quick: bool


def run_show(settings: Settings, screen: Console) -> dict[str, Any]:
    """Measure and print everything; returns parts of the JSON document."""
    show = _Show(settings, screen)
    seconds = {}
    for name, measure in (
        ("products", show.products),
        ("layer", show.layers),
        ("host", show.host_time),
        ("compile", show.compilation),
    ):
        begin = time.perf_counter()
        measure()
        seconds[name] = time.perf_counter() - begin
    results = {"gemm": show.gemm, "layer": show.layer, "host": show.host, "compile": show.compile}
    print_claims(screen, results)
    return results | {
        "copy_bytes_per_second": show.copy_bandwidth,
        "seconds": seconds,
    }


class _Show:
    """The figures so far, and the weights and contexts that several parts use."""

    def __init__(self, settings: Settings, screen: Console) -> None:
        self.settings, self.screen = settings, screen
        self.backends = settings.backends
        self.contexts = {name: backend.new_context(profiling=True) for name, backend in self.backends.items()}
        self.best = next(iter(self.contexts))
        self.shapes = QUICK_SHAPES if settings.quick else SHAPES
        name = self.backends[self.best].device.name
        self.cuda_marlin = next((rows for gpu, rows in CUDA_MARLIN.items() if gpu in name), None)
        self.weights: dict[int, Weights] = {}
        self.plugs: dict[str, QueuePlug] = {}
        self.gemm: list[dict[str, Any]] = []
        self.layer: list[dict[str, Any]] = []
        self.host: list[dict[str, Any]] = []
        self.compile: list[dict[str, Any]] = []
        ctx = self.contexts[self.best]
        self.copy_bandwidth = copy_bandwidth(ctx, (16 if settings.quick else 1024) << 20)
        screen.print(f"Device copy: {self.copy_bandwidth / 1e12:.3g} TB/s. Tiers: {', '.join(self.contexts)}")

    def products(self) -> None:
        """Time, error and bandwidth of each shape and number of tokens, on each tier."""
        plug_bytes = 0 if self.settings.quick else PLUG_BYTES
        self.plugs = {name: QueuePlug(ctx, plug_bytes) for name, ctx in self.contexts.items()}
        for number in range(len(self.shapes)):
            if str(number + 1) not in self.settings.parts:
                continue
            self._row(number)
            if number == LARGEST:
                self.weights.pop(number).release()
        for plug in self.plugs.values():
            plug.release()

    def _row(self, number: int) -> None:
        """One shape, with each number of tokens."""
        settings, shape = self.settings, self.shapes[number]
        weights = self._weights_of(number)
        rng = np.random.default_rng(1)
        wanted = settings.tokens or (QUICK_TOKENS if settings.quick else SHOW_TOKENS)
        rows = max(wanted) * (ROUTED_EXPERTS if shape.gathered else 1)
        x = rng.standard_normal((rows, shape.k), np.float32).astype(np.float16)
        inputs = self.backends[self.best].from_host(x)
        launches = settings.launches or (QUICK_LAUNCHES if settings.quick else LAUNCHES)
        for tokens in wanted:
            all_ids = [random_ids(rng, tokens, shape.experts, ROUTED_EXPERTS) for _ in range(launches)]
            for tier, ctx in self.contexts.items():
                case = GemmCase(weights, ctx, inputs, all_ids, settings.block_size)
                times = case.launch_times(CELL_SECONDS, plug=self.plugs[tier])
                self.gemm.append(self._cell(tier, tokens, case, times, case.error(x, rng)))
                self.screen.print(brief(self.gemm[-1]))

    def _cell(self, tier: str, tokens: int, case: GemmCase, times: Sequence[Times], error: float) -> dict[str, Any]:
        """The JSON object of one shape, number of tokens and tier."""
        shape = case.weights.shape
        seconds = statistics.median(each.kernels for each in times)
        baseline = None
        if self.cuda_marlin and shape in SHAPES and tokens in SHOW_TOKENS:
            baseline = self.cuda_marlin[SHAPES.index(shape)][SHOW_TOKENS.index(tokens)]
        ratio = None if baseline is None else seconds * 1e6 / baseline
        rate = case.experts_hit * case.weights.expert_bytes / seconds
        portable = tier == "portable" and tier != self.best
        best = next((c["us"]["median"] for c in self.gemm if (c["shape"], c["tokens"]) == (str(shape), tokens)), None)
        to_best = seconds * 1e6 / best if best else None
        checks = {"error": error <= ERROR_BAR}
        if ratio is not None and not portable:
            checks["cuda"] = ratio <= _cuda_bar(tokens)
            if (shape, tokens) == BANDWIDTH_PLACE:
                checks["bandwidth"] = rate >= BANDWIDTH_BAR * self.copy_bandwidth
        if portable and to_best and tokens <= PORTABLE_BAR_TOKENS:
            checks["best"] = to_best <= PORTABLE_BAR
        return {
            "shape": str(shape),
            "tier": tier,
            "tokens": tokens,
            "block_size": case.block_size,
            "launches": len(times),
            "us": spread([each.kernels * 1e6 for each in times])._asdict(),
            "span_us": statistics.median(each.span for each in times) * 1e6,
            "cuda_marlin_us": baseline,
            "ratio": ratio,
            "bar": _cuda_bar(tokens) if baseline and not portable else None,
            "ratio_to_best": to_best,
            "experts_hit": case.experts_hit,
            "weight_bytes_per_second": rate,
            "flops": 2 * case.pairs * shape.k * shape.n / seconds,
            "error": error if np.isfinite(error) else None,
            "checks": checks,
        }

    def layers(self) -> None:
        """The whole layer: its time divided by the time of its products."""
        settings = self.settings
        if "layer" not in settings.parts:
            return
        gate_up, down = self._layer_weights()
        ctx = self.contexts[self.best]
        plug = QueuePlug(ctx, 0 if settings.quick else PLUG_BYTES)
        rng = np.random.default_rng(2)
        calls = settings.launches or (QUICK_LAUNCHES if settings.quick else LAYER_CALLS)
        wanted = [t for t in LAYER_TOKENS if not settings.quick or t <= 16]
        for tokens in settings.tokens or wanted:
            case = LayerCase(gate_up, down, ctx, tokens, calls, rng)
            free = [times_of(events).span for events in case.events()]
            collected = case.events(plug)
            labels = by_label(collected)
            total = statistics.median(times_of(events).span for events in collected)
            products = sum(labels.get(f"{name}{part}", 0.0) for name in ("gate_up", "down") for part in PRODUCT_PARTS)
            bar = LAYER_BAR if tokens == LAYER_BAR_TOKENS else None
            self.layer.append(
                {
                    "tier": self.best,
                    "tokens": tokens,
                    "calls": calls,
                    "us": total * 1e6,
                    "host_bound_us": statistics.median(free) * 1e6,
                    "products_us": products * 1e6,
                    "ratio": total / products,
                    "bar": bar,
                    "passed": None if bar is None else total / products <= bar,
                    "labels_us": {label: seconds * 1e6 for label, seconds in labels.items()},
                }
            )
        plug.release()

    def _layer_weights(self) -> tuple[Weights, Weights]:
        """The weights of the layer: as in the first two rows of the table of products, or small weights."""
        if not self.settings.quick:
            return self._weights_of(0), self._weights_of(1)
        backend = self.backends[self.best]
        return Weights(backend, Shape(256, 128, 16, group_size=64)), Weights(backend, Shape(64, 256, 16, group_size=64))

    def _weights_of(self, number: int) -> Weights:
        """The weights of a row of the table of products, made once."""
        if number not in self.weights:
            begin = time.perf_counter()
            weights = self.weights[number] = Weights(self.backends[self.best], self.shapes[number])
            self.screen.print(
                f"Weights {weights.shape}: {weights.stack.metadata.packed_bytes / 1e9:.2f} GB, "
                f"{time.perf_counter() - begin:.1f} s"
            )
        return self.weights[number]

    def host_time(self) -> None:
        """The host's time of a warm call. The queue is empty before each round of calls."""
        settings = self.settings
        if "host" not in settings.parts:
            return
        weights, rng = self._weights_of(0), np.random.default_rng(3)
        rounds, calls = (3, 8) if settings.quick else (HOST_ROUNDS, HOST_CALLS)
        for tier, backend in self.backends.items():
            ctx = backend.new_context()
            for tokens in (1, 16) if settings.quick else (1, 64):
                inputs = backend.from_host(rng.standard_normal((tokens, weights.shape.k)).astype(np.float16))
                case = GemmCase(weights, ctx, inputs, [random_ids(rng, tokens, weights.shape.experts, ROUTED_EXPERTS)])
                seconds = []
                for _ in range(rounds + 1):
                    ctx.finish()
                    begin = time.perf_counter()
                    for _ in range(calls):
                        case.calls[0]()
                    seconds.append((time.perf_counter() - begin) / calls)
                ctx.finish()
                median = statistics.median(seconds[1:])
                self.host.append(
                    {
                        "tier": tier,
                        "tokens": tokens,
                        "us": median * 1e6,
                        "least_us": min(seconds) * 1e6,
                        "bar": HOST_BAR * 1e6,
                        "passed": median <= HOST_BAR,
                    }
                )

    def compilation(self) -> None:
        """The first and second call of a process, with nothing compiled and with binaries on disk."""
        if "compile" not in self.settings.parts:
            return
        shape = self.shapes[0]._replace(experts=min(16, self.shapes[0].experts))
        device = list_devices().index(self.backends[self.best].device)
        sizes = (shape.k, shape.n, shape.experts, shape.group_size)
        arguments = (self.best, *map(str, (device, *sizes)))
        with tempfile.TemporaryDirectory() as folder:
            # Drivers have caches of their own, which must not answer instead of this library's cache.
            environment = {
                "MARLIN_CY_CACHE_DIR": f"{folder}/own",
                "POCL_CACHE_DIR": f"{folder}/pocl",
                "CUDA_CACHE_DISABLE": "1",
                "PYOPENCL_NO_CACHE": "1",
            }
            for state in ("empty cache", "binaries on disk"):
                done = run_module("bench.opencl.first_call", *arguments, folder=folder, environment=environment)
                if done.returncode:
                    raise ValueError(f"the process of the first call failed:\n{done.stderr}")
                self.compile.append({"tier": self.best, "state": state} | json.loads(done.stdout))


def _cuda_bar(tokens: int) -> float:
    """The largest allowed ratio of a product's time to the time of CUDA Marlin."""
    return 1.0 if tokens <= 16 else 1.1 if tokens <= 64 else 1.25
