"""``python -m bench opencl attention``: attention over a paged cache alone, in µs, by OpenCL events.

A case is a number of sequences, the rows of each, and the depth: the positions in the cache before these rows. The
cache is float16 and holds random numbers. Each layer has its own, so that the device's second-level cache does not hold
what a step reads. ``--builds`` times builds of the tensor-core kernel one after the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bench.common.options import add_output, add_quick, positive, values
from bench.common.results import save

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend
    from marlin_cy.opencl.decoder.attention import Attend, Kernels, Shape

__all__ = ["add_options", "run"]

WARM_STEPS = 2
PEAKS = {"H200": (989.0, 4800.0), "H100": (989.0, 3350.0), "A100": (312.0, 2039.0)}
"""TFLOP/s of dense float16 products, and GB/s of memory, by a part of the device's name."""
OUTPUT_TYPE = 1  # float16
BYTES = 2  # of a value of the cache


class Case(NamedTuple):
    """``sequences`` of ``rows`` rows each, after ``depth`` positions."""

    sequences: int
    rows: int
    depth: int

    def __str__(self) -> str:
        return f"{self.sequences} x {self.rows} rows, depth {self.depth}"

    @property
    def pairs(self) -> int:
        """Pairs of a row and a position that it sees."""
        return self.sequences * (self.rows * self.depth + self.rows * (self.rows + 1) // 2)

    @property
    def positions(self) -> int:
        """Positions of all sequences."""
        return self.sequences * (self.rows + self.depth)


CASES = (
    *(Case(1, 1, depth) for depth in (128, 4095, 32767)),
    *(Case(count, 1, 1023) for count in (4, 16, 32)),
    *(Case(1, rows, 0) for rows in (16, 128, 512, 1024)),
    *(Case(1, 1024, depth) for depth in (1024, 2048, 3072)),
    Case(1, 4, 32764),
    Case(1, 512, 32256),
)
QUICK_CASES = (Case(1, 1, 40), Case(2, 1, 100), Case(1, 20, 30))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--device", metavar="NAME", help="as MARLIN_CY_OPENCL_DEVICE")
    parser.add_argument("--tier", metavar="NAME", help="mma, subgroup or portable; default: the device's best one")
    parser.add_argument("--heads", type=positive, default=32, metavar="N", help="query heads (default: 32)")
    parser.add_argument("--kv-heads", type=positive, default=4, metavar="N", help="default: 4")
    parser.add_argument("--head-dim", type=positive, default=128, metavar="N", help="default: 128")
    parser.add_argument("--layers", type=positive, default=4, metavar="N", help="caches in turn (default: 4)")
    parser.add_argument("--repeat", type=positive, default=5, metavar="N", help="times of each layer (default: 5)")
    parser.add_argument("--cases", type=cases, metavar="1x512@0,4x1@4095", help="SEQUENCESxROWS@DEPTH,...")
    parser.add_argument(
        "--builds", type=builds, default=[None], metavar="4:2:32:1,...", help="WAVES:STRIPS:KEYS:QUERIES_LOCAL of tiles"
    )
    parser.add_argument("--splits", type=values(positive), default=[None], metavar="33,66", help="of single rows")
    add_output(parser)
    add_quick(parser)


def cases(text: str) -> list[Case]:
    """The type of ``--cases``."""
    found = []
    for part in text.split(","):
        sizes, depth = part.split("@")
        sequences, rows = sizes.split("x")
        found.append(Case(positive(sequences), positive(rows), int(depth)))
    return found


def builds(text: str) -> list[tuple[int, ...] | None]:
    """The type of ``--builds``."""
    return [tuple(int(number) for number in part.split(":")) for part in text.split(",")]


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and save; returns the exit code."""
    from bench.opencl.machine import document_of
    from marlin_cy import get_backend
    from marlin_cy.commands.output import console
    from marlin_cy.opencl.decoder.attention import Shape

    screen = console()
    options = {name: getattr(arguments, name) for name in ("device", "tier") if getattr(arguments, name) is not None}
    backend: Any = get_backend("opencl", **options)
    shape = Shape(arguments.heads, arguments.kv_heads, arguments.head_dim, arguments.head_dim)
    wanted = arguments.cases or (QUICK_CASES if arguments.quick else CASES)
    layers, repeat = (2, 2) if arguments.quick else (arguments.layers, arguments.repeat)
    document = document_of("opencl-attention", {backend.tier.name: backend}, screen)
    name = backend.runtime.capabilities.name
    peaks = next((peaks for part, peaks in PEAKS.items() if part in name), None)
    document["us"] = results = {}
    longest = max(case.positions for case in wanted)
    for build, splits in itertools.product(arguments.builds, arguments.splits):
        bench = AttentionBench(backend, shape, layers, longest, build, splits)
        screen.print(f"{shape}, splits at most {splits}, {bench.kernels}; µs:")
        for case in wanted:
            times = bench.time(case, repeat)
            total = sum(times.values())
            results[f"{build} {splits}: {case}"] = times
            flops = 4 * case.pairs * shape.num_heads * shape.head_dim / total / 1e6  # TFLOP/s
            read = 2 * case.positions * shape.num_kv_heads * shape.head_dim * BYTES / total / 1e3  # GB/s
            share = "" if peaks is None else f" {flops / peaks[0]:6.1%} {read / peaks[1]:6.1%} of peak"
            parts = ", ".join(f"{label} {each:.1f}" for label, each in times.items())
            screen.print(f"  {case!s:32} {total:10.1f} {flops:8.1f} TFLOP/s {read:8.0f} GB/s{share}  {parts}")
    print(f"\nSaved to {save(document, arguments.output)}")
    return 0


class AttentionBench:
    """Attention of some layers.

    Parameters
    ----------
    backend : OpenClBackend
    shape : Shape
    layers : int
    positions : int
        Of the cache.
    build : tuple of int or None
        Of the tensor-core kernel for tiles; None for the one that the decoder takes.
    splits : int or None
        Of single rows, at most; None for the decoder's number.

    Attributes
    ----------
    kernels : Kernels
    """

    def __init__(
        self,
        backend: OpenClBackend,
        shape: Shape,
        layers: int,
        positions: int,
        build: tuple[int, ...] | None = None,
        splits: int | None = None,
    ) -> None:
        from marlin_cy.decoder.cache import pages_of
        from marlin_cy.opencl.context import OpenClContext
        from marlin_cy.opencl.decoder.attention import Attend
        from marlin_cy.opencl.recording import RecordingContext

        self._backend, self._shape, self._splits = backend, shape, splits
        self._ctx = OpenClContext(backend, profiling=True)
        self._recorder = RecordingContext(backend, self._ctx.queue)
        rng = np.random.default_rng(0)
        sample = rng.standard_normal(1 << 20, np.float32).astype(np.float16)
        pages = pages_of(positions)
        self._attends: list[Attend] = [
            Attend(shape, cache_of(backend, shape, pages, sample), shape.head_dim**-0.5) for _ in range(layers)
        ]
        self.kernels: Kernels = self._attends[0].kernels(backend, OUTPUT_TYPE)
        if build is not None:
            assert self.kernels.tiles, "the device has no tensor-core kernel for this shape"
            waves, strips, keys, local = build
            tiles = dataclasses.replace(
                self.kernels.tiles[0], waves=waves, wave_strips=strips, keys=keys, queries_local=bool(local)
            )
            self.kernels = self.kernels._replace(tiles=[tiles])

    def time(self, case: Case, repeat: int) -> dict[str, float]:
        """The median µs of each kernel of a case."""
        from marlin_cy.decoder.program import Batch
        from marlin_cy.opencl.buffers import Rows
        from marlin_cy.opencl.decoder.maker import Maker
        from marlin_cy.opencl.decoder.program import SPLIT_TOKENS, TILE_SPLIT_TOKENS
        from marlin_cy.opencl.decoder.step import Cuts, StepLayout, describe_step
        from marlin_cy.opencl.memory import uploaded

        shape, backend = self._shape, self._backend
        runtime = backend.runtime
        rows = case.sequences * case.rows
        first = np.arange(case.sequences) * case.rows
        segments = np.stack([first, first * 0 + case.rows, first * 0 + case.depth, first * 0 - 1], axis=1)
        pages = -(-(case.depth + case.rows) // 16)
        numbers = np.arange(case.sequences * pages, dtype=np.int32).reshape(case.sequences, pages)
        batch = Batch(np.zeros(rows, np.int32), segments.astype(np.int64), numbers, np.zeros(0, np.int32))
        layout = StepLayout(rows)
        one, device = self._attends[0], runtime.capabilities
        cuts = Cuts(
            one.tile_rows(device, self.kernels, rows),
            self._splits or one.most_splits(device, self.kernels),
            one.most_tile_splits(device, self.kernels, rows),
        )
        step, known = describe_step(batch, layout, cuts, SPLIT_TOKENS, TILE_SPLIT_TOKENS)
        rng = np.random.default_rng(0)
        width = shape.num_heads * shape.head_dim
        q = Rows(uploaded(runtime, rng.standard_normal((rows, width), np.float32), "queries"), 0, 0, rows, width)
        recordings = []
        for attend in self._attends:
            self._recorder.begin()
            maker = Maker(self._recorder, uploaded(runtime, step, "step"), layout, rows)
            output = maker.room("attention", width, OUTPUT_TYPE)
            attend.record(maker, q, shape.head_dim, output, cuts, self.kernels)
            recordings.append(self._recorder.recording)
        times: dict[str, list[float]] = defaultdict(list)
        for number in range(WARM_STEPS + repeat):
            events = [
                pair for recording in recordings for pair in recording.enqueue_with_events(self._ctx.queue, known)
            ]
            self._ctx.finish()
            for label, event in events if number >= WARM_STEPS else []:
                times[label].append((event.profile.end - event.profile.start) / 1e3)
        return {label: statistics.median(each) for label, each in times.items()}


def cache_of(backend: OpenClBackend, shape: Shape, pages: int, sample: Any) -> Any:
    """A layer's cache, filled with copies of ``sample``."""
    import pyopencl as cl

    from marlin_cy.decoder.plan import AttentionPlan
    from marlin_cy.opencl.decoder.cache import KvPool

    none: Any = None
    plan = AttentionPlan(
        q=none,
        k=none,
        v=none,
        o=none,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        scale=1.0,
    )
    pool = KvPool(backend.runtime, plan, pages, "float16")
    runtime = backend.runtime
    for buffer in (pool.keys, pool.values):
        for begin in range(0, buffer.size, sample.nbytes):
            part = sample[: min(sample.nbytes, buffer.size - begin) // 2]
            cl.enqueue_copy(runtime.loading_queue, buffer, part, dst_offset=begin)
    runtime.loading_queue.finish()
    return pool
