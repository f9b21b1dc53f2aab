"""The cost model of a layer: its time, from measured parameters of a machine. COST_MODEL.md explains the terms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bench.common.shapes import ModelShape

__all__ = [
    "MAX_OVERLAP",
    "Machine",
    "experts_hit",
    "overlap_of",
    "predict",
    "rows_of_an_expert",
    "rows_where_arithmetic_dominates",
    "slices",
]

# A block has at most MC rows, in steps of MR. Blocks are as even as whole steps allow: as in marlin_cy/cpu/ukernels.
MC, MR = 48, 8
SLICE_BYTES = 64 << 20  # of the values between both products of a slice: as in marlin_cy/cpu
MIN_OVERLAP, MAX_OVERLAP = 0.5, 16.0
LEAST_PROBABILITY = 1e-12
MOST_ROWS = 1024


@dataclass(frozen=True)
class Machine:
    """The parameters of a machine, for a number of threads and a compute dtype. Seconds are wall time.

    Attributes
    ----------
    threads : int
    compute_dtype : str
    read : float
        Read bandwidth in bytes per second.
    start : float
        Seconds of a call that has next to nothing to compute: argument checks, and one barrier per phase.
    kernel : dict of int to float
        By rows of a block: seconds per weight element, if weights and activations are in cache.
    prepare : float
        Seconds to quantise one value of the activations.
    finish : float
        Seconds to store one value of the second product, to weight it and to add it.
    overlap : dict of int to float
        By rows of an expert: how much reading weights and arithmetic overlap in time. Together they take the norm of
        this order of their times. 1: one after the other. Large: the shorter one is hidden entirely.
    mc, mr : int
        Most rows of a block, and the step of its rows.
    """

    threads: int
    compute_dtype: str
    read: float
    start: float
    kernel: dict[int, float]
    prepare: float
    finish: float
    overlap: dict[int, float]
    mc: int = MC
    mr: int = MR

    def block(self, rows: int) -> float:
        """Seconds per weight element of a block, linearly interpolated between measured numbers of rows."""
        return _interpolate(self.kernel, rows)

    def expert(self, rows: int) -> float:
        """Seconds per weight element of all blocks that an expert's rows are cut into."""
        parts, steps = -(-rows // self.mc), -(-rows // self.mr)
        edges = [min(steps * part // parts * self.mr, rows) for part in range(parts + 1)]
        return sum(self.block(end - begin) for begin, end in zip(edges, edges[1:], strict=False))

    def together(self, reading: float, arithmetic: float, rows: int) -> float:
        """Seconds to read an expert's weights and compute with them, if each alone takes the given seconds."""
        longer, shorter = max(reading, arithmetic), min(reading, arithmetic)
        order = _interpolate(self.overlap, rows)
        return float(longer * (1 + (shorter / longer) ** order) ** (1 / order)) if longer else 0.0


def predict(machine: Machine, model: ModelShape, tokens: int, expert_bytes: dict[str, float]) -> dict[str, float]:
    """Seconds of a layer's call, by term.

    Parameters
    ----------
    machine : Machine
    model : ModelShape
    tokens : int
    expert_bytes : dict of str to float
        Packed bytes of an expert's weight, by projection.

    Returns
    -------
    dict of str to float
        ``start``, ``gate_up``, ``down``, ``prepare``, ``finish``, ``total``.
    """
    pairs = tokens * model.top_k
    terms = {"start": machine.start, "gate_up": 0.0, "down": 0.0}
    for count in slices(model, tokens, machine.mc):
        for name, (k, n) in model.projections.items():
            reading = expert_bytes[name] / machine.read
            for rows, probability in rows_of_an_expert(model, count).items():
                if rows and probability > LEAST_PROBABILITY:
                    together = machine.together(reading, k * n * machine.expert(rows), rows)
                    terms[name] += model.num_experts * probability * together
    terms["prepare"] = machine.prepare * (tokens * model.hidden + pairs * model.intermediate)
    terms["finish"] = machine.finish * pairs * model.hidden
    return terms | {"total": sum(terms.values())}


def slices(model: ModelShape, tokens: int, mc: int = MC) -> list[int]:
    """Tokens of each slice that a layer cuts its tokens into: ``tokens_a_slice`` in marlin_cy/cpu."""
    bytes_per_token = 4 * model.top_k * (model.intermediate + model.hidden)
    size = max(SLICE_BYTES // bytes_per_token, mc * model.num_experts // model.top_k, 1)
    return [min(size, tokens - begin) for begin in range(0, tokens, size)]


def experts_hit(model: ModelShape, tokens: int) -> float:
    """Expected number of experts with at least one token, if all experts are equally likely."""
    return float(model.num_experts * (1 - (1 - model.top_k / model.num_experts) ** tokens))


def rows_of_an_expert(model: ModelShape, tokens: int) -> dict[int, float]:
    """The probability of each number of rows of an expert: a binomial distribution."""
    share = model.top_k / model.num_experts
    if share == 1:
        return {tokens: 1.0}

    def log_probability(rows: int) -> float:
        ways = math.lgamma(tokens + 1) - math.lgamma(rows + 1) - math.lgamma(tokens - rows + 1)
        return ways + rows * math.log(share) + (tokens - rows) * math.log1p(-share)

    return {rows: math.exp(log_probability(rows)) for rows in range(tokens + 1)}


def rows_where_arithmetic_dominates(machine: Machine, k: int, n: int, expert_bytes: float) -> int | None:
    """The fewest rows of an expert whose arithmetic takes longer than reading its weights; None below 1024."""
    reading = expert_bytes / machine.read
    return next((rows for rows in range(1, MOST_ROWS) if k * n * machine.expert(rows) > reading), None)


def overlap_of(reading: float, arithmetic: float, both: float) -> float:
    """The order of the norm by which two times add up to a third, between 1/2 and 16."""
    low, high = MIN_OVERLAP, MAX_OVERLAP
    for _ in range(40):
        middle = (low + high) / 2
        if (reading**middle + arithmetic**middle) ** (1 / middle) > both:
            low = middle
        else:
            high = middle
    return low


def _interpolate(measured: dict[int, float], rows: int) -> float:
    """A figure that was measured for some numbers of rows, linearly interpolated for any."""
    return float(np.interp(rows, list(measured), list(measured.values())))
