"""The arguments of the decoder's kernels, as :mod:`marlin_cy.opencl.arguments` has those of all others.

CACHE and WEIGHT are the element types that the macros CACHE_TYPE and WEIGHT_TYPE choose.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

__all__ = ["DECODER_KERNELS"]

# Rows (decoder_rows.cl) ---------------------------------------------------------------------------

EMBED_ROWS = {"batch": "global int*", "table": "global INPUT*", "x": "global float*", "width": "uint"}
NORM_ROWS = {
    "x": "global float*",
    "x_offset": "uint",
    "x_stride": "uint",
    "weight": "global float*",
    "output": "global OUTPUT*",
    "eps": "float",
    "width": "uint",
    "picked": "global int*",
    "picked_offset": "uint",
    "arrived": "global uint*",
    "added": "global float*",
}
ADDED_EXPERTS = {
    "ids": "global int*",
    "weights": "global float*",
    "num_experts": "uint",
    "top_k": "uint",
    "shared": "global float*",
    "factors": "global float*",
}
NORM_ROUTER = {
    "x": "global float*",
    "added": "global float*",
    "y": "global float*",
    "weight": "global float*",
    "output": "global OUTPUT*",
    "eps": "float",
    "router": "global WEIGHT*",
    "bias": "global float*",
    "logits": "global float*",
    "n": "uint",
    "arrived": "global uint*",
}
NORM_ROUTER_CHOICE = {
    "top_k": "uint",
    "normalise": "int",
    "factor": "float",
    "scale": "global float*",
    "jitter": "float",
    "correction": "global float*",
    "num_groups": "uint",
    "topk_groups": "uint",
    "ids": "global int*",
    "weights": "global float*",
    "fours": "local uint4*",
    "groups": "local uint*",
    "picked": "local float*",
    "block_size": "uint",
    "sorted_ids": "global int*",
    "expert_ids": "global int*",
    "past": "global int*",
    "marks": "local uint*",
}
GLU_ROWS = {"input": "global float*", "output": "global OUTPUT*", "width": "uint"}

# The choice of tokens (decoder_sample.cl) ---------------------------------------------------------

PENALISE_ROWS = {"sampling": "global int*", "logits": "global float*", "width": "uint"}
SAMPLE_ROWS = {**PENALISE_ROWS, "tables": "global uint*", "tokens": "global int2*"}

# Heads (decoder_heads.cl) -------------------------------------------------------------------------

PLACE_HEADS = {
    "batch": "global int*",
    "q": "global float*",
    "q_offset": "uint",
    "q_row_stride": "uint",
    "q_head_stride": "uint",
    "q_width": "uint",
    "out": "global float*",
    "out_offset": "uint",
    "out_row_stride": "uint",
    "out_head_stride": "uint",
    "q_norm": "global float*",
    "kv": "global float*",
    "k_offset": "uint",
    "v_offset": "uint",
    "kv_row_stride": "uint",
    "k_width": "uint",
    "v_width": "uint",
    "k_norm": "global float*",
    "k_norm_values": "uint",
    "k_rope_begin": "uint",
    "eps": "float",
    "cosine": "global float*",
    "sine": "global float*",
    "pairs": "uint",
    "interleaved": "int",
    "num_heads": "uint",
    "num_kv_heads": "uint",
}

# Attention (decoder_attention.cl, decoder_attention_*_mma.cl) -------------------------------------

ATTEND_QUERIES = {
    "batch": "global int*",
    "tiles": "uint",
    "q": "global float*",
    "q_row_stride": "uint",
    "q_head_stride": "uint",
}
ATTEND = {
    "num_heads": "uint",
    "num_kv_heads": "uint",
    "key_head": "uint",
    "value_head": "uint",
    "scale": "float",
    "soft_cap": "float",
    "window": "int",
    "sinks": "global float*",
    "gate_offset": "uint",
    "output": "global OUTPUT*",
}
SPLITS = {"partial": "global float*", "stats": "global float2*"}
MERGE_SPLITS = {
    "batch": "global int*",
    "tiles": "uint",
    "q": "global float*",
    "q_row_stride": "uint",
    "q_head_stride": "uint",
    "num_heads": "uint",
    "value_dim": "uint",
    "sinks": "global float*",
    "gate_offset": "uint",
    "output": "global OUTPUT*",
    "partial": "global float*",
    "stats": "global float2*",
    "splits_at": "uint",
}

# Dense products (decoder_dense.cl, decoder_dense_mma.cl) ------------------------------------------

DENSE = {
    "x": "global INPUT*",
    "x_offset": "uint",
    "x_stride": "uint",
    "x_batch": "uint",
    "weight": "global WEIGHT*",
    "scales": "global float*",
    "bias": "global float*",
    "out": "global float*",
    "out_offset": "uint",
    "out_stride": "uint",
    "out_batch": "uint",
    "rows": "uint",
    "n": "uint",
    "k": "uint",
}

# A step in one launch (decoder_step.cl) -----------------------------------------------------------

DECODER_STEP = {
    "batch": "global int*",
    "layers": "constant Layer*",
    "embedding": "ulong",
    "x": "global float*",
    "heads": "global float*",
    "attended": "global half*",
    "partial": "global float*",
    "stats": "global float2*",
    "logits": "global float*",
    "ids": "global int*",
    "weights": "global float*",
    "inner": "global float*",
    "inner_most": "global uint*",
    "final_norm": "ulong",
    "head": "ulong",
    "vocabulary": "global float*",
    "best": "global uint2*",
    "rows": "uint",
    "splits": "uint",
    "first": "uint",
    "last": "uint",
    "state": "global uint*",
    "number": "uint",
    "target": "uint",
    "patience": "uint",
}
ADDRESS_OF = {"buffer": "global uchar*", "addresses": "global ulong*", "place": "uint"}

# Gated DeltaNet (decoder_delta.cl) ----------------------------------------------------------------

SHORT_CONV = {
    "batch": "global int*",
    "segments": "uint",
    "input": "global float*",
    "input_stride": "uint",
    "weight": "global float*",
    "states": "global float*",
    "output": "global float*",
    "channels": "uint",
    "conv_width": "uint",
}
DELTA_RULE = {
    "batch": "global int*",
    "segments": "uint",
    "mixed": "global float*",
    "raw": "global float*",
    "raw_stride": "uint",
    "gates": "global float*",
    "a_log": "global float*",
    "dt_bias": "global float*",
    "output": "global float*",
    "states": "global float*",
    "conv_states": "global float*",
    "num_k_heads": "uint",
    "num_v_heads": "uint",
    "conv_width": "uint",
}
GATED_NORM_HEADS = {
    "y": "global float*",
    "gate": "global float*",
    "gate_offset": "uint",
    "gate_stride": "uint",
    "weight": "global float*",
    "output": "global OUTPUT*",
    "heads": "uint",
    "width": "uint",
    "eps": "float",
}


def norm_rows(macros: Mapping[str, int]) -> Mapping[str, str]:
    """The arguments of ``norm_rows``."""
    return {**NORM_ROWS, **(ADDED_EXPERTS if macros.get("ADDED") == 2 else {})}


def norm_router(macros: Mapping[str, int]) -> Mapping[str, str]:
    """The arguments of ``norm_router``."""
    return {**NORM_ROUTER, **(NORM_ROUTER_CHOICE if macros.get("ROUTES") else {})}


def cache(macros: Mapping[str, int]) -> Mapping[str, str]:
    """CACHE_ARGS of ``decoder.cl``."""
    numbers = range(1, macros.get("SEGMENTS", 1))
    return {
        **({"segment_shift": "uint"} if numbers else {}),
        **{name: "global CACHE*" for kind in ("keys", "values") for name in (kind, *(f"{kind}{i}" for i in numbers))},
    }


def place_heads(macros: Mapping[str, int]) -> Mapping[str, str]:
    """The arguments of ``place_heads``."""
    return {**PLACE_HEADS, **cache(macros)}


def attend_tiles(macros: Mapping[str, int]) -> Mapping[str, str]:
    """The arguments of ``attend_tiles``."""
    return attend_rows(macros) if macros.get("SPLIT_TILES") else {**ATTEND_QUERIES, **cache(macros), **ATTEND}


def attend(macros: Mapping[str, int]) -> Mapping[str, str]:
    """The arguments of ``attend``."""
    return {**ATTEND_QUERIES, **cache(macros), **ATTEND, **SPLITS}


def attend_rows(macros: Mapping[str, int]) -> Mapping[str, str]:
    """The arguments of ``attend_rows``."""
    return {**attend(macros), "arrived": "global uint*"}


def always(table: Mapping[str, str]) -> Callable[[Mapping[str, int]], Mapping[str, str]]:
    """The same table for all macros."""
    return lambda macros: table


DECODER_KERNELS: Mapping[str, Callable[[Mapping[str, int]], Mapping[str, str]]] = MappingProxyType(
    {
        "norm_rows": norm_rows,
        "embed_rows": always(EMBED_ROWS),
        "glu_rows": always(GLU_ROWS),
        "penalise_rows": always(PENALISE_ROWS),
        "sample_rows": always(SAMPLE_ROWS),
        "norm_router": norm_router,
        "place_heads": place_heads,
        "attend": attend,
        "attend_tiles": attend_tiles,
        "attend_rows": attend_rows,
        "merge_splits": always(MERGE_SPLITS),
        "dense_few": always(DENSE),
        "dense_many": always(DENSE),
        "decoder_step": always(DECODER_STEP),
        "address_of": always(ADDRESS_OF),
        "dense_tiles": always(DENSE),
        "short_conv": always(SHORT_CONV),
        "delta_rule": always(DELTA_RULE),
        "gated_norm_heads": always(GATED_NORM_HEADS),
    }
)
"""The table of each kernel by its name, from the macros of its program."""
