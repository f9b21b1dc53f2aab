"""The arguments of every OpenCL kernel: one table per kernel, in the order of the kernel's declaration.

A table maps names to types, both spelled as in the ``.cl`` file: ``"uint"``, ``"global float*"``, ``"local uint4*"``.
INPUT, OUTPUT, LOGIT and PREPARED are the element types that the macros INPUT_TYPE, OUTPUT_TYPE, LOGITS_TYPE and
PREPARED_TYPE choose. The ``.cl`` files document the arguments.

At the end are functions that put the arguments of a launch in the order of a table: each takes them by name.

``tests/test_opencl_arguments.py`` compares the tables with what a compiler reports for every kernel.
"""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from marlin_cy.opencl.decoder.arguments import DECODER_KERNELS

__all__ = [
    "KERNELS",
    "Arguments",
    "Macros",
    "align_values",
    "arguments_of",
    "by_name",
    "combine_values",
    "is_local",
    "is_pointer",
    "listed_values",
    "mapped_values",
    "numpy_types",
    "pack_values_values",
    "pack_words_values",
    "prepare_row_values",
    "product_input_values",
    "product_output_values",
    "rescale_values",
    "route_align_values",
    "route_values",
    "routed_values",
    "shared_factor_values",
    "weigh_tokens_values",
]

Arguments: TypeAlias = Mapping[str, str]
Macros: TypeAlias = Mapping[str, int]

NUMBERS: Mapping[str, type[np.number[Any]]] = {
    "int": np.int32,
    "uint": np.uint32,
    "ulong": np.uint64,
    "float": np.float32,
}


def arguments_of(kernel: str, macros: Macros) -> Arguments:
    """The table of a kernel in a program that is built with ``macros``."""
    return KERNELS[kernel](macros)


def is_pointer(kind: str) -> bool:
    """Whether an argument of this type is a buffer or local memory."""
    return kind.endswith("*")


def is_local(kind: str) -> bool:
    """Whether an argument of this type is local memory."""
    return kind.startswith("local ")


def numpy_types(arguments: Arguments) -> list[type[np.number[Any]] | None]:
    """The types for ``pyopencl.Kernel.set_arg_types``: None for a pointer."""
    return [None if is_pointer(kind) else NUMBERS[kind] for kind in arguments.values()]


# Rows and work (common.cl) ------------------------------------------------------------------------

ROUTED_WORK = {
    "sorted_ids": "global int*",
    "sorted_offset": "ulong",
    "expert_ids": "global int*",
    "expert_offset": "ulong",
    "past": "global int*",
    "past_offset": "ulong",
    "past_limit": "int",
    "valid": "int",
    "block_size": "int",
    "top_k": "int",
    "slot_input": "int",
}
LISTED_WORK = {"list": "global int*", "listed": "int"}


def work(macros: Macros) -> Arguments:
    """WORK_ARGS."""
    return ROUTED_WORK if macros.get("ROUTED") else LISTED_WORK


# Products (common.cl, reduce.cl) ------------------------------------------------------------------

WEIGHTS = {
    "num_experts": "uint",
    "experts_per_part": "uint",
    "expert_words": "ulong",
    "k": "uint",
    "n": "uint",
    "groups": "uint",
    "group_shift": "uint",
    "weight_factor": "float",
    "tiny_factor": "float",
}
PRODUCT_INPUT = {
    "input": "global INPUT*",
    "input_offset": "ulong",
    "row_factor": "global float*",
}
SPLITS = {"splits": "int"}
SUMMED_WEIGHTS = {"num_experts": "uint", "n": "uint"}
PRODUCT_OUTPUT = {
    "output": "global OUTPUT*",
    "output_offset": "ulong",
    "output_stride": "uint",
    "bias": "global float*",
    "partial": "global float*",
    "tiles_capacity": "uint",
}


def gemm(macros: Macros) -> Arguments:
    """GEMM_ARGS: the same for every tier."""
    parts = {f"w{part}": "global uint*" for part in range(macros.get("PARTS", 1))}
    return {**parts, **WEIGHTS, **PRODUCT_INPUT, **PRODUCT_OUTPUT, **SPLITS, **work(macros)}


def reduce_splits(macros: Macros) -> Arguments:
    """The arguments of ``reduce_splits``."""
    return {**SUMMED_WEIGHTS, **PRODUCT_OUTPUT, **SPLITS, **work(macros)}


# Preparation (prepare.cl) -------------------------------------------------------------------------

PREPARE_ROW = {
    "input": "global INPUT*",
    "input_offset": "ulong",
    "output": "global PREPARED*",
    "row_factor": "global float*",
    "k_in": "uint",
    "k_out": "uint",
    "order": "global int*",
}


MAPPED = {"map": "global int2*"}


def prepare_rows(macros: Macros) -> Arguments:
    """PREPARE_ARGS, and GATHER_ARGS for the value of GATHER."""
    match macros.get("GATHER", 0):
        case 2:
            return {**PREPARE_ROW, "num_experts": "uint", **work(macros)}
        case 3:
            return {**PREPARE_ROW, **MAPPED}
        case _:
            return PREPARE_ROW


# Layers (routing.cl, align.cl, align_prepare.cl, route_align.cl, moe.cl) --------------------------

ROUTE = {
    "logits": "global LOGIT*",
    "logits_offset": "ulong",
    "num_experts": "uint",
    "top_k": "uint",
    "normalise": "int",
    "factor": "float",
    "scale": "global float*",
    "jitter": "float",
    "bias": "global float*",
    "num_groups": "uint",
    "topk_groups": "uint",
    "ids": "global int*",
    "ids_offset": "ulong",
    "weights": "global float*",
    "weights_offset": "ulong",
    "fours": "local uint4*",
    "groups": "local uint*",
    "picked": "local float*",
}
ALIGN = {
    "ids": "global int*",
    "ids_offset": "ulong",
    "pairs": "uint",
    "num_experts": "uint",
    "block_size": "uint",
    "sorted_ids": "global int*",
    "sorted_offset": "ulong",
    "expert_ids": "global int*",
    "expert_offset": "ulong",
    "past": "global int*",
    "past_offset": "ulong",
    "counts": "local uint*",
}
ALIGN_FEW = {
    "block_size": "uint",
    "sorted_ids": "global int*",
    "expert_ids": "global int*",
    "past": "global int*",
    "marks": "local uint*",
    "arrived": "global uint*",
    "launch_base": "uint",
}
WEIGH_TOKENS = {
    "input": "global INPUT*",
    "input_offset": "ulong",
    "weights": "global float*",
    "weights_offset": "ulong",
    "output": "global float*",
    "width": "uint",
}
SHARED_FACTOR = {
    "input": "global INPUT*",
    "input_offset": "ulong",
    "gate": "global float*",
    "factors": "global float*",
    "width": "uint",
}
COMBINE = {
    "input": "global INPUT*",
    "input_offset": "ulong",
    "ids": "global int*",
    "ids_offset": "ulong",
    "weights": "global float*",
    "weights_offset": "ulong",
    "num_experts": "uint",
    "top_k": "uint",
    "shared": "global INPUT*",
    "factors": "global float*",
    "output": "global OUTPUT*",
    "output_offset": "ulong",
    "width": "uint",
    "groups_per_token": "uint",
}


def route_align(macros: Macros) -> Arguments:
    """The arguments of ``route_align``. With PREPARES, the arguments that prepare a row follow."""
    return {**ROUTE, **ALIGN_FEW, **(PREPARE_ROW if macros.get("PREPARES") else {})}


# Packing of weights (pack.cl) ---------------------------------------------------------------------

PACK_WORDS = {
    "words": "global uint*",
    "n": "uint",
    "rows": "global int*",
    "rows_offset": "ulong",
    "packed_k": "uint",
    "packed": "global uint*",
    "base": "ulong",
    "column_offset": "uint",
}
PACK_VALUES = {
    "values": "global uchar*",
    "size": "uint",
    "n": "uint",
    "from_rows": "global int*",
    "from_offset": "ulong",
    "packed": "global uint*",
    "base": "ulong",
    "record_bytes": "uint",
    "column_offset": "uint",
}
RESCALE = {
    "packed": "global uint*",
    "expert_words": "ulong",
    "scale_base": "ulong",
    "exponent": "int",
    "bfloat16": "int",
}

KERNELS: Mapping[str, Callable[[Macros], Arguments]] = MappingProxyType(
    {
        "gemm": gemm,
        "reduce_splits": reduce_splits,
        "prepare_rows": prepare_rows,
        "route": lambda macros: ROUTE,
        "align": lambda macros: ALIGN,
        "align_prepare": lambda macros: {**ALIGN, **PREPARE_ROW},
        "route_align": route_align,
        "weigh_tokens": lambda macros: WEIGH_TOKENS,
        "shared_factor": lambda macros: SHARED_FACTOR,
        "combine": lambda macros: COMBINE,
        "pack_words": lambda macros: PACK_WORDS,
        "pack_values": lambda macros: PACK_VALUES,
        "rescale": lambda macros: RESCALE,
        **DECODER_KERNELS,
    }
)
"""The table of each kernel by its name, from the macros of its program."""


# Arguments by name --------------------------------------------------------------------------------


def by_name(names: Iterable[str]) -> Callable[..., tuple[Any, ...]]:
    """A function that takes a keyword argument for each name and returns a tuple of the values, in the names' order.

    :class:`~marlin_cy.opencl.launch.Launch` takes tuples because a dictionary doubles the host's cost. The function is
    compiled from text, which makes it faster than a loop over the names. Source of the idea:
    :func:`collections.namedtuple`.
    """
    listed = ", ".join(names)
    function: Callable[..., tuple[Any, ...]] = eval(f"lambda *, {listed}: ({listed},)", {"__builtins__": {}})
    return function


# These functions leave out the constants of a launch, such as WEIGHTS and SPLITS. Where a kernel takes arguments of two
# tables, concatenate the tuples.
routed_values = by_name(ROUTED_WORK)
listed_values = by_name(LISTED_WORK)
product_input_values = by_name(PRODUCT_INPUT)
product_output_values = by_name(PRODUCT_OUTPUT)
prepare_row_values = by_name(PREPARE_ROW)
mapped_values = by_name(MAPPED)
route_values = by_name(ROUTE)
align_values = by_name(ALIGN)
route_align_values = by_name(ALIGN_FEW)
weigh_tokens_values = by_name(WEIGH_TOKENS)
shared_factor_values = by_name(SHARED_FACTOR)
combine_values = by_name(COMBINE)
pack_words_values = by_name(PACK_WORDS)
pack_values_values = by_name(PACK_VALUES)
rescale_values = by_name(RESCALE)
