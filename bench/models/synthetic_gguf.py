"""``python -m bench gguf``: a model of the same shape as ``synthetic.py`` writes, in the format of llama.cpp.

The quantised weights are random blocks. ``--types`` names a mix of types as llama.cpp's ``llama-quantize`` makes it:

- ``Q4_0``: all of it Q4_0. Embedding and head are float16, as in the checkpoint of ``synthetic.py``.
- ``Q4_K_M``: Q4_K; the head, half of ``attn_v`` and half of ``ffn_down_exps`` Q6_K. Where rows are no multiple of
  256, Q5_0 and Q8_0 take their place. Source: llama.cpp, ``llama-quant.cpp``.

The tokenizer is that of bytes, with a text such as ``<300>`` for each other token. Needs ``pip install gguf``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bench.common.options import positive
from bench.models.synthetic import QWEN3_30B_A3B, TINY, VOCAB_SIZE

__all__ = ["add_options", "run", "write_qwen3_moe_gguf"]

CONTEXT_LENGTH = 65536  # no measurement is deeper
TYPES = ("Q4_0", "Q4_K_M")
NORMAL = 1  # the kind of a token
DISTINCT_EXPERTS = 4  # random blocks of so many experts are drawn; the others repeat them


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write")
    parser.add_argument("--layers", type=positive, default=8, help="0.35 GB each (default: 8)")
    parser.add_argument("--types", choices=TYPES, default="Q4_0", help="default: Q4_0")
    parser.add_argument("--quick", action="store_true", help="tiny layers: only checks that it runs")


def run(arguments: argparse.Namespace) -> int:
    """Write the file; returns the exit code."""
    sizes = TINY if arguments.quick else QWEN3_30B_A3B
    write_qwen3_moe_gguf(arguments.out, arguments.layers, sizes, types=arguments.types)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e9:.2f} GB")
    return 0


def write_qwen3_moe_gguf(
    path: Path,
    num_layers: int,
    sizes: Mapping[str, int] = QWEN3_30B_A3B,
    *,
    vocab_size: int = VOCAB_SIZE,
    types: str = "Q4_0",
) -> None:
    """Write a Qwen3-MoE model with random weights.

    Parameters
    ----------
    path : Path
    num_layers : int
    sizes : dict
        Sizes of a layer, by the names of ``config.json``.
    vocab_size : int
    types : str
        A name in :data:`TYPES`.

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
        ("tokenizer_model", "gpt2"),
        ("tokenizer_pre", "default"),
        ("token_list", tokens_of(vocab_size)),
        ("token_types", [NORMAL] * vocab_size),
        ("token_merges", ["d e"]),
        ("eos_token_id", 0),
        ("file_type", gguf.LlamaFileType[f"MOSTLY_{types}"]),
    ):
        getattr(writer, f"add_{name}")(value)

    def add_floats(name: str, *shape: int, dtype: Any = np.float32) -> None:
        writer.add_tensor(f"{name}.weight", (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(dtype))

    def add_ones(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    def add_quantised(name: str, *shape: int, more: bool = False) -> None:
        kind = type_of(types, more, shape[-1])
        blocks = random_blocks(rng, kind, *shape)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType[kind])

    if types == "Q4_0":
        add_floats("token_embd", vocab_size, hidden, dtype=np.float16)
        add_floats("output", vocab_size, hidden, dtype=np.float16)
    else:
        add_quantised("token_embd", vocab_size, hidden)
        add_quantised("output", vocab_size, hidden, more=True)
    add_ones("output_norm", hidden)
    for layer in range(num_layers):
        block, more = f"blk.{layer}", has_more_bits(layer, num_layers)
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
        add_quantised(f"{block}.attn_v", kv_heads * head_dim, hidden, more=more)
        add_quantised(f"{block}.attn_output", hidden, heads * head_dim)
        add_quantised(f"{block}.ffn_gate_exps", experts, inter, hidden)
        add_quantised(f"{block}.ffn_up_exps", experts, inter, hidden)
        add_quantised(f"{block}.ffn_down_exps", experts, hidden, inter, more=more)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def has_more_bits(layer: int, num_layers: int) -> bool:
    """Whether a layer's values and outputs of experts have more bits in ``Q4_K_M``."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def type_of(types: str, more: bool, k: int) -> str:
    """The type of a matrix with rows of ``k`` weights; ``more``: one that has more bits."""
    if types == "Q4_0":
        return types
    if k % BLOCKS["Q4_K"].weights:
        return "Q8_0" if more else "Q5_0"
    return "Q6_K" if more else "Q4_K"


def tokens_of(vocab_size: int) -> list[str]:
    """A token for each byte, one of two letters, and texts."""
    from marlin_cy.decoder.detokenize import BYTES_OF_CHARACTERS

    tokens = [*BYTES_OF_CHARACTERS, "de"]
    return [*tokens, *(f"<{token}>" for token in range(len(tokens), vocab_size))][:vocab_size]


class Block(NamedTuple):
    """A quantised type.

    Attributes
    ----------
    weights, nbytes : int
        Of a block.
    scale : int
        The place of its float16 scale.
    minimum : int or None
        The place of its float16 minimum.
    deviation : float
        Standard deviation of the weights where the scale is 1, about.
    ratio : float
        The minimum over the scale with which weights have a mean of 0.
    """

    weights: int
    nbytes: int
    scale: int
    minimum: int | None
    deviation: float
    ratio: float


BLOCKS: Mapping[str, Block] = {
    "Q4_0": Block(32, 18, 0, None, 4.6, 0),
    "Q5_0": Block(32, 22, 0, None, 9.2, 0),
    "Q8_0": Block(32, 34, 0, None, 73.9, 0),
    "Q4_K": Block(256, 144, 0, 2, 222.0, 7.5),
    "Q6_K": Block(256, 210, 208, None, 1366.0, 0),
}


def random_blocks(rng: np.random.Generator, kind: str, *shape: int) -> npt.NDArray[np.uint8]:
    """Random weights of ``shape``, whose last dimension is K: uint8, of whole blocks.

    With these scales, outputs are about as large as inputs.
    """
    block = BLOCKS[kind]
    *outer, k = shape
    distinct = (min(outer[0], DISTINCT_EXPERTS), *outer[1:]) if len(outer) > 1 else tuple(outer)
    count = int(np.prod(distinct)) * (k // block.weights)
    blocks = rng.integers(0, 256, (count, block.nbytes), dtype=np.uint8)
    scales = (rng.uniform(0.8, 1.2, count) / (block.deviation * np.sqrt(k))).astype(np.float16)
    blocks[:, block.scale : block.scale + 2] = scales.view(np.uint8).reshape(count, 2)
    if block.minimum is not None:
        minima = (block.ratio * scales.astype(np.float32)).astype(np.float16)
        blocks[:, block.minimum : block.minimum + 2] = minima.view(np.uint8).reshape(count, 2)
    rows = blocks.reshape(*distinct, k // block.weights * block.nbytes)
    return rows if len(outer) == 1 else rows[np.arange(outer[0]) % distinct[0]]
