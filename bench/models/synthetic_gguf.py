"""``python -m bench gguf``: a model of the same shape as ``synthetic.py`` writes, in the format of llama.cpp.

The quantised weights are random blocks of Q4_0: 32 weights of 4 bits and a scale in float16, 18 bytes. Router,
embedding and head are not quantised, as in the checkpoint. Needs ``pip install gguf``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.common.options import positive
from bench.models.synthetic import QWEN3_30B_A3B, TINY, VOCAB_SIZE

__all__ = ["add_options", "run", "write_qwen3_moe_gguf"]

CONTEXT_LENGTH = 65536  # no measurement is deeper
BLOCK = 32
BLOCK_BYTES = 18
DISTINCT_EXPERTS = 4  # random blocks of so many experts are drawn; the others repeat them


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write")
    parser.add_argument("--layers", type=positive, default=8, help="0.35 GB each (default: 8)")
    parser.add_argument("--quick", action="store_true", help="tiny layers: only checks that it runs")


def run(arguments: argparse.Namespace) -> int:
    """Write the file; returns the exit code."""
    write_qwen3_moe_gguf(arguments.out, arguments.layers, TINY if arguments.quick else QWEN3_30B_A3B)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e9:.2f} GB")
    return 0


def write_qwen3_moe_gguf(
    path: Path, num_layers: int, sizes: Mapping[str, int] = QWEN3_30B_A3B, *, vocab_size: int = VOCAB_SIZE
) -> None:
    """Write a Qwen3-MoE model with random Q4_0 weights and no tokenizer.

    Parameters
    ----------
    path : Path
    num_layers : int
    sizes : dict
        Sizes of a layer, by the names of ``config.json``.
    vocab_size : int

    Raises
    ------
    ValueError
        gguf is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"gguf cannot be imported ({error}): pip install gguf") from error
    rng = np.random.default_rng(0)
    hidden, inter, experts = sizes["hidden_size"], sizes["moe_intermediate_size"], sizes["num_experts"]
    heads, kv_heads, head_dim = (sizes[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    writer: Any = gguf.GGUFWriter(path, "qwen3moe", use_temp_file=False)
    for name, value in (
        ("block_count", num_layers),
        ("context_length", CONTEXT_LENGTH),
        ("embedding_length", hidden),
        ("feed_forward_length", 6144),
        ("head_count", heads),
        ("head_count_kv", kv_heads),
        ("key_length", head_dim),
        ("value_length", head_dim),
        ("layer_norm_rms_eps", 1e-6),
        ("rope_freq_base", 1e6),
        ("expert_count", experts),
        ("expert_used_count", sizes["num_experts_per_tok"]),
        ("expert_feed_forward_length", inter),
        ("vocab_size", vocab_size),
        ("tokenizer_model", "none"),
        ("file_type", gguf.LlamaFileType.MOSTLY_Q4_0),
    ):
        getattr(writer, f"add_{name}")(value)

    def add_floats(name: str, *shape: int, dtype: Any = np.float32) -> None:
        writer.add_tensor(f"{name}.weight", (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(dtype))

    def add_ones(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    def add_quantised(name: str, *shape: int) -> None:
        blocks = q4_0_blocks(rng, *shape)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    add_floats("token_embd", vocab_size, hidden, dtype=np.float16)
    add_floats("output", vocab_size, hidden, dtype=np.float16)
    add_ones("output_norm", hidden)
    for layer in range(num_layers):
        block = f"blk.{layer}"
        for name, size in (
            ("attn_norm", hidden),
            ("ffn_norm", hidden),
            ("attn_q_norm", head_dim),
            ("attn_k_norm", head_dim),
        ):
            add_ones(f"{block}.{name}", size)
        add_floats(f"{block}.ffn_gate_inp", experts, hidden)
        add_quantised(f"{block}.attn_q", heads * head_dim, hidden)
        add_quantised(f"{block}.attn_k", kv_heads * head_dim, hidden)
        add_quantised(f"{block}.attn_v", kv_heads * head_dim, hidden)
        add_quantised(f"{block}.attn_output", hidden, heads * head_dim)
        add_quantised(f"{block}.ffn_gate_exps", experts, inter, hidden)
        add_quantised(f"{block}.ffn_up_exps", experts, inter, hidden)
        add_quantised(f"{block}.ffn_down_exps", experts, hidden, inter)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def q4_0_blocks(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.uint8]:
    """Random Q4_0 weights of ``shape``, whose last dimension is K: uint8, of 18 bytes for every 32 weights.

    A block is a scale in float16 and 16 bytes of codes. With these scales, outputs are about as large as inputs.
    """
    *outer, k = shape
    distinct = (min(outer[0], DISTINCT_EXPERTS), *outer[1:]) if len(outer) > 1 else tuple(outer)
    count = int(np.prod(distinct)) * (k // BLOCK)
    blocks = rng.integers(0, 256, (count, BLOCK_BYTES), dtype=np.uint8)
    scales = (rng.uniform(0.8, 1.2, count) / (4.6 * np.sqrt(k))).astype(np.float16)
    blocks[:, :2] = scales.view(np.uint8).reshape(count, 2)
    rows = blocks.reshape(*distinct, k // BLOCK * BLOCK_BYTES)
    return rows if len(outer) == 1 else rows[np.arange(outer[0]) % distinct[0]]
