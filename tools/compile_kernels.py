"""Compile every kernel file offline, for GPUs that this machine does not have.

    python tools/compile_kernels.py [--target gfx90a] [--file gemm] [--show] [--quick]

clang compiles for AMD and NVIDIA GPUs, and to SPIR-V for Intel GPUs. Every file is compiled for every target, in
several variants that together have every branch of the file. Inline PTX is compiled for NVIDIA only; for other targets
``-DNO_PTX`` leaves it out, so that the rest of those files is checked, too. Nothing runs.

Debian packages that it needs: clang-19, as clang 14 has neither gfx1100 nor all functions for NVIDIA; for SPIR-V
llvm-spirv and clang of one version, such as 15, and spirv-tools, which validate the result. ptxas, which assembles
NVIDIA's code, is optional. ``--show`` prints the commands.
"""

import argparse
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeAlias

from marlin_cy.opencl.decoder.phased_shape import LAYER, SHARED_LAYER
from marlin_cy.opencl.gemm.codes import code_macros
from marlin_cy.opencl.program import kernel_files, source
from marlin_cy.opencl.selfcheck import CODES

FLAGS = [
    "-x",
    "cl",
    "-Xclang",
    "-finclude-default-header",
    "-Werror=implicit-function-declaration",
    "-Werror=incompatible-pointer-types",
]
PROBE = "__kernel void probe(__global float2 *to, __global const half *from) { *to = vload_half2(0, from); }\n"
GROUPS_32, GROUPS_128 = {"GROUP_32": 1}, {"GROUP_32": 0}
ROUTED = {"ROUTED": 1, "SYMMETRIC": 1, "ALIGNED": 1}
HALVES = {"INPUT_TYPE": 1, "OUTPUT_TYPE": 1}
BFLOATS = {"INPUT_TYPE": 2, "OUTPUT_TYPE": 2}
SPLIT = {"SPLIT": 1, "ROW_FACTOR": 1}
FEW = {"ROWS": 8, "K_WAVES": 8, "WAVE_STRIPS": 2}
MANY = {"ROWS": 64, "K_WAVES": 1, "ROW_WAVES": 4, "COLUMN_WAVES": 2, "WAVE_STRIPS": 2, "ROW_STEP": 4}
TILED = {"ROWS": 64, "K_WAVES": 1, "ROW_WAVES": 2, "COLUMN_WAVES": 2, "WAVE_STRIPS": 4}
MMA = [
    {**HALVES, **ROUTED, "ROWS": 8},
    {**HALVES, **GROUPS_32, "ROW_FACTOR": 1, "ROWS": 8, "PARTS": 8},
    {**HALVES, **ROUTED, **GROUPS_32, "BIAS": 2, "ROWS": 8},
    {"INPUT_TYPE": 1, "ROUTED": 1, "BIAS": 1, "ROWS": 8, "DEPTH": 4, "WAVES": 4},
]
DIMS_OF_LATENTS, DIMS_OF_HEADS = {"HEAD_DIM": 576, "VALUE_DIM": 512}, {"HEAD_DIM": 128, "VALUE_DIM": 128}
LATENT_TILES = {
    "HEAD_DIM": 576,
    "VALUE_DIM": 512,
    "QUERIES": 16,
    "HEADS": 8,
    "QUERY_SETS": 2,
    "KEY_SETS": 1,
    "KEYS": 64,
}
GROUPED_TILES = {
    "HEAD_DIM": 128,
    "VALUE_DIM": 128,
    "QUERIES": 32,
    "HEADS": 8,
    "QUERY_SETS": 8,
    "KEY_SETS": 1,
    "KEYS": 32,
}
STEP = {
    "TOKENS": 1,
    "WAVES": 16,
    "LAYERS": 48,
    "HIDDEN": 2048,
    "NUM_HEADS": 32,
    "NUM_KV_HEADS": 4,
    "HEAD_DIM": 128,
    "HEADS": 8,
    "INNER": 768,
    "EXPERTS": 128,
    "TOP_K": 8,
    "PAIRS_ROTATED": 64,
    "INTERLEAVED": 0,
    "QKV_TEAM": 4,
    "GATE_TEAM": 4,
    **dict.fromkeys(("QKV_SHIFT", "O_SHIFT", "GATE_SHIFT", "DOWN_SHIFT"), 7),
    "GATE_WORDS": 417792,
    "DOWN_WORDS": 208896,
    "EXPERTS_PER_PART": 128,
    "EMBEDDING_TYPE": 2,
    "ROUTER_TYPE": 2,
    "CACHE_TYPE": 1,
    "ACTIVATION": 1,
    "NORMALISE": 1,
    "NUM_GROUPS": 1,
    "TOPK_GROUPS": 1,
    "GROUP_32": 0,
    "LAYER_BYTES": LAYER.itemsize,
    "HAS_HEAD": 1,
    "HEAD_TYPE": 2,
    "VOCABULARY": 151936,
    "GROUPING": 0,
    "ALIGNED": 1,
}
STEP_SEGMENTS = {"CACHE_TYPE": 2, "SEGMENTS": 8, "SEGMENT_SHIFT": 9}
STEP_SHARED = {"SHARED": 1, "LAYER_BYTES": SHARED_LAYER.itemsize}
STEP_ATTENTION = {"GATED": 1, "SINKS": 1, "CAPPED": 1}
STEP_DENSE = {"DENSE": 1, "PROJECTION_TYPE": 2, "EXPERT_BIASES": 1}
SMALL_TILES = {"WAVES": 2, "WAVE_STRIPS": 1, "KEYS": 64, "QUERIES_LOCAL": 0}
TILES = {"WAVES": 4, "WAVE_STRIPS": 2, "KEYS": 32, "QUERIES_LOCAL": 1}
# Code type, scale record and group shift of weights, which together have every branch of records.cl and of the files
# that include it. Files of products are compiled with each of them once.
OTHER_WEIGHTS = [
    ("iq4_nl", "float16", 7),
    ("uint8", "float16", 7),
    ("uint8", "float32", 4),
    ("uint4", "float32_min", 6),
    ("uint4", "float16_min", 5),
    ("uint4", "two_level_min", 5),
    ("uint8", "float32_min", 4),
    ("e2m1", "two_level", 6),
    ("uint8", "two_level", 4),
]
# Macro sets by file, which together have every branch of it; a file that is not here is compiled without macros. Files
# of products are compiled with each set for the two code types of the tiers' check, too.
VARIANTS: dict[str, list[dict[str, int]]] = {
    "gemm_portable": [
        {},
        {"UNROLL": 0, "PARTS": 8, "BIAS": 1},
        {**FEW, **ROUTED, **HALVES},
        {**FEW, **ROUTED, **HALVES, "BIAS": 2},
        {**FEW, **BFLOATS, **SPLIT, "ROUTED": 1, "PARTS": 2},
        {**MANY, **ROUTED, **HALVES},
    ],
    "gemm_portable_tiled": [
        {**TILED, **ROUTED, **HALVES},
        {**TILED, **BFLOATS, **SPLIT, "PARTS": 4},
        {**TILED, "BIAS": 1, "UNROLL": 0},
    ],
    "gemm_subgroup": [
        {},
        {**FEW, **ROUTED, **HALVES},
        {**FEW, **ROUTED, **HALVES, "SHUFFLE": 1},
        {**FEW, **ROUTED, **HALVES, "BIAS": 2},
        {**FEW, **ROUTED, "DOT": 1, "SHUFFLE": 1},
        {**FEW, **ROUTED, "BIAS": 2, "DOT": 1, "SHUFFLE": 1},
        {**MANY, **SPLIT, "INPUT_TYPE": 2, "PARTS": 4},
        {**MANY, **SPLIT, "DOT": 1, "PARTS": 2},
    ],
    "gemm_mma_direct": [
        *MMA,
        {**HALVES, **SPLIT, "ROWS": 8},
        {**HALVES, **ROUTED, "ROWS": 16, "STRIPS_PER_WAVE": 3, "WAVES": 6},
    ],
    "gemm_mma_tiled": [
        {**HALVES, **ROUTED, "ROWS": 64, "STRIPS_PER_WAVE": 4, "WAVES": 4, "DEPTH": 3},
        {**HALVES, **GROUPS_32, "ROW_FACTOR": 1, "ROWS": 32, "PARTS": 8},
        {**HALVES, **ROUTED, **GROUPS_32, "BIAS": 2, "ROWS": 64, "STRIPS_PER_WAVE": 4, "WAVES": 4, "DEPTH": 3},
        {**HALVES, "BIAS": 2, "ROW_FACTOR": 1, "ROWS": 32},
        {"INPUT_TYPE": 1, "ROUTED": 1, "BIAS": 1, "ROWS": 16, "DEPTH": 4, "WAVES": 4},
    ],
    "prepare": [
        {**kind, "GATHER": gather, "ROUTED": int(gather == 2)}
        for gather in range(4)
        for kind in (
            {"PREPARED_TYPE": 0, "INPUT_TYPE": 0},
            {"PREPARED_TYPE": 1, "INPUT_TYPE": 1, "ACTIVATION": 1 + gather},
            {"PREPARED_TYPE": 2, "INPUT_TYPE": 2, "GROUP_SHIFT": 7, "ACTIVATION": 4 - gather},
        )
    ],
    "align_prepare": [
        {"PREPARED_TYPE": 0, "INPUT_TYPE": 2, "GATHER": 1},
        {"PREPARED_TYPE": 2, "INPUT_TYPE": 1, "GATHER": 1, "GROUP_SHIFT": 4},
        {"PREPARED_TYPE": 1, "INPUT_TYPE": 2, "GATHER": 0, "ALIGNED": 1},
    ],
    "reduce": [{"OUTPUT_TYPE": 1, "BIAS": 1}, {"OUTPUT_TYPE": 1, "BIAS": 2}, {"OUTPUT_TYPE": 2, "ROUTED": 1}],
    "moe": [{}, {**HALVES, "SHARED": 1}, {**BFLOATS, "WEIGHTED": 0, "SHARED": 2}],
    "route_align": [
        {},
        {"LOGITS_TYPE": 1, "GROUPING": 1, "PREPARES": 1, "PREPARED_TYPE": 2, "GATHER": 1, "GROUP_SHIFT": 7},
        {"LOGITS_TYPE": 2, "INPUT_TYPE": 2, "PREPARES": 1, "PREPARED_TYPE": 1},
        {"LOGITS_TYPE": 2, "INPUT_TYPE": 2, "PREPARES": 1, "PREPARED_TYPE": 1, "PTX": 1},
    ],
    "routing": [
        {},
        {"LOGITS_TYPE": 1, "SCORING": 0, "CORRECTED": 1},
        {"LOGITS_TYPE": 2, "SCORING": 1, "GROUPING": 1},
        {"SCORING": 2, "CORRECTED": 1, "GROUPING": 2},
    ],
    "pack": [{"CODE_BITS": 8}, {"CODE_BITS": 8, "GROUP_16": 1}, {}],
    "decoder_rows": [
        {"INPUT_TYPE": 2, "ADDED": 1, "OUTPUT_TYPE": 1, "ACTIVATION": 1},
        {"INPUT_TYPE": 1, "PICKED": 1, "ROW_ITEMS": 16, "ACTIVATION": 4},
        {"ADDED": 2, "ACTIVATION": 3},
    ],
    "decoder_sample": [{}, {"SAMPLE_ITEMS": 1024}],
    "decoder_router": [
        {"WEIGHT_TYPE": 1},
        {"WEIGHT_TYPE": 2, "OUTPUT_TYPE": 1, "ALIGNED": 1, "WIDTH": 7168},
        {"WEIGHT_TYPE": 2, "OUTPUT_TYPE": 1, "ALIGNED": 1, "ROUTES": 1, "PTX": 1},
        {"WEIGHT_TYPE": 1, "ALIGNED": 1, "ROUTES": 1, "SCORING": 2, "CORRECTED": 1, "GROUPING": 2},
    ],
    "decoder_heads": [{}, {"CACHE_TYPE": 1, "SEGMENTS": 8}, {"CACHE_TYPE": 2, "HEAD_ITEMS": 8}],
    "decoder_attention": [
        {"CACHE_TYPE": 1, "OUTPUT_TYPE": 1, "ALIGNED": 1},
        {"CACHE_TYPE": 2, "SEGMENTS": 8, **LATENT_TILES},
        {"CACHE_TYPE": 0, "ALIGNED": 1, **GROUPED_TILES},
    ],
    "decoder_attention_rows_mma": [
        {"CACHE_TYPE": 2, "SEGMENTS": 8, "HEAD_DIM": 256, "VALUE_DIM": 256, "HEADS": 7, "WAVES": 4},
        {"CACHE_TYPE": 1, "OUTPUT_TYPE": 1, **DIMS_OF_HEADS, "HEADS": 12, "WAVES": 4},
    ],
    "decoder_attention_tiles_mma": [
        {"SEGMENTS": 8, "CACHE_TYPE": 2, **DIMS_OF_HEADS, "HEADS": 7, **SMALL_TILES},
        {"CACHE_TYPE": 1, "OUTPUT_TYPE": 1, **DIMS_OF_HEADS, **TILES, "HEADS": 8},
    ],
    "decoder_dense": [
        {"INPUT_TYPE": 1, "WEIGHT_TYPE": 2, "ALIGNED": 1},
        {"WEIGHT_TYPE": 1, "DENSE_ROWS": 4},
        {"WEIGHT_TYPE": 3, "DENSE_ROWS": 4, "ALIGNED": 1, "SCALE_K": 128},
        {"WEIGHT_TYPE": 3},
        {"WEIGHT_TYPE": 4},
        {"WEIGHT_TYPE": 4, "ALIGNED": 1},
        {"WEIGHT_TYPE": 2, "DENSE_ROWS": 4, "ALIGNED": 1, "TEAM": 8},
    ],
    "decoder_step": [
        {**STEP, "TENSOR": 0, "RESIDENT": 0, "GROUPING": 2, "NUM_GROUPS": 8, "TOPK_GROUPS": 4, "HAS_HEAD": 0},
        {
            **STEP,
            "TENSOR": 0,
            "RESIDENT": 0,
            "TOKENS": 4,
            "INTERLEAVED": 1,
            "SCORING": 2,
            "CORRECTED": 1,
            "HAS_HEAD": 0,
        },
        {
            **STEP,
            **STEP_SEGMENTS,
            "TENSOR": 1,
            "RESIDENT": 0,
            "TOKENS": 4,
            "WAVES": 8,
            "GROUP_32": 1,
            "EXPERTS_PER_PART": 32,
        },
        {**STEP, **STEP_SHARED, "TENSOR": 0, "RESIDENT": 0, "TOKENS": 2},
        {**STEP, **STEP_ATTENTION, "TENSOR": 0, "RESIDENT": 0, "TOKENS": 2},
        {**STEP, **STEP_ATTENTION, **STEP_DENSE, "TENSOR": 1, "RESIDENT": 1, "TOKENS": 8, "PTX": 1},
        {**STEP, **STEP_SHARED, "TENSOR": 1, "RESIDENT": 1, "TOKENS": 8, "PTX": 1},
        {**STEP, "TENSOR": 1, "RESIDENT": 1, "PTX": 1},
    ],
    "decoder_dense_mma": [
        {"INPUT_TYPE": 1, "WEIGHT_TYPE": 1, "ALIGNED": 1, "ROW_STRIPS": 4, "COLUMN_WAVES": 8, "K_WAVES": 1},
        {"INPUT_TYPE": 0, "WEIGHT_TYPE": 2, "ALIGNED": 1, "ROW_STRIPS": 1, "COLUMN_WAVES": 1, "K_WAVES": 8},
        {"WEIGHT_TYPE": 3, "ALIGNED": 1, "ROW_STRIPS": 4, "COLUMN_WAVES": 8, "K_WAVES": 1, "SCALE_K": 128},
        {"INPUT_TYPE": 1, "WEIGHT_TYPE": 3, "ALIGNED": 1, "ROW_STRIPS": 1, "COLUMN_WAVES": 1, "K_WAVES": 8},
        {"WEIGHT_TYPE": 4, "ALIGNED": 1, "ROW_STRIPS": 2, "COLUMN_WAVES": 4, "K_WAVES": 2},
    ],
    "decoder_delta": [{"OUTPUT_TYPE": 1}, {"KEY_DIM": 16, "VALUE_DIM": 48, "STATE_COLUMNS": 32, "KEY_PARTS": 1}],
}


def variants_of(file: str) -> list[dict[str, int]]:
    """All macro sets of a file."""
    variants = VARIANTS.get(file, [{}])
    if not file.startswith(("gemm", "decoder_step")):
        return variants
    found = [
        {**variant, **code_macros(name, bool(variant.get("SYMMETRIC")))}
        for name in reversed(CODES)
        for variant in variants
    ]
    if not file.startswith("gemm"):
        return found
    others = [
        {**variants[number % len(variants)], **code_macros(codes, number % 2 == 1, scales, shift)}
        for number, (codes, scales, shift) in enumerate(OTHER_WEIGHTS)
    ]
    for macros, (_, _, shift) in zip(others, OTHER_WEIGHTS, strict=True):
        if has_ptx(file):
            macros["GROUP_32"] = int(shift == 5)
        if file == "gemm_mma_tiled":  # in the 64 KiB of local memory that AMD's GPUs have
            macros |= {"WAVES": 4, "STRIPS_PER_WAVE": 2, "DEPTH": 2}
    return [*others, *found]


def has_ptx(file: str) -> bool:
    """Whether a file has inline PTX."""
    return "mma" in file or file == "decoder_step"


def has_device_atomics(file: str, macros: Mapping[str, int]) -> bool:
    """Whether a program has OpenCL's atomics of device scope: see ``arrive.cl``."""
    return (file == "route_align" or bool(macros.get("ROUTES"))) and not macros.get("PTX")


Commands: TypeAlias = Callable[[list[str], str], list[list[str]]]


class Target(NamedTuple):
    """A kind of device.

    Attributes
    ----------
    commands : callable
        ``commands(flags, folder)``: the commands that compile ``folder/program.cl``.
    missing : callable
        ``missing()``: the programs for this target that the machine lacks, as text; None if it lacks nothing.
    newest : str
        The version of OpenCL C that has sub-groups and atomics of device scope for this target.
    macros : callable
        ``macros(file)``: macros that a file needs for this target.
    skip : callable
        ``skip(file, macros)``: whether a program is not for this target.
    """

    commands: Commands
    missing: Callable[[], str | None]
    newest: str = "CL2.0"
    macros: Callable[[str], dict[str, int]] = lambda file: {"NO_PTX": 1} if has_ptx(file) else {}
    skip: Callable[[str, dict[str, int]], object] = lambda file, macros: False


def newest(*names: str) -> str | None:
    """The newest version, such as ``"-19"`` or ``""``, in which all these programs are installed; None if none is."""
    for version in (*(f"-{number}" for number in range(30, 13, -1)), ""):
        if all(shutil.which(name + version) for name in names):
            return version
    return None


def lacking(*names: str) -> Callable[[], str | None]:
    """``Target.missing`` for a target that needs these programs in one version."""
    return lambda: None if newest(*names) is not None else f"{' and '.join(names)} of one version"


def new_enough(name: str, commands: Commands) -> Callable[[], str | None]:
    """``Target.missing`` for a target that needs a clang which knows the GPU, and has its OpenCL functions."""

    @functools.cache
    def missing() -> str | None:
        version = newest("clang")
        if version is None:
            return "clang"
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "program.cl").write_text(PROBE)
            command = commands([*FLAGS, "-cl-std=CL1.2"], folder)[0]
            if subprocess.run(command, capture_output=True).returncode != 0:
                return f"a newer clang (clang{version} does not compile for {name})"
        return None

    return missing


def amd(name: str) -> Target:
    """An AMD GPU."""

    def commands(flags: list[str], folder: str) -> list[list[str]]:
        machine = ["-target", "amdgcn-amd-amdhsa", f"-mcpu={name}", "-nogpulib"]
        return [
            [f"clang{newest('clang')}", *flags, *machine, "-O3", "-S", f"{folder}/program.cl", "-o", f"{folder}/out.s"]
        ]

    # clang has integer dot products and shuffles for AMD GPUs as built-in functions of its own, not as OpenCL's.
    return Target(
        commands, new_enough(name, commands), skip=lambda file, macros: {"DOT", "SHUFFLE", "PTX"} & macros.keys()
    )


def spirv(flags: list[str], folder: str) -> list[list[str]]:
    """The commands for SPIR-V."""
    version = newest("clang", "llvm-spirv")
    bitcode = ["-target", "spir64", "-Xclang", "-disable-llvm-passes", "-emit-llvm", "-c"]
    commands = [
        [f"clang{version}", *flags, *bitcode, f"{folder}/program.cl", "-o", f"{folder}/out.bc"],
        # From 1.4 on an entry point must list all variables, and the translator leaves constants out.
        [f"llvm-spirv{version}", "--spirv-max-version=1.3", f"{folder}/out.bc", "-o", f"{folder}/out.spv"],
    ]
    return [*commands, ["spirv-val", f"{folder}/out.spv"]] if shutil.which("spirv-val") else commands


def nvidia(name: str) -> Target:
    """An NVIDIA GPU."""

    def commands(flags: list[str], folder: str) -> list[list[str]]:
        machine = ["-target", "nvptx64-nvidia-cuda", "-Xclang", "-target-cpu", "-Xclang", name]
        machine += ["-Xclang", "-target-feature", "-Xclang", "+ptx80", "-Dasm=__asm__"]
        ptx = [
            f"clang{newest('clang')}",
            *flags,
            *machine,
            "-O3",
            "-S",
            f"{folder}/program.cl",
            "-o",
            f"{folder}/out.ptx",
        ]
        # With -c, OpenCL's functions may remain external.
        cubin = ["ptxas", f"-arch={name}", "-c", f"{folder}/out.ptx", "-o", f"{folder}/out.cubin"]
        return [ptx, cubin] if shutil.which("ptxas") else [ptx]

    return Target(
        commands,
        new_enough(name, commands),
        macros=lambda file: {},
        skip=lambda file, macros: not (has_ptx(file) or "PTX" in macros),
    )


TARGETS = {
    "gfx90a": amd("gfx90a"),
    "gfx1100": amd("gfx1100"),
    "spir64": Target(spirv, lacking("clang", "llvm-spirv"), newest="CL3.0", skip=lambda file, macros: "PTX" in macros),
    "sm_80": nvidia("sm_80"),
    "sm_90": nvidia("sm_90"),
}


class Program(NamedTuple):
    """A file with a set of macros, for a target."""

    file: str
    macros: dict[str, int]
    target: str

    def __str__(self) -> str:
        return " ".join([self.target, self.file, *(f"{name}={value}" for name, value in self.macros.items())])

    def commands(self, folder: str) -> list[list[str]]:
        """The commands that compile the program, whose source is ``folder/program.cl``."""
        target, macros = TARGETS[self.target], self.macros
        if macros.get("DOT"):
            macros = {**macros, "__opencl_c_integer_dot_product_input_4x8bit_packed": 1}
        newest = self.file == "gemm_subgroup" or has_device_atomics(self.file, macros)
        standard = target.newest if newest else "CL1.2"
        defined = [f"-D{name}={value}" for name, value in {**macros, **target.macros(self.file)}.items()]
        return target.commands([*FLAGS, f"-cl-std={standard}", *defined], folder)

    def problem(self) -> str | None:
        """None if the program compiles, else the compiler's messages."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "program.cl").write_text(source(self.file))
            for command in self.commands(folder):
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode != 0:
                    return f"{command[0]}: {done.stdout}{done.stderr}"
        return None


def programs(target: str, quick: bool = False) -> list[Program]:
    """All programs for a target; with ``quick`` the last of each file, which has the most branches."""
    found = [
        [Program(file, macros, target) for macros in variants_of(file) if not TARGETS[target].skip(file, macros)]
        for file in kernel_files()
    ]
    return [program for variants in found for program in (variants[-1:] if quick else variants)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, help="compile for this target only")
    parser.add_argument("--file", default="", help="compile the files whose name contains this")
    parser.add_argument("--show", action="store_true", help="print the commands instead of running them")
    parser.add_argument("--quick", action="store_true", help="compile one variant of each file")
    args = parser.parse_args(arguments)
    jobs, failures = [], 0
    for name, target in TARGETS.items():
        if args.target in (None, name):
            if reason := target.missing():
                print(f"FAILED {name}: needs {reason}")
                failures += 1
                continue
            jobs += [program for program in programs(name, args.quick) if args.file in program.file]
    if args.show:
        for job in jobs:
            for command in job.commands("FOLDER"):
                print(" ".join(command))
        return int(failures > 0)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for job, problem in zip(jobs, pool.map(Program.problem, jobs), strict=True):
            failures += problem is not None
            print(f"FAILED {job}\n{problem}" if problem else f"ok     {job}", flush=True)
    print(f"{len(jobs)} programs, {failures} failed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
