"""The tables over real shapes on an OpenCL device: products by rows per expert, whole layers by tokens.

Times are those of OpenCL events.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.common.shapes import ModelShape, experts_in_memory
from bench.common.timing import spread
from bench.opencl.calls import PLUG_BYTES, LayerCase, QueuePlug, Shape, Weights, profiled, warm_up
from marlin_cy.commands.output import table
from marlin_cy.opencl.timing import copy_bandwidth, times_of

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend
    from marlin_cy.opencl.context import OpenClContext

__all__ = ["Settings", "run_sweep"]

CASE_SECONDS = 1.0  # of launches: slower calls are launched fewer times
FEWEST_LAUNCHES = 3
MEMORY_SHARE = 0.5  # of the device memory, for weights, by default

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What to measure, and how often.

    Attributes
    ----------
    kinds : tuple of {"products", "layers"}
    backends : dict of str to OpenClBackend
        By tier, the best first.
    models : tuple of ModelShape
    rows : tuple of int
        Rows per expert of the products.
    tokens : tuple of int
        Tokens of the layers.
    memory_bytes : int or None
        For weights. None: half of the device memory.
    repeats : int
        Launches of a case.
    quick : bool
    """

    kinds: tuple[str, ...]
    backends: Mapping[str, OpenClBackend]
    models: tuple[ModelShape, ...]
    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    memory_bytes: int | None
    repeats: int
    quick: bool


def run_sweep(settings: Settings, screen: Console) -> dict[str, Any]:
    """Measure every case and print each table when it is complete; returns parts of the JSON document."""
    backend = next(iter(settings.backends.values()))
    contexts = [each.new_context(profiling=True) for each in settings.backends.values()]
    bandwidth = copy_bandwidth(contexts[0], (16 if settings.quick else 1024) << 20)
    limit = settings.memory_bytes or int(MEMORY_SHARE * backend.runtime.capabilities.global_memory)
    results: list[Row] = []
    for model in settings.models:
        stacks = _build(backend, model, limit)
        experts = stacks["gate_up"].shape.experts
        screen.print(f"\n[bold]{model.name}[/bold]: {experts} experts, {model.hidden} -> {model.intermediate}")
        for title, rows in _tables(stacks, contexts, model, settings, bandwidth):
            screen.print(f"\n{title}")
            screen.print(_table(rows))
            results += rows
        for weights in stacks.values():
            weights.release()
    return {"copy_bytes_per_second": bandwidth, "results": results}


def _build(backend: OpenClBackend, model: ModelShape, limit: int) -> dict[str, Weights]:
    """The stacks of a model by projection, with as many experts as the memory allows."""
    experts = experts_in_memory(model, limit, limit)
    return {
        name: Weights(backend, Shape(k, n, experts, group_size=model.group_size))
        for name, (k, n) in model.projections.items()
    }


def _tables(
    stacks: Mapping[str, Weights],
    contexts: Sequence[OpenClContext],
    model: ModelShape,
    settings: Settings,
    bandwidth: float,
) -> Iterator[tuple[str, list[Row]]]:
    """The title and the measured rows of each table."""
    if "products" in settings.kinds:
        for projection, weights in stacks.items():
            yield (
                f"{projection} {weights.shape.k} -> {weights.shape.n}, {model.top_k} experts per call",
                [
                    _gemm(weights, ctx, model, projection, count, settings, bandwidth)
                    for count in settings.rows
                    for ctx in contexts
                ],
            )
    if "layers" in settings.kinds:
        yield (
            f"whole layer, top {model.top_k}",
            [_layer(stacks, ctx, model, count, settings, bandwidth) for count in settings.tokens for ctx in contexts],
        )


def _gemm(
    weights: Weights,
    ctx: OpenClContext,
    model: ModelShape,
    projection: str,
    count: int,
    settings: Settings,
    bandwidth: float,
) -> Row:
    """A row of a table: ``count`` rows through each of ``top_k`` experts. Each call uses other experts."""
    shape, per_call = weights.shape, model.top_k
    backend = ctx.backend
    rng = np.random.default_rng(0)
    total = per_call * count
    x = backend.from_host(rng.standard_normal((total, shape.k), np.float32).astype(np.float16))
    out = backend.empty((total, shape.n), np.float16)
    begins = np.arange(per_call) * count

    def call(turn: int) -> None:
        experts = (turn * per_call + np.arange(per_call)) % shape.experts
        dispatches = np.stack([experts, begins, begins, np.full(per_call, count)], axis=1)
        weights.stack.gemm_phase_batched(ctx, x, dispatches, out, shape.k)

    calls = [functools.partial(call, turn) for turn in range(settings.repeats)]
    calls = calls[: _affordable(warm_up(ctx, calls), len(calls))]
    # A list of rows is uploaded before each product; the upload is not part of the kernels' time.
    collected = [[one for one in events if not one[0].startswith("upload")] for events in profiled(ctx, calls)]
    case = {
        "kind": "gemm",
        "model": model.name,
        "projection": projection,
        "k": shape.k,
        "n": shape.n,
        "num_experts": shape.experts,
        "experts_per_call": per_call,
        "rows": count,
    }
    seconds = [times_of(events).kernels for events in collected]
    return _row(case, ctx, seconds, per_call * weights.expert_bytes, 2 * total * shape.k * shape.n, bandwidth)


def _layer(
    stacks: Mapping[str, Weights],
    ctx: OpenClContext,
    model: ModelShape,
    tokens: int,
    settings: Settings,
    bandwidth: float,
) -> Row:
    """A row of a table: a whole layer."""
    case = LayerCase(
        stacks["gate_up"], stacks["down"], ctx, tokens, settings.repeats, np.random.default_rng(0), model.top_k
    )
    case.calls = case.calls[: _affordable(warm_up(ctx, case.calls[:1]), len(case.calls))]
    plug = QueuePlug(ctx, 0 if settings.quick else PLUG_BYTES)
    seconds = [times_of(events).span for events in case.events(plug)]
    plug.release()
    expert_bytes = sum(weights.expert_bytes for weights in stacks.values())
    per_row = sum(k * n for k, n in model.projections.values())
    about = {
        "kind": "layer",
        "model": model.name,
        "hidden": model.hidden,
        "intermediate": model.intermediate,
        "num_experts": case.layer.num_experts,
        "top_k": model.top_k,
        "rows": tokens,
        "experts_hit": case.experts_hit,
    }
    flop = 2 * tokens * model.top_k * per_row
    return _row(about, ctx, seconds, case.experts_hit * expert_bytes, flop, bandwidth)


def _affordable(seconds: float, most: int) -> int:
    """How many launches fit into the time of a case, if one takes ``seconds``: at most ``most``."""
    return max(FEWEST_LAUNCHES, min(most, int(CASE_SECONDS / max(seconds, 1e-9))))


def _row(
    case: Row, ctx: OpenClContext, seconds: Sequence[float], bytes_read: float, flop: float, bandwidth: float
) -> Row:
    median = statistics.median(seconds)
    return case | {
        "tier": ctx.backend.tier.name,
        "us": spread(np.multiply(seconds, 1e6))._asdict(),
        "gbps": bytes_read / median / 1e9,
        "gflops": flop / median / 1e9,
        "copy_gbps": bandwidth / 1e9,
        "copy_share": bytes_read / median / bandwidth,
    }


def _table(rows: list[Row]) -> Table:
    result = table(
        ">tokens" if rows[0]["kind"] == "layer" else ">rows per\nexpert",
        "tier",
        ">µs",
        ">p10–p90\nµs",
        ">weights\nGB/s",
        ">GFLOP/s",
        ">share of\ncopy GB/s",
    )
    for row in rows:
        us = row["us"]
        result.add_row(
            str(row["rows"]),
            row["tier"],
            f"{us['median']:.1f}",
            f"{us['p10']:.1f}–{us['p90']:.1f}",
            f"{row['gbps']:.4g}",
            f"{row['gflops']:.4g}",
            f"{row['copy_share']:.2f}",
        )
    return result
