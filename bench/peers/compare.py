"""``python -m bench compare``: this library against every peer that runs here, with one JSON document, tables and bars.

Every pair of this library and a peer is measured in processes of its own, one per part (``pair.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bench.common.machine import available_memory, describe, restrict_to, spread_over_cores
from bench.common.options import add_model, add_output, add_quick, names, positive, values
from bench.common.processes import run_module
from bench.common.results import save
from bench.common.shapes import MODELS, TINY, ModelShape
from bench.peers import PEERS, peer_named
from bench.peers.settings import PARTS, PairSettings
from bench.report.bars import judge
from bench.report.tables import print_document
from marlin_cy.commands.output import console

if TYPE_CHECKING:
    from marlin_cy.cpu import CpuContext

__all__ = ["SCHEMA_VERSION", "add_options", "run"]

SCHEMA_VERSION = 1
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (1, 4, 16, 64, 256, 1024)
QUICK = (1, 16)
ROUNDS, QUICK_ROUNDS = 7, 2
OWN_WEIGHT_BYTES = 4 * 0.54  # two compute dtypes, each with its own stacks for single and for routed products
PAIR_TIMEOUT_SECONDS = 600

# Environment variables that keep peers from using instructions beyond an ISA. ggml is built for one ISA: each build
# needs a folder of its own.
ISA_ENVIRONMENT = {
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "KT_KERNEL_CPU_VARIANT": "avx2",
    }
}
GGML_FOLDER = "GGML_LIBRARY_DIR"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    known = [adapter.name for adapter in PEERS]
    parser.add_argument("--peers", type=names(known), default=known, metavar="A,B", help=f"default: {','.join(known)}")
    parser.add_argument("--parts", type=names(PARTS), default=PARTS, metavar="A,B", help=f"default: {','.join(PARTS)}")
    add_model(parser)
    parser.add_argument("--rows", type=values(positive), default=ROWS, metavar="A,B", help="rows of one projection")
    parser.add_argument(
        "--tokens", type=values(positive), default=TOKENS, metavar="A,B", help="tokens of the other parts"
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="N threads on N CPUs, on different cores if possible"
    )
    parser.add_argument(
        "--isa", help="of this library, and of the peers that can be limited (default: the best one here)"
    )
    parser.add_argument("--memory", type=float, metavar="GB", help="memory for weights (default: half of what is free)")
    parser.add_argument("--repeats", type=positive, metavar="N", help="most rounds of a case (default: 7)")
    parser.add_argument("--show", action="store_true", help="also print the bars, each met or missed")
    add_output(parser)
    add_quick(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and save; returns the exit code."""
    screen = console()
    document = measure(arguments, screen)
    output = save(document, arguments.output)
    print_document(document, screen, arguments.show)
    screen.print(f"\nSaved to {output}")
    return 0


def measure(arguments: argparse.Namespace, screen: Console) -> dict[str, Any]:
    """The JSON document."""
    if arguments.threads:
        restrict_to(spread_over_cores(arguments.threads))
    from marlin_cy.cpu import CpuBackend

    context = CpuBackend().new_context(num_threads=arguments.threads, isa=arguments.isa)
    environment = isa_environment(arguments.isa)
    model = TINY if arguments.quick else MODELS[arguments.model]
    rows, tokens = (QUICK, QUICK) if arguments.quick else (arguments.rows, arguments.tokens)
    cases = {part: list(rows if part == "projection" else tokens) for part in arguments.parts}
    timing = {
        "repeats": arguments.repeats or (QUICK_ROUNDS if arguments.quick else ROUNDS),
        "min_seconds": 1e-3 if arguments.quick else 15e-3,
        "pause_seconds": 1e-3 if arguments.quick else 10e-3,
        "case_seconds": 2.0,
        "quick": arguments.quick,
    }
    memory = int(arguments.memory * 1e9) if arguments.memory else available_memory() // 2
    document: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "mode": "compare",
        "command": sys.argv[1:],
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe(context, None) | {"limited_to": environment},
        "model": {"name": model.name, "num_experts": model.num_experts, "top_k": model.top_k}
        | {"hidden": model.hidden, "intermediate": model.intermediate, "group_size": model.group_size},
        "timing": timing,
        "sides": {},
        "cases": [],
        "pairs": {},
    }
    for name in arguments.peers or [""]:
        start = time.perf_counter()
        # A process per part: the state in which one part leaves a library's threads would disturb the next part.
        for part in arguments.parts:
            pair = _pair(name, model, {part: cases[part]}, context, memory, timing, environment)
            for side, facts in pair.pop("sides").items():
                known = document["sides"].setdefault(side, facts)
                for key in ("errors", "fused", "skipped"):
                    known[key] |= facts[key]
            document["cases"] += pair.pop("cases")
            document["pairs"][f"{name} {part}".strip()] = pair
        if name:
            skipped = document["sides"][name]["skipped"]
            reason = f"; {next(iter(skipped.values()))}" if skipped else ""
            screen.print(f"{name}: {time.perf_counter() - start:.0f} s{reason}", style="dim")
    return document | {"bars": judge(document)}


def isa_environment(isa: str | None) -> dict[str, str]:
    """Environment variables that keep the peers from using instructions beyond an ISA."""
    environment = dict(ISA_ENVIRONMENT.get(isa or "", {}))
    folder = os.environ.get(f"{GGML_FOLDER}_{isa.upper()}") if isa else None
    return environment | ({GGML_FOLDER: folder} if folder else {})


def _pair(
    name: str,
    model: ModelShape,
    cases: dict[str, list[int]],
    context: CpuContext,
    memory: int,
    timing: dict[str, Any],
    environment: dict[str, str],
) -> dict[str, Any]:
    """The results of the process of a pair. If the process fails, the peer counts as one that cannot run here."""
    adapter = peer_named(name) if name else None
    per_expert = sum(k * n for k, n in model.projections.values()) * (
        OWN_WEIGHT_BYTES + (adapter.weight_bytes if adapter else 0)
    )
    experts = min(model.num_experts, int(memory / per_expert))
    if experts < model.top_k:
        return _failed(name, f"--memory: {memory / 1e9:.3g} GB hold {experts} experts, {model.top_k} are needed")
    settings = PairSettings(
        peer=name, model=model, cases=cases, num_experts=experts, threads=context.num_threads, isa=context.isa, **timing
    )
    if folder := {**os.environ, **environment}.get(GGML_FOLDER):
        environment = {**environment, GGML_FOLDER: os.path.abspath(folder)}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "pair.json")
        try:
            done = run_module(
                "bench.peers.pair",
                output,
                folder=folder,
                environment=environment,
                input=settings.to_json(),
                timeout=PAIR_TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return _failed(name, f"not finished after {PAIR_TIMEOUT_SECONDS} s")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            return _failed(name, f"ended with {done.returncode}: {last}")
        measured: dict[str, Any] = json.loads(output.read_text())
        return measured


def _failed(name: str, reason: str) -> dict[str, Any]:
    """The results of a peer that cannot run."""
    if not name:
        raise RuntimeError(reason)
    adapter = peer_named(name)
    side = {
        "library": adapter.distribution,
        "version": None,
        "accuracy": adapter.accuracy,
        "errors": {},
        "fused": {},
        "skipped": dict.fromkeys(PARTS, reason),
    }
    return {"sides": {name: side}, "cases": []}
