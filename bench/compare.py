"""This library beside every peer that runs here: one process a pair, one JSON document, tables and bars."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.bars import judge
from bench.machine import available_memory, describe, restrict_to, spread_over_cores
from bench.options import names, positive, values
from bench.pair import PARTS, PairSettings
from bench.peers import PEERS
from bench.shapes import MODELS, TINY
from bench.tables import print_document
from marlin_cy.commands.output import console

__all__ = ["SCHEMA_VERSION", "add_options", "run"]

SCHEMA_VERSION = 1
ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (1, 4, 16, 64, 256, 1024)
QUICK = (1, 16)
OWN_WEIGHT_BYTES = 4 * 0.54  # two compute dtypes, each with stacks of its own for single and for routed products
PAIR_TIMEOUT_SECONDS = 600

# What keeps the peers from instructions beyond an ISA's; ggml is built for one ISA, in a folder of its own.
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


def add_options(parser):
    """The options of ``python -m bench compare``."""
    known = [adapter.name for adapter in PEERS]
    parser.add_argument("--peers", type=names(known), default=known, metavar="A,B", help=f"default: {','.join(known)}")
    parser.add_argument("--parts", type=names(PARTS), default=PARTS, metavar="A,B", help=f"default: {','.join(PARTS)}")
    parser.add_argument("--model", default="qwen3", choices=MODELS, help="whose shapes; default: qwen3")
    parser.add_argument("--rows", type=values(positive), default=ROWS, metavar="A,B", help="of one projection")
    parser.add_argument("--tokens", type=values(positive), default=TOKENS, metavar="A,B", help="of the other parts")
    parser.add_argument("--threads", type=positive, metavar="N", help="on N CPUs, on different cores where possible")
    parser.add_argument("--isa", help="ours, and the peers' where they can be limited; default: the best here")
    parser.add_argument("--memory", type=float, metavar="GB", help="for weights (default: half of what is available)")
    parser.add_argument("--repeats", type=positive, metavar="N", help="rounds of a case at most (default: 7)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: a new file in bench/results/")
    parser.add_argument("--show", action="store_true", help="print the bars, too, each met or missed")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, short rounds: does it run at all?")


def run(arguments):
    """Measure, print and save; returns the exit code."""
    screen = console()
    document = measure(arguments, screen)
    output = arguments.output or RESULTS / f"compare-{time.strftime('%Y%m%d-%H%M%S')}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    print_document(document, screen, arguments.show)
    screen.print(f"\nSaved to {output}")
    return 0


def measure(arguments, screen):
    """The JSON document."""
    from marlin_cy import get_backend

    if arguments.threads:
        restrict_to(spread_over_cores(arguments.threads))
    context = get_backend("cpu").new_context(num_threads=arguments.threads, isa=arguments.isa)
    environment = isa_environment(arguments.isa)
    model = TINY if arguments.quick else MODELS[arguments.model]
    rows, tokens = (QUICK, QUICK) if arguments.quick else (arguments.rows, arguments.tokens)
    cases = {part: list(rows if part == "projection" else tokens) for part in arguments.parts}
    timing = {
        "repeats": arguments.repeats or (2 if arguments.quick else 7),
        "min_seconds": 1e-3 if arguments.quick else 15e-3,
        "pause_seconds": 1e-3 if arguments.quick else 10e-3,
        "case_seconds": 2.0,
        "quick": arguments.quick,
    }
    memory = int(arguments.memory * 1e9) if arguments.memory else available_memory() // 2
    document = {
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
        # Each part in a process of its own: what a library's threads were left at by one would disturb the next.
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


def isa_environment(isa):
    """What a pair's process gets beside the environment, so that the peers use an ISA's instructions alone."""
    environment = dict(ISA_ENVIRONMENT.get(isa, {}))
    folder = os.environ.get(f"{GGML_FOLDER}_{isa.upper()}") if isa else None
    return environment | ({GGML_FOLDER: folder} if folder else {})


def _pair(name, model, cases, context, memory, timing, environment):
    """What the process of a pair measured; a peer whose process ended otherwise is one that could not run."""
    adapter = next((adapter for adapter in PEERS if adapter.name == name), None)
    per_expert = sum(k * n for k, n in model.projections.values()) * (
        OWN_WEIGHT_BYTES + (adapter.weight_bytes if adapter else 0)
    )
    experts = min(model.num_experts, int(memory / per_expert))
    if experts < model.top_k:
        return _failed(name, f"--memory: {memory / 1e9:.3g} GB hold {experts} experts, {model.top_k} are needed")
    settings = PairSettings(
        peer=name, model=model, cases=cases, num_experts=experts, threads=context.num_threads, isa=context.isa, **timing
    )
    variables = os.environ | environment
    if folder := variables.get(GGML_FOLDER):
        variables[GGML_FOLDER] = os.path.abspath(folder)
    # In a folder of its own, as this one would come first on the path: an installed marlin_cy comes before it.
    path = os.pathsep.join([*map(os.path.abspath, sys.path), str(ROOT)])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "pair.json")
        try:
            done = subprocess.run(
                [sys.executable, "-m", "bench.pair", output],
                input=settings.to_json(),
                cwd=folder,
                env=variables | {"PYTHONPATH": path},
                capture_output=True,
                text=True,
                timeout=PAIR_TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return _failed(name, f"not done after {PAIR_TIMEOUT_SECONDS} s")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            return _failed(name, f"ended with {done.returncode}: {last}")
        return json.loads(output.read_text())


def _failed(name, reason):
    if not name:
        raise RuntimeError(reason)
    adapter = next(adapter for adapter in PEERS if adapter.name == name)
    side = {"library": adapter.distribution, "version": None, "accuracy": adapter.accuracy, "errors": {}, "fused": {}}
    return {"sides": {name: side | {"skipped": dict.fromkeys(PARTS, reason)}}, "cases": []}
