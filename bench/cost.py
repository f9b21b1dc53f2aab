"""What a layer should take, from what the machine can do, and what it takes. COST_MODEL.md beside this explains.

Every parameter is measured here, on the machine, in turns with the layers that are predicted from them.
"""

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from bench.machine import describe, restrict_to, spread_over_cores
from bench.options import names, positive, values
from bench.own import gemm_call, read_side
from bench.shapes import MODELS, TINY, ModelShape, build_stack, routings
from bench.timing import CallTimer, alternate, spread
from marlin_cy.commands.output import console, table

__all__ = ["Machine", "add_options", "experts_hit", "markdown", "overlap_of", "predict", "run", "slices"]

COMPUTE_DTYPES = ("int16", "int8")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# Blocks have so many rows at most, and are as even as whole steps allow: as in marlin_cy/cpu/ukernels.
MAX_MC, ROW_STEP = 48, 8
AMX_MAX_ROWS, AMX_ROW_STEP = 96, 16
KERNEL_ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 40, 48)
AMX_KERNEL_ROWS = (*KERNEL_ROWS, 64, 80, 96)
SLICE_BYTES = 64 << 20  # what lies between the products: marlin_cy/cpu/_moe.pyx
LEAST_OVERLAP, MOST_OVERLAP = 0.5, 16.0
STREAM_ROWS = (1, 2, 4, 8, 16, 48)
KERNEL_K = 1024
KERNEL_COLUMNS = (256, 768)  # a thread: these weights fit the second-level cache, and leave room for activations
PREPARE_ROWS = 768
LEAST_CHANCE = 1e-12
QUARTILE = 25  # of the rounds: what disturbs makes a call longer, never shorter


@dataclass(frozen=True)
class Machine:
    """What the model knows of a machine, for a number of threads and a compute dtype. Seconds are wall time.

    Attributes
    ----------
    read : float
        Bytes a second.
    start : float
        Seconds of a call that has next to nothing to do: checks, and one barrier a phase.
    kernel : dict of int to float
        Seconds a weight of a block with so many rows, weights and activations in cache.
    prepare : float
        Seconds to quantise a value of the activations.
    finish : float
        Seconds a value of the second product to be stored, weighted and added.
    overlap : dict of int to float
        How much of reading weights and of arithmetic hides behind the other, for an expert with so many rows: their
        times add up to the norm of this order. 1: nothing, one comes after the other. Large: all of the shorter one.
    mc, mr : int
        Of a block.
    """

    threads: int
    compute_dtype: str
    read: float
    start: float
    kernel: dict
    prepare: float
    finish: float
    overlap: dict
    mc: int = MAX_MC
    mr: int = ROW_STEP

    def block(self, rows):
        """Seconds a weight of a block; between measured numbers of rows, on the line between them."""
        return _between(self.kernel, rows)

    def expert(self, rows):
        """Seconds a weight of all blocks that an expert's rows are cut into."""
        parts, steps = -(-rows // self.mc), -(-rows // self.mr)
        edges = [min(steps * part // parts * self.mr, rows) for part in range(parts + 1)]
        return sum(self.block(end - begin) for begin, end in zip(edges, edges[1:], strict=False))

    def together(self, reading, arithmetic, rows):
        """Seconds of reading an expert's weights and of arithmetic on them, each of which alone would take so long."""
        longer, shorter = max(reading, arithmetic), min(reading, arithmetic)
        order = _between(self.overlap, rows)
        return longer * (1 + (shorter / longer) ** order) ** (1 / order) if longer else 0.0


def _between(measured, rows):
    """What was measured for some numbers of rows, for any: on the line between the two nearest."""
    return float(np.interp(rows, list(measured), list(measured.values())))


def overlap_of(reading, arithmetic, both):
    """The ``overlap`` with which two times add up to a third, between 1/2 and 16."""
    low, high = LEAST_OVERLAP, MOST_OVERLAP
    for _ in range(40):
        middle = (low + high) / 2
        if (reading**middle + arithmetic**middle) ** (1 / middle) > both:
            low = middle
        else:
            high = middle
    return low


def slices(model, tokens, mc=MAX_MC):
    """Tokens of each slice that a layer takes its tokens in: ``tokens_a_slice`` in marlin_cy/cpu/_moe.pyx."""
    bytes_a_token = 4 * model.top_k * (model.intermediate + model.hidden)
    size = max(SLICE_BYTES // bytes_a_token, mc * model.num_experts // model.top_k, 1)
    return [min(size, tokens - begin) for begin in range(0, tokens, size)]


def experts_hit(model, tokens):
    """Experts that at least one token is routed to, on average, where each token draws its own alike."""
    return model.num_experts * (1 - (1 - model.top_k / model.num_experts) ** tokens)


def rows_of_an_expert(model, tokens):
    """``{rows: probability}`` of an expert: binomial."""
    share = model.top_k / model.num_experts
    if share == 1:
        return {tokens: 1.0}

    def log_probability(rows):
        ways = math.lgamma(tokens + 1) - math.lgamma(rows + 1) - math.lgamma(tokens - rows + 1)
        return ways + rows * math.log(share) + (tokens - rows) * math.log1p(-share)

    return {rows: math.exp(log_probability(rows)) for rows in range(tokens + 1)}


def predict(machine, model, tokens, expert_bytes):
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
            for rows, chance in rows_of_an_expert(model, count).items():
                if rows and chance > LEAST_CHANCE:
                    together = machine.together(reading, k * n * machine.expert(rows), rows)
                    terms[name] += model.num_experts * chance * together
    terms["prepare"] = machine.prepare * (tokens * model.hidden + pairs * model.intermediate)
    terms["finish"] = machine.finish * pairs * model.hidden
    return terms | {"total": sum(terms.values())}


def rows_where_arithmetic_takes_over(machine, k, n, expert_bytes):
    """The fewest rows of an expert whose arithmetic takes longer than reading its weights; None below 1024."""
    reading = expert_bytes / machine.read
    return next((rows for rows in range(1, 1024) if k * n * machine.expert(rows) > reading), None)


def add_options(parser):
    """The options of ``python -m bench cost``."""
    parser.add_argument("--threads", type=values(positive), metavar="A,B", help="default: 1, 2, 4 ... all CPUs")
    parser.add_argument("--model", default="qwen3", choices=MODELS, help="whose shapes; default: qwen3")
    parser.add_argument("--tokens", type=values(positive), default=TOKENS, metavar="A,B")
    parser.add_argument("--compute-dtypes", type=names(COMPUTE_DTYPES), default=COMPUTE_DTYPES, metavar="A,B")
    parser.add_argument("--isa", help="default: the best here")
    parser.add_argument("--repeats", type=positive, default=7, metavar="N", help="rounds (default: 7)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="save the figures as JSON")
    parser.add_argument("--markdown", action="store_true", help="print COST_MODEL.md's tables at the end")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, short rounds: does it run at all?")


def run(arguments):
    """Measure, predict and print; returns the exit code."""
    if arguments.threads:
        restrict_to(spread_over_cores(max(arguments.threads)))
    from marlin_cy import get_backend

    backend = get_backend("cpu")
    most = backend.new_context(isa=arguments.isa)
    model = TINY if arguments.quick else MODELS[arguments.model]
    tokens = (1, 16) if arguments.quick else arguments.tokens
    threads = arguments.threads or sorted({*(2**i for i in range(most.num_threads.bit_length())), most.num_threads})
    bench = _Bench(backend, most.isa, model, tokens, arguments.repeats, arguments.quick)
    screen = console()
    document = {"mode": "cost", "date": time.strftime("%Y-%m-%d"), "machine": describe(most, None)}
    document |= {"model": asdict(model), "runs": []}
    for count in threads:
        for dtype in arguments.compute_dtypes:
            one = bench.measure(count, dtype)
            document["runs"].append(one)
            _print(screen, model, one)
    if arguments.markdown:
        print(markdown(document))
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return 0


class _Bench:
    """What is measured for a number of threads and a compute dtype."""

    def __init__(self, backend, isa, model, tokens, repeats, quick):
        self.backend, self.isa, self.model, self.tokens, self.quick = backend, isa, model, tokens, quick
        self.kernel_rows = AMX_KERNEL_ROWS if isa == "amx" else KERNEL_ROWS
        self.block = (AMX_MAX_ROWS, AMX_ROW_STEP) if isa == "amx" else (MAX_MC, ROW_STEP)
        self.repeats = 2 if quick else repeats
        self.min_seconds, self.pause_seconds = (1e-3, 0) if quick else (10e-3, 2e-3)
        self.layer = self._layer(model)
        stacks = {"gate_up": self.layer.gate_up, "down": self.layer.down}
        self.expert_bytes = {name: stack.metadata.packed_bytes / stack.num_experts for name, stack in stacks.items()}

    def measure(self, threads, dtype):
        """Parameters, and predicted and measured times by tokens."""
        context = self.backend.new_context(num_threads=threads, compute_dtype=dtype, isa=self.isa)
        narrow, wide = (self._stack(KERNEL_K, columns * threads) for columns in KERNEL_COLUMNS)
        thin = self._stack(self.model.hidden, 32 * threads)
        small = ModelShape("small", 1, 1, 32, 32, 32)
        ends = ModelShape("ends", self.model.top_k, self.model.top_k, self.model.hidden, 32, 32)
        end_tokens = max(self.tokens)
        calls = {
            "start": self._layer_call(self._layer(small), context, small, 1),
            "prepare": gemm_call(thin, context, PREPARE_ROWS, 1),
            "finish": self._layer_call(self._layer(ends), context, ends, end_tokens),
        }
        for rows in self.kernel_rows:
            for name, stack in (("narrow", narrow), ("wide", wide)):
                calls[name, rows] = gemm_call(stack, context, rows, 1)
        for rows in STREAM_ROWS:
            calls["stream", rows] = gemm_call(self.layer.gate_up, context, rows, self.model.top_k)
        for tokens in self.tokens:
            calls["layer", tokens] = self._layer_call(self.layer, context, self.model, tokens)
        sides = {name: CallTimer(call, self.min_seconds) for name, call in calls.items()}
        figures = alternate(sides | {"read": read_side(threads, self.quick)}, self.repeats, self.pause_seconds)
        seconds = {name: float(np.percentile(figures[name], QUARTILE)) for name in calls}
        machine = Machine(
            threads=threads,
            compute_dtype=dtype,
            read=float(np.percentile(figures["read"], 100 - QUARTILE)),
            start=seconds["start"],
            kernel=_kernel(seconds, threads, self.kernel_rows),
            prepare=0.0,
            finish=0.0,
            overlap={1: MOST_OVERLAP},
            mc=self.block[0],
            mr=self.block[1],
        )
        arithmetic = self.model.hidden * 32 * threads * machine.expert(PREPARE_ROWS)
        left = seconds["prepare"] - machine.start - arithmetic
        machine = replace(machine, prepare=max(left, 0) / (PREPARE_ROWS * self.model.hidden))
        rest = predict(machine, ends, end_tokens, dict.fromkeys(self.expert_bytes, 0.0))["total"]
        finish = max(seconds["finish"] - rest, 0) / (end_tokens * ends.top_k * ends.hidden)
        machine = replace(machine, finish=finish)
        machine = replace(machine, overlap={rows: self._overlap(machine, rows, seconds) for rows in STREAM_ROWS})
        rows = []
        for tokens in self.tokens:
            rows.append(
                {
                    "tokens": tokens,
                    "experts_hit": experts_hit(self.model, tokens),
                    "predicted": predict(machine, self.model, tokens, self.expert_bytes),
                    "measured": seconds["layer", tokens],
                    "spread": spread(figures["layer", tokens])._asdict(),
                }
            )
        takes_over = {
            name: rows_where_arithmetic_takes_over(machine, k, n, self.expert_bytes[name])
            for name, (k, n) in self.model.projections.items()
        }
        return {"parameters": asdict(machine), "layers": rows, "arithmetic_from_rows": takes_over}

    def _overlap(self, machine, rows, seconds):
        """``Machine.overlap`` for a number of rows, from a product whose weights come from memory."""
        k, n = self.model.projections["gate_up"]
        an_expert = (seconds["stream", rows] - machine.start) / self.model.top_k - machine.prepare * rows * k
        return overlap_of(self.expert_bytes["gate_up"] / machine.read, k * n * machine.expert(rows), an_expert)

    def _stack(self, k, n, num_experts=1, group_size=None):
        return build_stack(self.backend, num_experts, k, n, group_size or min(self.model.group_size, k))

    def _layer(self, model):
        from marlin_cy import MoeLayer

        gate_up, down = (self._stack(k, n, model.num_experts, model.group_size) for k, n in model.projections.values())
        return MoeLayer(gate_up, down, top_k=model.top_k)

    @staticmethod
    def _layer_call(layer, context, model, tokens):
        """``call(i)`` of a layer whose tokens are routed already; float32 in and out."""
        drawn = [ids.astype(np.int32) for ids in routings(model.num_experts, model.top_k, tokens)]
        x = np.random.default_rng(0).standard_normal((tokens, model.hidden), np.float32)
        shares = np.full((tokens, model.top_k), 1 / model.top_k, np.float32)
        out = np.empty_like(x)
        return lambda i: layer.forward_routed(context, x, drawn[i % len(drawn)], shares, out=out)


def _kernel(seconds, threads, kernel_rows):
    """``Machine.kernel``: what the columns cost that one product has more than another."""
    columns = threads * (KERNEL_COLUMNS[1] - KERNEL_COLUMNS[0])
    kernel = {rows: (seconds["wide", rows] - seconds["narrow", rows]) / (KERNEL_K * columns) for rows in kernel_rows}
    if min(kernel.values()) <= 0:
        raise ValueError("more columns took less time: other processes use this machine")
    return kernel


def markdown(document):
    """The tables of COST_MODEL.md: parameters, then predicted and measured times, a column for each run."""
    model, runs = document["model"], document["runs"]
    machines = [one["parameters"] for one in runs]
    heads = [f"{one['threads']} thread{'s' * (one['threads'] > 1)}, {one['compute_dtype']}" for one in machines]
    rows = [
        ("`read`, GB/s", [f"{one['read'] / 1e9:.1f}" for one in machines]),
        ("`start`, µs", [f"{one['start'] * 1e6:.1f}" for one in machines]),
        *(
            (
                f"`kernel`, GFLOP/s, rows: {count}",
                [f"{2 * count / one['kernel'][count] / 1e9:.0f}" for one in machines],
            )
            for count in KERNEL_ROWS
        ),
        *((f"`overlap`, rows: {count}", [f"{one['overlap'][count]:.1f}" for one in machines]) for count in STREAM_ROWS),
        ("`prepare`, ns a value", [f"{one['prepare'] * 1e9:.2f}" for one in machines]),
        ("`finish`, ns a value", [f"{one['finish'] * 1e9:.2f}" for one in machines]),
        ("arithmetic takes longer from so many rows on", [str(one["arithmetic_from_rows"]["gate_up"]) for one in runs]),
    ]
    lines = [["", *heads], ["---"] * (1 + len(heads)), *([name, *cells] for name, cells in rows), []]
    lines += [["tokens", "experts hit", "rows of one", *heads], ["---"] * (3 + len(heads))]
    for layers in zip(*(one["layers"] for one in runs), strict=True):
        tokens, hit = layers[0]["tokens"], layers[0]["experts_hit"]
        cells = [
            f"{1e3 * one['predicted']['total']:.3g} / {1e3 * one['measured']:.3g} = "
            f"{one['predicted']['total'] / one['measured']:.2f}"
            for one in layers
        ]
        lines.append([str(tokens), f"{hit:.1f}", f"{tokens * model['top_k'] / hit:.1f}", *cells])
    return "\n".join(f"| {' | '.join(cells)} |" if cells else "" for cells in lines)


def _print(screen, model, one):
    machine = one["parameters"]
    speeds = ", ".join(f"{rows}: {2 * rows / seconds / 1e9:.0f}" for rows, seconds in machine["kernel"].items())
    overlaps = ", ".join(f"{rows}: {order:.1f}" for rows, order in machine["overlap"].items())
    screen.print(
        f"\n[bold]{machine['threads']} threads, {machine['compute_dtype']}[/bold]: reads {machine['read'] / 1e9:.1f} "
        f"GB/s, starts in {machine['start'] * 1e6:.1f} µs, prepares a value in {machine['prepare'] * 1e9:.3f} ns, "
        f"finishes one in {machine['finish'] * 1e9:.3f} ns\n"
        f"GFLOP/s of a block by rows: {speeds}\n"
        f"Overlap of reading and arithmetic by rows: {overlaps}\n"
        "An expert's arithmetic takes longer than reading it from "
        + ", ".join(f"{rows} rows on ({name})" for name, rows in one["arithmetic_from_rows"].items())
    )
    terms = ("start", "gate_up", "down", "prepare", "finish", "total")
    result = table(
        ">tokens",
        ">experts\nhit",
        ">rows of\none",
        *(f">{name}\nµs" for name in terms),
        ">measured\nµs",
        ">p10–p90",
        ">total ÷\nmeasured",
    )
    for row in one["layers"]:
        predicted, measured, middle = row["predicted"], row["measured"], row["spread"]
        result.add_row(
            str(row["tokens"]),
            f"{row['experts_hit']:.1f}",
            f"{row['tokens'] * model.top_k / row['experts_hit']:.1f}",
            *(f"{predicted[name] * 1e6:.0f}" for name in terms),
            f"{measured * 1e6:.0f}",
            f"{middle['p10'] * 1e6:.0f}–{middle['p90'] * 1e6:.0f}",
            f"{predicted['total'] / measured:.2f}",
        )
    screen.print(result)
