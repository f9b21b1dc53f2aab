"""How fast the expert stacks are: on the CPU against the machine's memory and PyTorch, on OpenCL against CUDA.

``python bench/bench_gemm.py`` prints tables over the shapes of real models; ``--show`` measures the
claims that the library is held to. Both save what they measured as JSON. See README.md beside this file.
"""

import argparse
import json
import sys
import time
from pathlib import Path

# An installed marlin_cy comes first; without one, the package built in place beside this folder.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.machine import available_memory, describe, restrict_to, siblings_among, spread_over_cores
from bench.options import positive, values

RESULTS = Path(__file__).resolve().parent / "results"
MODEL_NAMES = ("qwen3", "mixtral", "deepseek-v3")
COMPUTE_DTYPES = ("int16", "int8")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CPU_OPTIONS = ("threads", "cpus", "isa")
SHOW_PARTS = ("1", "2", "3", "layer", "host", "compile")  # rows of the table of products; what surrounds them
OPENCL_OPTIONS = ("tiers", "device", "only", "launches", "block_size")
SCHEMA_VERSION = 1


def main(argv=None):
    """Run the benchmark; returns the exit code."""
    arguments = parse(argv)
    try:
        cpus = arguments.cpus or (spread_over_cores(arguments.threads) if arguments.threads else None)
        if cpus:
            restrict_to(cpus)
        document = measure_opencl(arguments) if arguments.backend == "opencl" else measure(arguments)
    except ValueError as error:
        print(f"bench_gemm.py: error: {error}", file=sys.stderr)
        return 2
    output = arguments.output or RESULTS / f"{document['mode']}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    print(f"\nSaved to {output}")
    return 0


def parse(argv):
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="cpu", choices=("cpu", "opencl"), help="default: cpu")
    parser.add_argument("--show", action="store_true", help="measure the claims instead of the tables")
    parser.add_argument("--threads", type=positive, metavar="N", help="on N CPUs, on different cores where possible")
    parser.add_argument("--cpus", type=values(int), metavar="A,B", help="run on these CPUs alone")
    parser.add_argument(
        "--isa", type=values(str), default=(), metavar="A,B", help="default: the best here; --show takes one"
    )
    parser.add_argument("--models", type=values(str), default=MODEL_NAMES, metavar="A,B", help=",".join(MODEL_NAMES))
    parser.add_argument("--rows", type=values(int), default=ROWS, metavar="A,B", help="rows an expert")
    parser.add_argument("--tokens", type=values(int), metavar="A,B", help="tokens of a whole layer, or of a claim")
    parser.add_argument(
        "--compute-dtypes", type=values(str), default=COMPUTE_DTYPES, metavar="A,B", help=",".join(COMPUTE_DTYPES)
    )
    parser.add_argument("--no-torch", action="store_true", help="leave the peers out")
    parser.add_argument("--memory", type=float, metavar="GB", help="for weights (default: half of what is available)")
    parser.add_argument("--repeats", type=positive, metavar="N", help="rounds (default: 9; 11 with --show)")
    parser.add_argument("--min-ms", type=float, default=25.0, metavar="MS", help="length of a block (default: 25)")
    parser.add_argument("--pause-ms", type=float, default=10.0, metavar="MS", help="sleep before a block (default: 10)")
    parser.add_argument("--output", "--json", type=Path, metavar="FILE", help="default: a new file in bench/results/")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two short rounds: does it run at all?")
    opencl = parser.add_argument_group("with --backend opencl")
    opencl.add_argument("--tiers", type=values(str), metavar="A,B", help="default: best,portable")
    opencl.add_argument("--device", metavar="DEVICE", help="an index, or a part of its name (default: the best)")
    opencl.add_argument(
        "--only", type=values(str), metavar="A,B", help=f"parts of --show (default: {','.join(SHOW_PARTS)})"
    )
    opencl.add_argument("--launches", type=positive, metavar="N", help="a cell of --show (default: 24)")
    opencl.add_argument("--block-size", type=positive, metavar="N", help="of the routing (default: the tier's choice)")
    arguments = parser.parse_args(argv)
    others = CPU_OPTIONS if arguments.backend == "opencl" else OPENCL_OPTIONS
    if given := [name for name in others if getattr(arguments, name)]:
        parser.error(f"--{given[0].replace('_', '-')}: not with --backend {arguments.backend}")
    arguments.only = arguments.only or SHOW_PARTS
    for name, known in (("models", MODEL_NAMES), ("compute_dtypes", COMPUTE_DTYPES), ("only", SHOW_PARTS)):
        unknown = set(getattr(arguments, name)) - set(known)
        if unknown:
            parser.error(f"--{name.replace('_', '-')}: got {', '.join(sorted(unknown))}, expected {', '.join(known)}")
    if arguments.show and len(arguments.isa) > 1:
        parser.error("--isa: got several, --show takes one")
    if arguments.cpus and arguments.threads and len(set(arguments.cpus)) < arguments.threads:
        parser.error(f"--threads: got {arguments.threads}, more than --cpus names")
    return arguments


def measure(arguments):
    """The JSON document."""
    # Only here: these load OpenMP runtimes, which must see the CPUs that were chosen.
    from bench.show import ShowSettings, run_show
    from bench.sweep import Settings, run_sweep
    from bench.torch_peers import TorchPeers
    from marlin_cy import get_backend
    from marlin_cy.commands.output import console

    backend = get_backend("cpu")
    contexts = [backend.new_context(num_threads=arguments.threads, isa=isa) for isa in arguments.isa or [None]]
    threads = contexts[0].num_threads
    peers = TorchPeers(threads, wanted=not arguments.no_torch)
    machine = describe(contexts[0], peers.report())
    screen = console()
    _print_machine(screen, machine)
    timing = {
        "repeats": arguments.repeats or (2 if arguments.quick else 11 if arguments.show else 9),
        "min_seconds": 1e-3 if arguments.quick else arguments.min_ms * 1e-3,
        "pause_seconds": 1e-3 if arguments.quick else arguments.pause_ms * 1e-3,
        "quick": arguments.quick,
    }
    document = {
        "schema": SCHEMA_VERSION,
        "mode": "show" if arguments.show else "sweep",
        "command": sys.argv[1:],
        "machine": machine,
        "timing": timing,
    }
    if arguments.show:
        settings = ShowSettings(isa=contexts[0].isa, threads=threads, **timing)
        return document | run_show(backend, peers, settings, screen)

    from bench.shapes import MODELS, TINY

    settings = Settings(
        models=(TINY,) if arguments.quick else tuple(MODELS[name] for name in arguments.models),
        rows=(1, 16) if arguments.quick else tuple(arguments.rows),
        tokens=(1, 16) if arguments.quick else arguments.tokens or TOKENS,
        compute_dtypes=tuple(arguments.compute_dtypes),
        isas=tuple(context.isa for context in contexts),
        memory_bytes=int(arguments.memory * 1e9 if arguments.memory else available_memory() // 2),
        **timing,
    )
    return document | {"results": run_sweep(backend, threads, peers, settings, screen)}


def measure_opencl(arguments):
    """The JSON document of ``--backend opencl``."""
    from bench.opencl_calls import open_tiers
    from bench.opencl_machine import describe_device
    from bench.opencl_show import ShowSettings, run_show
    from bench.opencl_sweep import Settings, run_sweep
    from bench.shapes import MODELS, TINY
    from marlin_cy.commands.output import console

    backends = open_tiers(arguments.tiers or ("best", "portable"), arguments.device)
    screen = console()
    machine = describe_device(backends)
    screen.print(
        f"{machine['device']} ({machine['platform']}, driver {machine['driver']}), tiers {', '.join(machine['tiers'])}"
    )
    document = {
        "schema": SCHEMA_VERSION,
        "mode": "opencl-show" if arguments.show else "opencl-sweep",
        "command": sys.argv[1:],
        "machine": machine,
    }
    if arguments.show:
        settings = ShowSettings(
            backends=backends,
            parts=arguments.only,
            tokens=arguments.tokens,
            launches=arguments.launches,
            block_size=arguments.block_size,
            quick=arguments.quick,
        )
        return document | run_show(settings, screen)
    settings = Settings(
        backends=backends,
        models=(TINY,) if arguments.quick else tuple(MODELS[name] for name in arguments.models),
        rows=(1, 16) if arguments.quick else tuple(arguments.rows),
        tokens=(1, 16) if arguments.quick else arguments.tokens or TOKENS,
        memory_bytes=int(arguments.memory * 1e9) if arguments.memory else None,
        repeats=arguments.repeats or (2 if arguments.quick else 24),
        quick=arguments.quick,
    )
    return document | run_sweep(settings, screen)


def _print_machine(screen, machine):
    torch = machine["torch"]
    peers = f"torch {torch['version']} ({torch['cpu_capability']})" if torch["version"] else "no torch"
    screen.print(
        f"{machine['cpu']}: CPUs {','.join(map(str, machine['cpus']))}, threads {machine['threads']}, "
        f"ISA {machine['isa']}, {peers}"
    )
    for name, value in machine["environment"].items():
        screen.print(f"{name}={value}")
    for peer, reason in torch["missing"].items():
        screen.print(f"{peer}: {reason}")
    if machine["load_average"] > 0.5:
        screen.print(
            f"[yellow]Load average {machine['load_average']:.1f} at the start: others use this machine.[/yellow]"
        )
    if siblings_among(machine["cpus"]):
        screen.print("[yellow]Some of these CPUs share a core; --cpus chooses others.[/yellow]")


if __name__ == "__main__":
    sys.exit(main())
