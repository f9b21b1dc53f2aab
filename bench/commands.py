"""The table of commands of ``python -m bench``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["COMMANDS", "Command"]


class Command(NamedTuple):
    """A command: a module with ``add_options(parser)`` and ``run(arguments)``, and settings that its name implies."""

    module: str
    help: str
    implied: Mapping[str, Any] = {}


# Modules are imported when their command is run. None of them may load OpenMP on import: the runtime counts CPUs when
# it is loaded, and `--threads` and `--cpus` have to come before that.
COMMANDS = {
    "compare": Command(
        "bench.peers.compare", "time this library and every peer that runs here (default when no command is given)"
    ),
    "tables": Command("bench.report.tables", "print the tables of a saved comparison"),
    "pictures": Command("bench.report.pictures", "draw a saved comparison"),
    "products": Command("bench.cpu.sweep", "time products over the shapes of real models", {"kinds": ("products",)}),
    "layers": Command("bench.cpu.sweep", "time whole layers over the shapes of real models", {"kinds": ("layers",)}),
    "sweep": Command("bench.cpu.sweep", "time both products and layers", {"kinds": ("products", "layers")}),
    "show": Command("bench.cpu.show", "measure the claims, each beside its bar"),
    "before-after": Command("bench.cpu.before_after", "time two builds of this library against each other"),
    "cost": Command("bench.cpu.cost", "predict the time of layers from what the machine can do, and measure it"),
    "models": Command("bench.models.measure", "measure whole models: loading, memory, speed in transformers"),
    "decoder": Command("bench.models.decoder", "measure the decoder beside llama.cpp and transformers"),
    "serve": Command("bench.models.serve", "measure what the server adds to the model that it serves"),
    "vllm": Command("bench.models.vllm", "measure the plugin of vLLM beside transformers and vLLM's own experts"),
    "mpi": Command("bench.models.mpi", "measure a layer on several hosts, by MPI, beside one host"),
    "gguf": Command("bench.models.synthetic_gguf", "write a model with random weights for llama.cpp"),
    "gptq": Command("bench.models.synthetic", "write a checkpoint with random weights, 4-bit or mixed"),
    "opencl products": Command("bench.opencl.sweep", "time products on an OpenCL device", {"kinds": ("products",)}),
    "opencl layers": Command("bench.opencl.sweep", "time whole layers on an OpenCL device", {"kinds": ("layers",)}),
    "opencl sweep": Command(
        "bench.opencl.sweep", "time both products and layers on an OpenCL device", {"kinds": ("products", "layers")}
    ),
    "opencl decoder": Command("bench.opencl.decoder", "time whole models on an OpenCL device, in µs a layer"),
    "opencl attention": Command("bench.opencl.attention", "time attention alone on an OpenCL device, in µs"),
    "opencl show": Command("bench.opencl.show", "measure the claims about OpenCL, each beside its bar"),
    "list": Command("bench.report.listing", "list commands, models and peers, and why a peer cannot run here"),
}
