"""The claims about the OpenCL backend: kernel times beside those of vLLM's CUDA kernel, and what surrounds a kernel."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.opencl_calls import DAM_BYTES, Dam, GemmCase, LayerCase, Shape, Weights, by_label, random_ids
from bench.timing import spread
from marlin_cy.commands.output import table
from marlin_cy.opencl.device import list_devices
from marlin_cy.opencl.timing import copy_bandwidth, times_of

__all__ = ["ShowSettings", "run_show"]

SHOW_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
SHAPES = (Shape(2048, 1536, 128), Shape(768, 2048, 128, gathered=True), Shape(7168, 4096, 256))
# vLLM's CUDA Marlin kernel (moe_wna16), float16, group 128, top 8, its best block size: µs by CUDA events, by GPU,
# shape and tokens. An empty kernel takes 3.7 µs by these events, and 5.1 by OpenCL's.
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
BANDWIDTH_BAR = 3.2 / 4.2  # weights read, as a share of what a copy moves, where the next two say
BANDWIDTH_PLACE = Shape(2048, 1536, 128), 64
PORTABLE_BAR = 3.0  # times the best tier, up to 16 tokens
LAYER_BAR, LAYER_BAR_TOKENS = 1.35, 64  # times the sum of its products
HOST_BAR = 25e-6  # seconds a call
LAUNCHES, QUICK_LAUNCHES, LAYER_CALLS = 24, 6, 24
HOST_CALLS, HOST_ROUNDS = 64, 15
SECONDS_A_CELL = 0.5  # of launches: slower kernels are launched less often


def cuda_bar(tokens):
    """Our time over CUDA Marlin's, at most."""
    return 1.0 if tokens <= 16 else 1.1 if tokens <= 64 else 1.25


@dataclass(frozen=True)
class ShowSettings:
    """What to measure.

    Attributes
    ----------
    backends : dict of str to OpenClBackend
        By tier, the best first.
    parts : tuple of str
        ``"1"`` to ``"3"`` (rows of the table of products), ``"layer"``, ``"host"``, ``"compile"``.
    tokens : tuple of int or None
        All of each part's when None.
    launches : int or None
    block_size : int or None
        The tier's choice when None.
    quick : bool
    """

    backends: dict
    parts: tuple
    tokens: tuple | None
    launches: int | None
    block_size: int | None
    quick: bool


def run_show(settings, screen):
    """Measure and print everything; returns what goes into the JSON object."""
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
    show.print()
    return {
        "gemm": show.gemm,
        "layer": show.layer,
        "host": show.host,
        "compile": show.compile,
        "copy_bytes_per_second": show.copy_bandwidth,
        "seconds": seconds,
    }


class _Show:
    """The figures so far, and what several parts share."""

    def __init__(self, settings, screen):
        self.settings, self.screen = settings, screen
        self.backends = settings.backends
        self.contexts = {name: backend.new_context(profiling=True) for name, backend in self.backends.items()}
        self.best = next(iter(self.contexts))
        self.shapes = QUICK_SHAPES if settings.quick else SHAPES
        name = self.backends[self.best].device.name
        self.cuda_marlin = next((rows for gpu, rows in CUDA_MARLIN.items() if gpu in name), None)
        self.weights = {}
        self.gemm, self.layer, self.host, self.compile = [], [], [], []
        ctx = self.contexts[self.best]
        self.copy_bandwidth = copy_bandwidth(ctx, (16 if settings.quick else 1024) << 20)
        screen.print(f"Device copy: {self.copy_bandwidth / 1e12:.3g} TB/s. Tiers: {', '.join(self.contexts)}")

    def weights_of(self, number):
        """The weights of a row of the table of products, made once."""
        if number not in self.weights:
            begin = time.perf_counter()
            weights = self.weights[number] = Weights(self.backends[self.best], self.shapes[number])
            self.screen.print(
                f"Weights {weights.shape}: {weights.stack.metadata.packed_bytes / 1e9:.2f} GB, "
                f"{time.perf_counter() - begin:.1f} s"
            )
        return self.weights[number]

    def products(self):
        """Time, error and bandwidth of each cell, on each tier."""
        dam_bytes = 0 if self.settings.quick else DAM_BYTES
        self.dams = {name: Dam(ctx, dam_bytes) for name, ctx in self.contexts.items()}
        for number in range(len(self.shapes)):
            if str(number + 1) not in self.settings.parts:
                continue
            self.row(number)
            if number == 2:  # no other part needs the largest
                self.weights.pop(number).release()
        for dam in self.dams.values():
            dam.release()

    def row(self, number):
        """One shape, at each number of tokens."""
        settings, shape = self.settings, self.shapes[number]
        weights = self.weights_of(number)
        rng = np.random.default_rng(1)
        wanted = settings.tokens or (QUICK_TOKENS if settings.quick else SHOW_TOKENS)
        rows = max(wanted) * (8 if shape.gathered else 1)
        x = rng.standard_normal((rows, shape.k), np.float32).astype(np.float16)
        inputs = self.backends[self.best].from_host(x)
        launches = settings.launches or (QUICK_LAUNCHES if settings.quick else LAUNCHES)
        for tokens in wanted:
            all_ids = [random_ids(rng, tokens, shape.experts) for _ in range(launches)]
            for tier, ctx in self.contexts.items():
                case = GemmCase(weights, ctx, inputs, all_ids, settings.block_size)
                times = case.launch_times(SECONDS_A_CELL, dam=self.dams[tier])
                self.gemm.append(self.cell(tier, tokens, case, times, case.error(x, rng)))
                self.screen.print(_brief(self.gemm[-1]))

    def cell(self, tier, tokens, case, times, error):
        """The JSON object of a cell."""
        shape = case.weights.shape
        seconds = statistics.median(each.kernels for each in times)
        baseline = None
        if self.cuda_marlin and shape in SHAPES and tokens in SHOW_TOKENS:
            baseline = self.cuda_marlin[SHAPES.index(shape)][SHOW_TOKENS.index(tokens)]
        ratio = baseline and seconds * 1e6 / baseline
        rate = case.experts_hit * case.weights.expert_bytes / seconds
        portable = tier == "portable" and tier != self.best
        best = next((c["us"]["median"] for c in self.gemm if (c["shape"], c["tokens"]) == (str(shape), tokens)), None)
        to_best = seconds * 1e6 / best if best else None
        checks = {"error": error <= ERROR_BAR}
        if baseline and not portable:
            checks["cuda"] = ratio <= cuda_bar(tokens)
            if (shape, tokens) == BANDWIDTH_PLACE:
                checks["bandwidth"] = rate >= BANDWIDTH_BAR * self.copy_bandwidth
        if portable and to_best and tokens <= 16:
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
            "bar": cuda_bar(tokens) if baseline and not portable else None,
            "ratio_to_best": to_best,
            "experts_hit": case.experts_hit,
            "weight_bytes_per_second": rate,
            "flops": 2 * case.pairs * shape.k * shape.n / seconds,
            "error": error if np.isfinite(error) else None,
            "checks": checks,
        }

    def layers(self):
        """The whole layer: how much longer than its products."""
        settings = self.settings
        if "layer" not in settings.parts:
            return
        gate_up, down = self.layer_weights()
        ctx = self.contexts[self.best]
        dam = Dam(ctx, 0 if settings.quick else DAM_BYTES)
        rng = np.random.default_rng(2)
        calls = settings.launches or (QUICK_LAUNCHES if settings.quick else LAYER_CALLS)
        wanted = [t for t in LAYER_TOKENS if not settings.quick or t <= 16]
        for tokens in settings.tokens or wanted:
            case = LayerCase(gate_up, down, ctx, tokens, calls, rng)
            free = [times_of(events).span for events in case.events()]
            collected = case.events(dam)
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
        dam.release()

    def layer_weights(self):
        """The stacks of the layer: in full size the first two rows of the table."""
        if not self.settings.quick:
            return self.weights_of(0), self.weights_of(1)
        backend = self.backends[self.best]
        return Weights(backend, Shape(256, 128, 16, group_size=64)), Weights(backend, Shape(64, 256, 16, group_size=64))

    def host_time(self):
        """What a warm call costs its caller: the queue is empty before each round of calls."""
        settings = self.settings
        if "host" not in settings.parts:
            return
        weights, rng = self.weights_of(0), np.random.default_rng(3)
        rounds, calls = (3, 8) if settings.quick else (HOST_ROUNDS, HOST_CALLS)
        for tier, backend in self.backends.items():
            ctx = backend.new_context()
            for tokens in (1, 16) if settings.quick else (1, 64):
                inputs = backend.from_host(rng.standard_normal((tokens, weights.shape.k)).astype(np.float16))
                case = GemmCase(weights, ctx, inputs, [random_ids(rng, tokens, weights.shape.experts)])
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

    def compilation(self):
        """The first call of a process: with nothing compiled, with binaries on disk; and the call after it."""
        if "compile" not in self.settings.parts:
            return
        script = Path(__file__).with_name("opencl_first_call.py")
        shape = self.shapes[0]._replace(experts=min(16, self.shapes[0].experts))
        device = list_devices().index(self.backends[self.best].device)
        numbers = map(str, (device, shape.k, shape.n, shape.experts, shape.group_size))
        arguments = [sys.executable, str(script), self.best, *numbers]
        with tempfile.TemporaryDirectory() as folder:
            # Drivers have caches of their own, which would answer for ours.
            environment = os.environ | {
                "MARLIN_CY_CACHE_DIR": f"{folder}/own",
                "POCL_CACHE_DIR": f"{folder}/pocl",
                "CUDA_CACHE_DISABLE": "1",
                "PYOPENCL_NO_CACHE": "1",
            }
            for state in ("empty cache", "binaries on disk"):
                done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
                if done.returncode:
                    raise ValueError(f"{script.name} failed:\n{done.stderr}")
                self.compile.append({"tier": self.best, "state": state} | json.loads(done.stdout))

    def print(self):
        """The tables."""
        if self.gemm:
            self.screen.print("\nProducts: kernel time by OpenCL events, median of the launches")
            self.screen.print(_gemm_table(self.gemm))
        if self.layer:
            self.screen.print("\nWhole layer: from the first event's start to the last one's end, and its parts, µs")
            self.screen.print(_layer_table(self.layer))
        if self.host:
            self.screen.print("\nHost time of a warm gemm_phase_vllm call")
            rows = table("tier", ">tokens", ">µs", ">least", ">bar", "verdict")
            for one in self.host:
                figures = (f"{one[key]:.1f}" for key in ("us", "least_us", "bar"))
                rows.add_row(one["tier"], str(one["tokens"]), *figures, _verdict(one["passed"]))
            self.screen.print(rows)
        if self.compile:
            names = ("check of the tier", "first call", "second call")
            self.screen.print("\nFirst call of a process")
            rows = table("", *(f">{name}, s" for name in names), ">compiled", ">loaded")
            for one in self.compile:
                seconds = (f"{one[name]:.4f}" for name in names)
                rows.add_row(one["state"], *seconds, str(one["compiled"]), str(one["loaded"]))
            self.screen.print(rows)


PRODUCT_PARTS = ("", ": reduce_splits")  # labels of the events of a product itself


def _brief(cell):
    """A line while measuring."""
    return f"{cell['shape']}, {cell['tokens']} tokens, {cell['tier']}: {cell['us']['median']:.1f} µs"


def _verdict(passed):
    return {True: "[green]met[/green]", False: "[red]missed[/red]", None: ""}[passed]


def _gemm_table(cells):
    result = table(
        "K, N, experts",
        "tier",
        ">tokens",
        ">block",
        ">µs",
        ">p10–p90",
        ">span",
        ">CUDA\nMarlin",
        ">ratio",
        ">bar",
        ">× best\ntier",
        ">weights\nTB/s",
        ">TFLOP/s",
        ">relative\nerror",
        "verdict",
    )
    for cell in cells:
        missed = [name for name, passed in cell["checks"].items() if not passed]
        us = cell["us"]
        result.add_row(
            cell["shape"],
            cell["tier"],
            str(cell["tokens"]),
            str(cell["block_size"]),
            f"{us['median']:.1f}",
            f"{us['p10']:.1f}–{us['p90']:.1f}",
            f"{cell['span_us']:.1f}",
            _or_dash(cell["cuda_marlin_us"], "g"),
            _or_dash(cell["ratio"], ".2f"),
            _or_dash(cell["bar"], "g"),
            _or_dash(cell["ratio_to_best"], ".2f"),
            f"{cell['weight_bytes_per_second'] / 1e12:.3g}",
            f"{cell['flops'] / 1e12:.3g}",
            _or_dash(cell["error"], ".1e"),
            _verdict(not missed) + (f" ({', '.join(missed)})" if missed else ""),
        )
    return result


def _layer_table(layers):
    labels = list(dict.fromkeys(label for one in layers for label in one["labels_us"]))
    result = table(
        ">tokens",
        ">total",
        ">with the\nhost's gaps",
        ">products",
        ">ratio",
        ">bar",
        *(f">{label.replace(': ', ':' + chr(10))}" for label in labels),
        "verdict",
    )
    for one in layers:
        result.add_row(
            str(one["tokens"]),
            f"{one['us']:.1f}",
            f"{one['host_bound_us']:.1f}",
            f"{one['products_us']:.1f}",
            f"{one['ratio']:.2f}",
            _or_dash(one["bar"], "g"),
            *(_or_dash(one["labels_us"].get(label), ".1f") for label in labels),
            _verdict(one["passed"]),
        )
    return result


def _or_dash(value, form):
    return "—" if value is None else format(value, form)
