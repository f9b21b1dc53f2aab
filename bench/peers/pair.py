"""This library and one peer, timed in turns in a process of their own, where no other library has threads.

Three *parts* are timed, each for several numbers of rows or tokens:

``projection``  one weight ``[K, N]`` times the rows of the case; each call uses another expert's weight
``routed``      one projection of a layer's experts: each token times the weights of its top-k experts
``layer``       both products of the experts, the activation between them, and the weighted sum

A peer without an operator for ``routed`` or ``layer`` is called once per expert, see ``stand_ins.py``.

``python -m bench.peers.pair FILE`` reads :class:`~bench.peers.settings.PairSettings` as JSON from stdin and writes the
result of :func:`measure_pair` to FILE.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.common.machine import openmp_runtimes
from bench.common.shapes import DISTINCT_WEIGHTS, ModelShape, in_turn, quantised_normal_weight, routings
from bench.common.timing import Call, CallTimer, alternate, pause_check, ratios, spread
from bench.cpu.calls import peak_side, read_side
from bench.peers import Peer, Projection, WrongResult, check, check_moe, check_routed, peer_named
from bench.peers.interface import Array
from bench.peers.ours import OURS
from bench.peers.settings import PARTS, PairSettings
from bench.peers.stand_ins import CallPerExpert, ProductsOnly
from marlin_cy.errors import UnsupportedError
from marlin_cy.weights.canonical import CanonicalWeight

__all__ = ["measure_pair"]

# With this many rows, arithmetic limits the speed of a projection. Few weights are then used in turn, so that the
# inputs stay in cache as they would in a model: some peers need one copy of the input per weight. With this many
# tokens nearly all experts are used, and two routings represent all others.
MANY_ROWS = 64
FEW_WEIGHTS = 4
FEW_ROUTINGS = 2
FEWEST_ROUNDS = 3
PAUSE_CHECK_ROUNDS = 5
DEVIATION = 0.02  # of the weights: gates are then about 1, where the activation function is not linear
FAILURES = (UnsupportedError, WrongResult, MemoryError, RuntimeError, ValueError)


def measure_pair(settings: PairSettings) -> dict[str, Any]:
    """Load, check and time a peer and this library.

    Returns
    -------
    dict
        ``sides`` (by name: library, version, accuracy, threads; ``errors``, ``skipped`` and ``fused`` by part),
        ``cases`` (each with the times of all sides), ``pause_check``, ``openmp_runtimes``, ``read_bytes_per_second``,
        ``peak_ops_per_second`` (None if not known), ``seconds``.
    """
    return _Pair(settings).measure()


class _Pair:
    """The sides, their weights, and the cases so far."""

    def __init__(self, settings: PairSettings) -> None:
        self.settings, self.rng = settings, np.random.default_rng(0)
        self.peers: dict[str, Peer] = {
            made.name: made for made in (ours(settings.threads, settings.isa) for ours in OURS)
        }
        if settings.peer:
            adapter = peer_named(settings.peer)
            spare = len(os.sched_getaffinity(0)) - adapter.extra_threads
            self.peers[settings.peer] = adapter(max(1, min(settings.threads, spare)))
        self.sides: dict[str, dict[str, Any]] = {
            name: {
                "library": peer.distribution,
                "version": peer.version,
                "accuracy": peer.accuracy,
                "threads": peer.num_threads,
                "errors": {},
                "fused": {},
                "skipped": {},
            }
            for name, peer in self.peers.items()
        }
        self.cases: list[dict[str, Any]] = []
        self.pause_check: dict[str, float] | None = None
        self.seconds: dict[str, float] = {}
        self.weights = {name: self._experts(k, n) for name, (k, n) in settings.model.projections.items()}
        self.projections: dict[tuple[str, str], list[Projection]] = {}

    def measure(self) -> dict[str, Any]:
        """The result of :func:`measure_pair`."""
        settings = self.settings
        missing = self.peers[settings.peer].available() if settings.peer else None
        if missing is not None:
            self.sides[settings.peer]["skipped"] = dict.fromkeys(PARTS, missing)
        else:
            for part in PARTS:
                if settings.cases.get(part):
                    getattr(self, f"_{part}")()
        read, peak = read_side(settings.threads, settings.quick)(), peak_side(settings.threads, settings.isa)
        return {
            "sides": self.sides,
            "cases": self.cases,
            "pause_check": self.pause_check,
            "openmp_runtimes": openmp_runtimes(),
            "read_bytes_per_second": read,
            "peak_ops_per_second": None if peak is None else peak(),
            "seconds": self.seconds,
        }

    def _experts(self, k: int, n: int) -> list[CanonicalWeight]:
        """One weight per expert, a few different ones in turn. Each side gives every expert memory of its own."""
        settings = self.settings
        distinct = [
            quantised_normal_weight(self.rng, k, n, settings.model.group_size, DEVIATION)[0]
            for _ in range(min(DISTINCT_WEIGHTS, settings.num_experts))
        ]
        return in_turn(distinct, settings.num_experts)

    def _load(self, part: str, load: Callable[[Peer], tuple[Any, float]]) -> dict[str, Any]:
        """``load(peer)`` of every side. Empty if the peer cannot load: the reason is noted, and nothing is compared."""
        loaded: dict[str, Any] = {}
        start = time.perf_counter()
        for name, peer in reversed(self.peers.items()):  # the peer before this library
            try:
                loaded[name], self.sides[name]["errors"][part] = load(peer)
                self.sides[name]["fused"][part] = not isinstance(loaded[name], CallPerExpert | ProductsOnly)
            except FAILURES as error:
                if name != self.settings.peer:
                    raise
                self.sides[name]["skipped"][part] = _reason(error)
                return {}
        self.seconds[f"load {part}"] = time.perf_counter() - start
        return dict(reversed(loaded.items()))

    def _projections_of(self, peer: Peer, which: str) -> list[Projection]:
        """A peer's products of single experts, loaded once. Experts share them if the peer limits their number."""
        key, weights = (peer.name, which), self.weights[which]
        if key not in self.projections:
            self.projections[key] = in_turn(peer.load_all(weights[: peer.most_weights]), len(weights))
        return self.projections[key]

    def _projection(self) -> None:
        weights = self.weights["gate_up"]

        def load(peer: Peer) -> tuple[Any, float]:
            projections = self._projections_of(peer, "gate_up")
            return projections, check(peer, weights[0], self.rng, projections[0])

        loaded = self._load("projection", load)
        for rows in self.settings.cases["projection"] if loaded else ():
            x = self.rng.standard_normal((rows, weights[0].k), np.float32)
            turns = len(weights) if rows < MANY_ROWS else min(FEW_WEIGHTS, len(weights))

            def prepare(
                projections: Sequence[Projection], x: Array = x, turns: int = turns
            ) -> list[Callable[[], object]]:
                return [_ready(projection, x) for projection in projections[:turns]]

            self._case("projection", rows, 1, 1.0, loaded, prepare)

    def _routed(self) -> None:
        weights, top_k = self.weights["gate_up"], self.settings.model.top_k

        def load(peer: Peer) -> tuple[Any, float]:
            loaded: Any
            if peer.available_routed() is None:
                loaded = peer.load_routed(weights)
            else:
                loaded = CallPerExpert(self._projections_of(peer, "gate_up"))
            return loaded, check_routed(peer, weights, top_k, self.rng, loaded)

        loaded = self._load("routed", load)
        self._by_tokens("routed", loaded, lambda x, ids, weights: (x, ids))

    def _layer(self) -> None:
        gate_up, down = self.weights["gate_up"], self.weights["down"]
        top_k = self.settings.model.top_k

        def load(peer: Peer) -> tuple[Any, float]:
            if peer.available_moe() is None:
                for which in self.weights:
                    self.projections.pop((peer.name, which), None)
                gc.collect()
                loaded = peer.load_moe(gate_up, down)
                return loaded, check_moe(peer, gate_up, down, top_k, self.rng, loaded)
            first, second = (self._projections_of(peer, which) for which in self.weights)
            errors = [
                check(peer, weights[0], self.rng, products[0])
                for weights, products in zip(self.weights.values(), (first, second), strict=True)
            ]
            return ProductsOnly(first, second, down[0].k), max(errors)

        self._by_tokens("layer", self._load("layer", load), lambda *routed: routed)

    def _by_tokens(self, part: str, loaded: Mapping[str, Any], arguments: Callable[..., tuple[Array, ...]]) -> None:
        """Time each number of tokens. ``arguments`` picks those of ``prepare`` from tokens, ids and weights."""
        model, num_experts = self.settings.model, self.settings.num_experts
        for tokens in self.settings.cases[part] if loaded else ():
            x = self.rng.standard_normal((tokens, model.hidden), np.float32)
            drawn = routings(num_experts, model.top_k, tokens)
            if tokens >= MANY_ROWS:
                drawn = drawn[:FEW_ROUTINGS]
            shares = np.full((tokens, model.top_k), 1 / model.top_k, np.float32)
            hit = float(np.mean([len(np.unique(ids)) for ids in drawn]))

            def prepare(
                side: Any, x: Array = x, drawn: Sequence[Array] = drawn, shares: Array = shares
            ) -> list[Callable[[], object]]:
                return [_ready(side, *arguments(x, ids, shares)) for ids in drawn]

            self._case(part, tokens, model.top_k, hit, loaded, prepare)

    def _case(
        self,
        part: str,
        m: int,
        top_k: int,
        experts_hit: float,
        loaded: Mapping[str, Any],
        prepare: Callable[[Any], list[Callable[[], object]]],
    ) -> None:
        """Time one case. The sides take turns; each call of a side uses its next prepared input."""
        settings = self.settings
        calls: dict[str, Call] = {}
        for name, side in loaded.items():
            try:
                runs = prepare(side)
                for run in runs:  # a first run may allocate memory, which is not timed
                    run()
                calls[name] = _in_turn(runs)
            except FAILURES as error:
                if name != settings.peer:
                    raise
                self.sides[name]["skipped"][f"{part} {m}"] = _reason(error)
                return
        timers = {name: CallTimer(call, settings.min_seconds) for name, call in calls.items()}
        pause = settings.pause_seconds
        if settings.peer and not settings.quick:
            pause += self.peers[settings.peer].spin_seconds
        if self.pause_check is None and settings.peer in timers:
            rounds = min(PAUSE_CHECK_ROUNDS, settings.repeats)
            self.pause_check = pause_check(timers[OURS[0].name], timers[settings.peer], pause, rounds)
        start = time.perf_counter()
        for call in calls.values():
            call(1)
        a_round = time.perf_counter() - start + len(calls) * (settings.min_seconds + pause)
        rounds = max(FEWEST_ROUNDS, min(settings.repeats, int(settings.case_seconds / a_round)))
        figures = alternate(timers, min(rounds, settings.repeats), pause)
        k, n = settings.model.projections["gate_up"]
        down = settings.model.projections["down"] if part == "layer" else (0, 0)
        self.cases.append(
            {
                "part": part,
                "m": m,
                "peer": settings.peer or None,
                "num_experts": settings.num_experts,
                "experts_hit": experts_hit,
                "flop": 2 * m * top_k * (k * n + down[0] * down[1]),
                "weight_bytes": experts_hit * sum(_stored(settings.model, *shape) for shape in ((k, n), down)),
                "rounds": len(figures[OURS[0].name]),
                "us": {name: spread(np.multiply(seconds, 1e6))._asdict() for name, seconds in figures.items()},
                "ratio": {
                    ours.name: ratios(figures[settings.peer], figures[ours.name])._asdict()
                    for ours in OURS
                    if settings.peer
                },
            }
        )


def _reason(error: Exception) -> str:
    """Why a side could not do something."""
    words = " ".join(str(error).split())
    return words if isinstance(error, UnsupportedError) else f"{type(error).__name__}: {words}"


def _stored(model: ModelShape, k: int, n: int) -> int:
    """Bytes of a weight that have to be read: 4-bit codes, and a 16-bit scale per group."""
    return k * n // 2 + k // model.group_size * n * 2


def _ready(side: Any, *arguments: Array) -> Callable[[], object]:
    """``side.run`` on a prepared input."""
    prepared = side.prepare(*arguments)
    return lambda: side.run(prepared)


def _in_turn(runs: Sequence[Callable[[], object]]) -> Call:
    """A call that makes the next run."""
    return lambda i: runs[i % len(runs)]()


def main(output: str) -> None:
    """Measure as the settings on stdin say."""
    settings = PairSettings.from_json(sys.stdin.read())
    Path(output).write_text(json.dumps(measure_pair(settings), allow_nan=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
