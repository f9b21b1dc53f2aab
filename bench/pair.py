"""This library and one peer, timed in turns in a process of their own, so that no third library's threads are there.

What is timed has three *parts*, each over numbers of rows or tokens:

``projection``  one weight ``[K, N]``, as many rows as the case says; another expert's weight for every call
``routed``      one product of a layer's experts: tokens, each through its top-k
``layer``       both products of the experts, the activation between them, and the weighted sum

A peer without an operator for the last two gets one call an expert, over rows that were gathered beforehand; for
``layer`` the activation and the sum are left out, too. That is in its favour.

``python -m bench.pair`` reads :class:`PairSettings` as JSON from stdin and writes what :func:`measure_pair` returns to
the file named as its argument.
"""

import dataclasses
import gc
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.machine import openmp_runtimes
from bench.ours import OURS
from bench.own import peak_side, read_side
from bench.peers import PEERS, RoutedProduct, WrongResult, check, check_moe, check_routed
from bench.shapes import DISTINCT_WEIGHTS, ModelShape, quantised_normal_weight, routings
from bench.timing import CallTimer, alternate, pause_check, ratios, spread
from marlin_cy.errors import UnsupportedError

__all__ = ["PARTS", "PairSettings", "measure_pair"]

PARTS = ("projection", "routed", "layer")
# From so many rows on, a projection's speed is limited by arithmetic: few weights take turns, so that the inputs, of
# which some peers need one a weight, stay in the cache, as they would in a model. From so many tokens on nearly all
# experts are hit, so that two routings are as good as more.
MANY_ROWS = 64
FEW_WEIGHTS = 4
FEW_ROUTINGS = 2
FEWEST_ROUNDS = 3
PAUSE_CHECK_ROUNDS = 5
DEVIATION = 0.02  # of the weights, so that gates are about 1 and the activation is bent where it matters
FAILURES = (UnsupportedError, WrongResult, MemoryError, RuntimeError, ValueError)


@dataclass(frozen=True)
class PairSettings:
    """What to measure, and how carefully.

    Attributes
    ----------
    peer : str
        Name of one of ``bench.peers.PEERS``; "" for this library alone.
    model : ModelShape
    cases : dict of str to list of int
        Rows or tokens of each part.
    num_experts : int
        How many are loaded, of every side's.
    isa : str
        This library's.
    repeats : int
        Rounds at most.
    case_seconds : float
        Rounds are fewer, but 3, where all together would take longer than this.
    """

    peer: str
    model: ModelShape
    cases: dict
    num_experts: int
    threads: int
    isa: str
    repeats: int
    min_seconds: float
    pause_seconds: float
    case_seconds: float
    quick: bool

    @classmethod
    def from_json(cls, text):
        """The settings that :meth:`to_json` wrote."""
        fields = json.loads(text)
        return cls(**fields | {"model": ModelShape(**fields["model"])})

    def to_json(self):
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))


def measure_pair(settings):
    """Load, check and time a peer and this library.

    Returns
    -------
    dict
        ``sides`` (by name: library, version, accuracy, threads; ``errors``, ``skipped`` and ``fused`` by part),
        ``cases`` (each with the times of all sides), ``pause_check``, ``openmp_runtimes``, ``read_bytes_per_second``,
        ``peak_ops_per_second`` (None where it is not known), ``seconds``.
    """
    return _Pair(settings).measure()


class _Pair:
    def __init__(self, settings):
        self.settings, self.rng = settings, np.random.default_rng(0)
        self.peers = {made.name: made for made in (ours(settings.threads, settings.isa) for ours in OURS)}
        if settings.peer:
            (adapter,) = (adapter for adapter in PEERS if adapter.name == settings.peer)
            spare = len(os.sched_getaffinity(0)) - adapter.extra_threads
            self.peers[settings.peer] = adapter(max(1, min(settings.threads, spare)))
        self.sides = {
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
        self.cases, self.pause_check, self.seconds = [], None, {}
        self.weights = {name: self._experts(k, n) for name, (k, n) in settings.model.projections.items()}
        self.projections = {}

    def measure(self):
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
            "peak_ops_per_second": peak and peak(),
            "seconds": self.seconds,
        }

    def _experts(self, k, n):
        """As many weights as experts, a few different ones in turn: each side gives every expert memory of its own."""
        settings = self.settings
        distinct = [
            quantised_normal_weight(self.rng, k, n, settings.model.group_size, DEVIATION)[0]
            for _ in range(min(DISTINCT_WEIGHTS, settings.num_experts))
        ]
        return [distinct[expert % len(distinct)] for expert in range(settings.num_experts)]

    def _load(self, part, load):
        """``load(peer)`` of every side; nothing, and the reason, where the peer cannot: there is nothing to compare."""
        loaded, start = {}, time.perf_counter()
        for name, peer in reversed(self.peers.items()):  # the peer, then ours
            try:
                loaded[name], self.sides[name]["errors"][part] = load(peer)
                self.sides[name]["fused"][part] = not isinstance(loaded[name], _CallAnExpert | _ProductsAlone)
            except FAILURES as error:
                if name != self.settings.peer:
                    raise
                self.sides[name]["skipped"][part] = _reason(error)
                return {}
        self.seconds[f"load {part}"] = time.perf_counter() - start
        return dict(reversed(loaded.items()))

    def _projections_of(self, peer, which):
        """A peer's products of single experts, loaded once; as few as it asks for, which several experts then share."""
        key, weights = (peer.name, which), self.weights[which]
        if key not in self.projections:
            loaded = peer.load_all(weights[: peer.most_weights])
            self.projections[key] = [loaded[expert % len(loaded)] for expert in range(len(weights))]
        return self.projections[key]

    def _projection(self):
        weights = self.weights["gate_up"]

        def load(peer):
            projections = self._projections_of(peer, "gate_up")
            return projections, check(peer, weights[0], self.rng, projections[0])

        loaded = self._load("projection", load)
        for rows in self.settings.cases["projection"] if loaded else ():
            x = self.rng.standard_normal((rows, weights[0].k), np.float32)
            turns = len(weights) if rows < MANY_ROWS else min(FEW_WEIGHTS, len(weights))

            def prepare(projections, x=x, turns=turns):
                return [_ready(projection, x) for projection in projections[:turns]]

            self._case("projection", rows, 1, 1.0, loaded, prepare)

    def _routed(self):
        weights, top_k = self.weights["gate_up"], self.settings.model.top_k

        def load(peer):
            if peer.available_routed() is None:
                loaded = peer.load_routed(weights)
            else:
                loaded = _CallAnExpert(self._projections_of(peer, "gate_up"))
            return loaded, check_routed(peer, weights, top_k, self.rng, loaded)

        loaded = self._load("routed", load)
        self._by_tokens("routed", loaded, lambda x, ids, weights: (x, ids))

    def _layer(self):
        gate_up, down = self.weights["gate_up"], self.weights["down"]
        top_k = self.settings.model.top_k

        def load(peer):
            if peer.available_moe() is None:
                for which in self.weights:
                    self.projections.pop((peer.name, which), None)
                gc.collect()
                loaded = peer.load_moe(gate_up, down)
                return loaded, check_moe(peer, gate_up, down, top_k, self.rng, loaded)
            parts = [self._projections_of(peer, which) for which in self.weights]
            errors = [
                check(peer, weights[0], self.rng, products[0])
                for weights, products in zip(self.weights.values(), parts, strict=True)
            ]
            return _ProductsAlone(*parts, down[0].k), max(errors)

        self._by_tokens("layer", self._load("layer", load), lambda *routed: routed)

    def _by_tokens(self, part, loaded, arguments):
        model, num_experts = self.settings.model, self.settings.num_experts
        for tokens in self.settings.cases[part] if loaded else ():
            x = self.rng.standard_normal((tokens, model.hidden), np.float32)
            drawn = [ids.astype(np.int32) for ids in routings(num_experts, model.top_k, tokens)]
            if tokens >= MANY_ROWS:
                drawn = drawn[:FEW_ROUTINGS]
            shares = np.full((tokens, model.top_k), 1 / model.top_k, np.float32)
            hit = float(np.mean([len(np.unique(ids)) for ids in drawn]))

            def prepare(side, x=x, drawn=drawn, shares=shares):
                return [_ready(side, *arguments(x, ids, shares)) for ids in drawn]

            self._case(part, tokens, model.top_k, hit, loaded, prepare)

    def _case(self, part, m, top_k, experts_hit, loaded, prepare):
        """Time one case: each side's calls take turns, and the calls of a side go through what it has prepared."""
        settings = self.settings
        calls = {}
        for name, side in loaded.items():
            try:
                runs = prepare(side)
                for run in runs:  # what a first run allocates is no part of its time
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


def _reason(error):
    """Why a side could not do something."""
    words = " ".join(str(error).split())
    return words if isinstance(error, UnsupportedError) else f"{type(error).__name__}: {words}"


def _stored(model, k, n):
    """Bytes of a weight: 4 bits each, and a 16-bit scale a group; nothing else need be read."""
    return k * n // 2 + k // model.group_size * n * 2


def _ready(side, *arguments):
    """``side.run`` on a prepared input."""
    prepared = side.prepare(*arguments)
    return lambda: side.run(prepared)


def _in_turn(runs):
    """``call(i)``, one run after the other."""
    return lambda i: runs[i % len(runs)]()


class _CallAnExpert(RoutedProduct):
    """A routed product of a peer that has none: one call an expert, over rows gathered beforehand."""

    def __init__(self, projections):
        self._projections = projections

    def prepare(self, x, topk_ids):
        calls = []
        for expert in np.unique(topk_ids):
            slots = np.nonzero(topk_ids == expert)
            projection = self._projections[expert]
            calls.append((slots, projection, projection.prepare(x[slots[0]])))
        return topk_ids.shape, calls

    def run(self, prepared):
        shape, calls = prepared
        return shape, [(slots, projection, projection.run(ready)) for slots, projection, ready in calls]

    def result(self, out):
        shape, outputs = out
        result = None
        for slots, projection, output in outputs:
            rows = projection.result(output)
            if result is None:
                result = np.full((*shape, rows.shape[1]), np.nan, np.float32)
            result[slots] = rows
        return result


class _ProductsAlone:
    """A layer of a peer that has none: both products of each expert, from rows and intermediates made beforehand."""

    def __init__(self, gate_up, down, intermediate):
        self._gate_up, self._down, self._intermediate = gate_up, down, intermediate

    def prepare(self, x, topk_ids, topk_weights):
        between = np.random.default_rng(0).standard_normal((len(x), self._intermediate), np.float32)
        calls = []
        for expert in np.unique(topk_ids):
            tokens = np.nonzero(topk_ids == expert)[0]
            for projection, rows in ((self._gate_up[expert], x[tokens]), (self._down[expert], between[tokens])):
                calls.append((projection, projection.prepare(rows)))
        return calls

    def run(self, prepared):
        for projection, ready in prepared:
            projection.run(ready)


def main(output):
    """Measure what stdin asks for."""
    settings = PairSettings.from_json(sys.stdin.read())
    Path(output).write_text(json.dumps(measure_pair(settings), allow_nan=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
