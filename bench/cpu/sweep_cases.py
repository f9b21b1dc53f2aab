"""The tables over real shapes: products by rows per expert, and whole layers by tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.common.shapes import ModelShape, build_stack, experts_in_memory, routings
from bench.common.timing import Call, CallTimer, alternate, ratios, spread
from bench.cpu.calls import gemm_call, gemm_flop, layer_call, layer_flop, read_side
from bench.peers.torch_calls import TorchPeers
from marlin_cy import MarlinExpertStack, MoeLayer
from marlin_cy.commands.output import table
from marlin_cy.cpu import CpuBackend

__all__ = ["Settings", "run_sweep"]

READ = "read"
INT4_SHARE, DENSE_SHARE = 1 / 8, 3 / 8  # of the memory, for the weights of the peers

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What to measure, and how carefully.

    Attributes
    ----------
    kinds : tuple of {"products", "layers"}
    models : tuple of ModelShape
    rows : tuple of int
        Rows per expert of the products.
    tokens : tuple of int
        Tokens of the layers.
    compute_dtypes, isas : tuple of str
    memory_bytes : int
        For the weights of all sides.
    repeats : int
        Rounds.
    min_seconds, pause_seconds : float
        Least length of a block, and sleep before it.
    quick : bool
    """

    kinds: tuple[str, ...]
    models: tuple[ModelShape, ...]
    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    compute_dtypes: tuple[str, ...]
    isas: tuple[str, ...]
    memory_bytes: int
    repeats: int
    min_seconds: float
    pause_seconds: float
    quick: bool


@dataclass(frozen=True)
class _Weights:
    """The weights of one model, of this library and of the peers.

    Attributes
    ----------
    stacks : dict of str to MarlinExpertStack
        By projection.
    peers : dict of (str, str) to list of callable
        By peer and projection.
    """

    stacks: dict[str, MarlinExpertStack]
    peers: dict[tuple[str, str], list[Callable[[Any], Any]]]


def run_sweep(
    backend: CpuBackend, threads: int, torch_peers: TorchPeers, settings: Settings, screen: Console
) -> list[Row]:
    """Measure every case and print each table when it is complete; returns ``results`` of the JSON document."""
    results: list[Row] = []
    for model in settings.models:
        weights = _build(backend, model, torch_peers, settings)
        experts = weights.stacks["gate_up"].num_experts
        screen.print(f"\n[bold]{model.name}[/bold]: {experts} experts, {model.hidden} -> {model.intermediate}")
        sweep = _Sweep(backend, model, threads, weights, torch_peers, settings)
        for title, cases in sweep.tables():
            rows: list[Row] = []
            for case in cases:
                rows += case()
            results += rows
            screen.print(f"\n{title}")
            screen.print(_table(rows, torch_peers.names))
    return results


def _build(backend: CpuBackend, model: ModelShape, torch_peers: TorchPeers, settings: Settings) -> _Weights:
    """As many experts of this library, and as many weights of the peers, as the memory allows.

    Half of the memory is for this library, an eighth for the peers' int4 weights and the rest for their dense
    weights. Without peers all of it is for this library.
    """
    shapes = model.projections.values()
    limit = settings.memory_bytes
    parts = {"torch_int4": int(INT4_SHARE * limit), "torch_bf16": int(DENSE_SHARE * limit)}
    num_experts = experts_in_memory(model, limit - sum(parts[name] for name in torch_peers.names), limit)
    stacks = {
        projection: build_stack(backend, num_experts, k, n, model.group_size)
        for projection, (k, n) in model.projections.items()
    }
    peers = {}
    for name in torch_peers.names:
        peer_bytes = sum(torch_peers.weight_bytes(name, k, n) for k, n in shapes)
        copies = max(1, min(num_experts, parts[name] // peer_bytes))
        for projection, (k, n) in model.projections.items():
            peers[name, projection] = torch_peers.linears(name, copies, k, n, model.group_size)
    return _Weights(stacks, peers)


class _Sweep:
    """The cases of one model."""

    def __init__(
        self,
        backend: CpuBackend,
        model: ModelShape,
        threads: int,
        weights: _Weights,
        torch_peers: TorchPeers,
        settings: Settings,
    ) -> None:
        self.model, self.weights, self.peers, self.settings = model, weights, torch_peers, settings
        self.read = read_side(threads, settings.quick)
        self.contexts = {
            (isa, dtype): backend.new_context(num_threads=threads, compute_dtype=dtype, isa=isa)
            for isa in settings.isas
            for dtype in settings.compute_dtypes
        }

    def tables(self) -> Iterator[tuple[str, list[Callable[[], list[Row]]]]]:
        """``(title, cases)`` of each table. Calling a case measures it and returns its rows."""
        per_call = self.model.top_k
        if "products" in self.settings.kinds:
            for projection, (k, n) in self.model.projections.items():
                yield (
                    f"{projection} {k} -> {n}, {per_call} experts per call",
                    [functools.partial(self._gemm, projection, rows) for rows in self.settings.rows],
                )
        if "layers" in self.settings.kinds:
            yield (
                f"whole layer, top {per_call}",
                [functools.partial(self._layer, tokens) for tokens in self.settings.tokens],
            )

    def _gemm(self, projection: str, rows: int) -> list[Row]:
        stack, per_call = self.weights.stacks[projection], self.model.top_k
        own = {key: gemm_call(stack, context, rows, per_call) for key, context in self.contexts.items()}
        peers = {
            name: self.peers.gemm_call(self.weights.peers[name, projection], per_call, rows, stack.k)
            for name in self.peers.names
        }
        case = {
            "kind": "gemm",
            "model": self.model.name,
            "projection": projection,
            "k": stack.k,
            "n": stack.n_per_expert,
            "num_experts": stack.num_experts,
            "experts_per_call": per_call,
            "rows": rows,
        }
        bytes_read = stack.metadata.packed_bytes / stack.num_experts * per_call
        return self._measure(case, own, peers, bytes_read, gemm_flop(stack, rows, per_call))

    def _layer(self, tokens: int) -> list[Row]:
        gate_up, down = (self.weights.stacks[name] for name in ("gate_up", "down"))
        layer = MoeLayer(gate_up, down, top_k=self.model.top_k)
        drawn = routings(layer.num_experts, layer.top_k, tokens)
        hit = [dict(zip(*np.unique(ids, return_counts=True), strict=True)) for ids in drawn]
        own = {key: layer_call(layer, context, drawn) for key, context in self.contexts.items()}
        peers = {
            name: self.peers.layer_call(
                self.weights.peers[name, "gate_up"],
                self.weights.peers[name, "down"],
                [{int(expert): int(m) for expert, m in rows.items()} for rows in hit],
                self.model.hidden,
                self.model.intermediate,
            )
            for name in self.peers.names
        }
        experts_hit = float(np.mean([len(rows) for rows in hit]))
        case = {
            "kind": "layer",
            "model": self.model.name,
            "hidden": layer.hidden_size,
            "intermediate": layer.intermediate_size,
            "num_experts": layer.num_experts,
            "top_k": layer.top_k,
            "rows": tokens,
            "experts_hit": experts_hit,
        }
        packed = gate_up.metadata.packed_bytes + down.metadata.packed_bytes
        return self._measure(case, own, peers, packed / layer.num_experts * experts_hit, layer_flop(layer, tokens))

    def _measure(
        self,
        case: Row,
        own: Mapping[tuple[str, str], Call],
        peers: Mapping[str, Call],
        bytes_read: float,
        flop: float,
    ) -> list[Row]:
        """One row per ISA and compute dtype, all measured against each other and the peers."""
        settings = self.settings
        sides: dict[Any, Callable[[], float]] = {READ: self.read}
        for calls in (own, peers):
            sides |= {name: CallTimer(call, settings.min_seconds) for name, call in calls.items()}
        figures = alternate(sides, settings.repeats, settings.pause_seconds)
        rows = []
        for isa, dtype in own:
            seconds = figures[isa, dtype]
            median = spread(seconds).median
            rows.append(
                case
                | {
                    "isa": isa,
                    "compute_dtype": dtype,
                    "us": spread(np.multiply(seconds, 1e6))._asdict(),
                    "gbps": bytes_read / median / 1e9,
                    "gflops": flop / median / 1e9,
                    "read_gbps": spread(figures[READ]).median / 1e9,
                    "read_share": ratios(np.divide(bytes_read, seconds), figures[READ])._asdict(),
                    "speedup": {name: ratios(figures[name], seconds)._asdict() for name in peers},
                    "peer_us": {name: spread(np.multiply(figures[name], 1e6))._asdict() for name in peers},
                }
            )
        return rows


def _table(rows: list[Row], peers: list[str]) -> Table:
    result = table(
        ">tokens" if rows and rows[0]["kind"] == "layer" else ">rows per\nexpert",
        "compute",
        "ISA",
        ">µs",
        ">p10–p90\nµs",
        ">weights\nGB/s",
        ">GFLOP/s",
        ">share of\nread GB/s",
        *(f">× {name}\n(p10–p90)" for name in peers),
    )
    for row in rows:
        us = row["us"]
        result.add_row(
            str(row["rows"]),
            row["compute_dtype"],
            row["isa"],
            f"{us['median']:.1f}",
            f"{us['p10']:.1f}–{us['p90']:.1f}",
            f"{row['gbps']:.2f}",
            f"{row['gflops']:.0f}",
            f"{row['read_share']['median']:.2f}",
            *("{median:.2f} ({p10:.2f}–{p90:.2f})".format(**row["speedup"][name]) for name in peers),
        )
    return result
