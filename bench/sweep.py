"""The tables: real shapes, from one row an expert to 256, and whole layers from one token to 1024."""

from dataclasses import dataclass

import numpy as np

from bench.own import gemm_call, gemm_flop, layer_call, layer_flop, read_side
from bench.shapes import ModelShape, build_stack, packed_bytes_estimate, routings
from bench.timing import CallTimer, alternate, ratios, spread
from marlin_cy import MoeLayer
from marlin_cy.commands.output import table

__all__ = ["Settings", "run_sweep"]

READ = "read"


@dataclass(frozen=True)
class Settings:
    """What to measure, and how carefully."""

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
    """One model's weights, ours and the peers'."""

    stacks: dict  # projection -> MarlinExpertStack
    peers: dict  # (peer, projection) -> list of functions


def run_sweep(backend, threads, torch_peers, settings, screen):
    """Measure every case, print each model's tables as they are ready; returns the JSON object's ``results``."""
    results = []
    for model in settings.models:
        weights = _build(backend, model, torch_peers, settings)
        experts = weights.stacks["gate_up"].num_experts
        screen.print(f"\n[bold]{model.name}[/bold]: {experts} experts, {model.hidden} -> {model.intermediate}")
        sweep = _Sweep(backend, model, threads, weights, torch_peers, settings)
        for title, cases in sweep.tables():
            rows = []
            for case in cases:
                rows += case()
            results += rows
            screen.print(f"\n{title}")
            screen.print(_table(rows, torch_peers.names))
    return results


def _build(backend, model, torch_peers, settings):
    """As many experts, and as many of the peers' weights, as the memory allows.

    Half of it is ours, an eighth goes to the peers' int4 weights and the rest to their dense ones;
    without peers all of it is ours.
    """
    shapes = model.projections.values()
    limit = settings.memory_bytes
    parts = {"torch_int4": limit // 8, "torch_bf16": limit * 3 // 8}
    own_part = limit - sum(parts[name] for name in torch_peers.names)
    own_bytes = sum(packed_bytes_estimate(k, n) for k, n in shapes)
    num_experts = min(model.num_experts, own_part // own_bytes)
    if num_experts < model.top_k:
        raise ValueError(
            f"--memory: {limit / 1e9:.3g} GB hold {num_experts} experts of {model.name}, of which {model.top_k} are "
            f"needed: expected at least {limit / own_part * model.top_k * own_bytes / 1e9:.3g} GB"
        )
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

    def __init__(self, backend, model, threads, weights, torch_peers, settings):
        self.model, self.weights, self.peers, self.settings = model, weights, torch_peers, settings
        self.read = read_side(threads, settings.quick)
        self.contexts = {
            (isa, dtype): backend.new_context(num_threads=threads, compute_dtype=dtype, isa=isa)
            for isa in settings.isas
            for dtype in settings.compute_dtypes
        }

    def tables(self):
        """``(title, cases)`` of each table; a case is called to measure it and returns its rows."""
        per_call = self.model.top_k
        for projection, (k, n) in self.model.projections.items():
            yield (
                f"{projection} {k} -> {n}, {per_call} experts a call",
                [lambda p=projection, m=rows: self._gemm(p, m) for rows in self.settings.rows],
            )
        yield (
            f"whole layer, top {per_call}",
            [lambda t=tokens: self._layer(t) for tokens in self.settings.tokens],
        )

    def _gemm(self, projection, rows):
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

    def _layer(self, tokens):
        gate_up, down = (self.weights.stacks[name] for name in ("gate_up", "down"))
        layer = MoeLayer(gate_up, down, top_k=self.model.top_k)
        drawn = routings(layer.num_experts, layer.top_k, tokens)
        hit = [dict(zip(*np.unique(ids, return_counts=True), strict=True)) for ids in drawn]
        own = {key: layer_call(layer, context, drawn) for key, context in self.contexts.items()}
        peers = {
            name: self.peers.layer_call(
                *(self.weights.peers[name, projection] for projection in ("gate_up", "down")),
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

    def _measure(self, case, own, peers, bytes_read, flop):
        """One row for each ISA and compute dtype, all measured against each other and the peers."""
        settings = self.settings
        sides = {READ: self.read}
        sides |= {name: CallTimer(call, settings.min_seconds) for name, call in (own | peers).items()}
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


def _table(rows, peers):
    result = table(
        ">tokens" if rows and rows[0]["kind"] == "layer" else ">rows an\nexpert",
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
