"""Whole models: loading, opening a packed folder, memory, and speed in transformers.

``python bench/bench_models.py`` makes a checkpoint of Qwen3-30B-A3B's layer shapes with random weights in a
temporary folder (1 GB; 2 GB more for the packed folder) and prints the claims about whole models, each beside
its bar. Needs Linux and ``pip install 'marlin_cy[transformers]'``. See README.md beside this file.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# An installed marlin_cy comes first; without one, the package built in place beside this folder.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.machine import describe
from bench.synthetic import write_qwen3_moe

PARTS = ("pack", "open", "memory", "speed")
EXPERTS = ("eager", "batched_mm", "grouped_mm")  # transformers' implementations that run on a CPU
CONTEXT = 64  # tokens in the cache while decoding


def main(argv=None):
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--layers", type=int, default=2, help="of the model whose speed and memory are measured")
    parser.add_argument("--packed-layers", type=int, default=6, help="of the packed folder: 0.33 GB each")
    parser.add_argument("--prefill", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints; a temporary folder unless given")
    parser.add_argument("--output", type=Path, help="save the figures as JSON")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child[0]](Path(arguments.child[1]))))
        return 0
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: got {', '.join(sorted(unknown))}, expected some of {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        lines = list(measure(Path(folder), parts, arguments))
    if arguments.output:
        from marlin_cy import get_backend

        machine = describe(get_backend("cpu").new_context(), None)
        arguments.output.write_text(json.dumps({"machine": machine, "show": lines}, indent=1) + "\n")
    return 0


def measure(folder, parts, arguments):
    """Each claim: ``{"what", "measured", "bar", "unit", "passed"}``, printed when it is known."""

    def line(what, measured, bar, unit, at_least, **more):
        passed = measured >= bar if at_least else measured <= bar
        relation = ">=" if at_least else "<="
        print(f"{what}: {measured:.3g} {unit} (bar {relation} {bar:g}: {'met' if passed else 'MISSED'}) {more or ''}")
        sys.stdout.flush()
        return {"what": what, "measured": measured, "bar": bar, "unit": unit, "passed": passed, **more}

    model = folder / "model"
    nbytes = write_qwen3_moe(model, arguments.layers)
    if "pack" in parts:
        figures = packing_speed(model, arguments.rounds)
        yield line("packing while loading GPTQ, qweight bytes a second", figures["median"] / 1e9, 1, "GB/s", True)
    if "memory" in parts:
        figures = child("memory", model)
        for key, bar in (("resident", 1.15), ("peak", 1.3)):
            yield line(f"{key} memory of the loaded model / checkpoint", figures[key] / nbytes, bar, "", False)
    if "speed" in parts:
        figures = speed(model, arguments)
        yield line("decode, tokens/s of a layer / bfloat16", figures["decode"], 3, "x", True, **figures["decode_us"])
        name = f"prefill of {arguments.prefill} tokens / bfloat16"
        yield line(name, figures["prefill"], 1, "x", True, **figures["prefill_us"])
    if "open" in parts:
        source, packed = folder / "source", folder / "packed"
        write_qwen3_moe(source, arguments.packed_layers)
        subprocess.run([sys.executable, "-m", "marlin_cy", "pack", source, packed], check=True, env=environment())
        size = sum(path.stat().st_size for path in packed.glob("*.safetensors"))
        for cold in (False, True):
            seconds = []
            for _ in range(3):
                if cold:
                    forget(packed)
                seconds.append(child("open", packed)["seconds"])
            name = (
                f"opening a packed folder of {size / 1e9:.1f} GB, to the first result, {'not ' if cold else ''}in cache"
            )
            yield line(name, statistics.median(seconds), 0.5, "s", False)


def environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def child(what, folder):
    """The figures of a measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", what, str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment()).stdout)


def forget(folder):
    """Take a folder's files out of the system's cache."""
    os.sync()
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def packing_speed(folder, rounds):
    """qweight bytes a second while a layer's experts are loaded from files in the system's cache."""
    from marlin_cy import open_checkpoint

    rates = []
    with open_checkpoint(folder) as checkpoint:
        names = [name for name in checkpoint.tensor_names if ".layers.0.mlp.experts." in name and "qweight" in name]
        nbytes = sum(checkpoint.tensor_info(name).nbytes for name in names)
        for _ in range(rounds):
            begin = time.perf_counter()
            layer = checkpoint.moe_layer(0)
            rates.append(nbytes / (time.perf_counter() - begin))
            del layer
    return {"median": statistics.median(rates), "rates": rates}


def measure_open(folder):
    """Seconds from opening a packed folder to the first output of its first layer."""
    import numpy as np

    from marlin_cy import get_backend, open_checkpoint
    from marlin_cy.moe import MoeLayer  # importing is not what is measured

    del MoeLayer
    backend = get_backend("cpu")
    begin = time.perf_counter()
    checkpoint = open_checkpoint(folder, backend=backend)
    layer = checkpoint.moe_layer(0)
    x = np.ones((1, layer.hidden_size), np.float32)
    layer(backend.new_context(), x, x @ checkpoint.router_weight(0).astype(np.float32).T)
    return {"seconds": time.perf_counter() - begin}


def measure_memory(folder):
    """Bytes that a loaded model adds to the process: resident after a first token, and at the peak."""
    import resource

    import torch

    from marlin_cy.integrations.transformers import load

    # Libraries' own buffers, threads and code are there before.
    torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))
    before = resident()
    model = load(folder)
    with torch.no_grad():
        model(torch.zeros((1, 8), dtype=torch.int64))
    after = resident()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"resident": after - before, "peak": peak - before}


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def speed(folder, arguments):
    """Ratios of transformers' time with bfloat16 weights to its time with this library's, and seconds of each."""
    import torch

    from marlin_cy.integrations.dequantized import dequantized_model
    from marlin_cy.integrations.transformers import load

    ours = load(folder)
    dense = dequantized_model(folder, torch.bfloat16)
    prompt = torch.randint(2, 1000, (1, arguments.prefill), generator=torch.Generator().manual_seed(0))
    steps = {"ours": Steps(ours, prompt), "bfloat16": Steps(dense, prompt)}
    implementation = {}
    for phase in ("prefill", "decode"):
        seconds = {}
        for name in EXPERTS:
            dense.set_experts_implementation(name)
            try:
                getattr(steps["bfloat16"], phase)()
                seconds[name] = min(getattr(steps["bfloat16"], phase)() for _ in range(2))
            except RuntimeError as error:  # batched_mm copies each token's experts: 26 GB for 512 tokens
                print(f"{name} cannot do the {phase}: {str(error).splitlines()[0][-90:]}", file=sys.stderr)
        implementation[phase] = min(seconds, key=seconds.get)
    figures = {}
    for phase in ("decode", "prefill"):
        dense.set_experts_implementation(implementation[phase])
        times = {side: [] for side in steps}
        for round_number in range(arguments.rounds + 1):
            for side in sorted(steps, reverse=round_number % 2 == 1):
                times[side].append(getattr(steps[side], phase)())
        ratios = [b / a for a, b in zip(times["ours"][1:], times["bfloat16"][1:], strict=True)]
        figures[phase] = statistics.median(ratios)
        figures[f"{phase}_us"] = {
            f"{side}_us_a_layer": round(statistics.median(seconds[1:]) / arguments.layers * 1e6)
            for side, seconds in times.items()
        } | {"bfloat16_experts": implementation[phase]}
    return figures


class Steps:
    """Seconds of a prompt, or of one token after some that are in the cache."""

    def __init__(self, model, prompt):
        import torch

        self._torch, self._model, self._prompt = torch, model, prompt

    def prefill(self):
        with self._torch.no_grad():
            begin = time.perf_counter()
            self._model(self._prompt, use_cache=True)
            return time.perf_counter() - begin

    def decode(self, tokens=16):
        with self._torch.no_grad():
            cache = self._model(self._prompt[:, :CONTEXT], use_cache=True).past_key_values
            seconds = []
            for token in range(tokens):
                begin = time.perf_counter()
                self._model(self._prompt[:, token : token + 1], past_key_values=cache, use_cache=True)
                seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds)


CHILDREN = {"memory": measure_memory, "open": measure_open}

if __name__ == "__main__":
    sys.exit(main())
