"""Checkpoints with the layer shapes of real models and random weights, for benchmarks of loading and running."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from bench.common.options import positive

__all__ = ["QWEN3_30B_A3B", "TINY", "VOCAB_SIZE", "add_options", "num_weights", "run", "write_qwen3_moe"]

QWEN3_30B_A3B = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
}
"""Sizes of a layer, by the names of ``config.json``, which is the source."""

TINY = {
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
"""Sizes that only show whether a benchmark runs."""

VOCAB_SIZE = 1024
CONTEXT_LENGTH = 4096
GROUP_SIZE = 128

SYMMETRIC_ZEROS = {4: 0x77777777, 8: 0x7F7F7F7F}
"""A word of stored zero points, by the width of codes: 8 and 128, minus one."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command that writes such a checkpoint."""
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument("--layers", type=positive, default=8, help="0.33 GB each (default: 8)")
    parser.add_argument("--attention-bits", type=int, choices=tuple(SYMMETRIC_ZEROS), default=4, help="default: 4")
    parser.add_argument("--quick", action="store_true", help="tiny layers: only checks that it runs")


def run(arguments: argparse.Namespace) -> int:
    """Write the folder."""
    sizes = TINY if arguments.quick else QWEN3_30B_A3B
    nbytes = write_qwen3_moe(arguments.out, arguments.layers, sizes, attention_bits=arguments.attention_bits)
    print(f"{arguments.out}: {nbytes / 1e9:.2f} GB")
    return 0


def write_qwen3_moe(
    folder: Path,
    num_layers: int,
    sizes: Mapping[str, int] = QWEN3_30B_A3B,
    *,
    vocab_size: int = VOCAB_SIZE,
    max_position_embeddings: int = CONTEXT_LENGTH,
    seed: int = 0,
    attention_bits: int = 4,
) -> int:
    """Write a Qwen3-MoE checkpoint in GPTQ form, one file per layer: random codes, symmetric, group size 128.

    Parameters
    ----------
    folder : Path
        Created if it does not exist.
    num_layers : int
    sizes : dict
        Sizes of a layer, by the names of ``config.json``.
    vocab_size : int
        Small by default, so that the layers dominate the measurements, not the embedding.
    max_position_embeddings : int
        The model's context.
    seed : int
    attention_bits : int
        The width of the attention's codes, 4 or 8. The experts' is 4.

    Returns
    -------
    int
        Bytes of all tensors.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    hidden, inter = sizes["hidden_size"], sizes["moe_intermediate_size"]
    heads = sizes["num_attention_heads"] * sizes["head_dim"]
    kv_heads = sizes["num_key_value_heads"] * sizes["head_dim"]
    weight_map: dict[str, str] = {}
    total = 0

    def bf16(*shape: int) -> Any:
        return (rng.standard_normal(shape, np.float32) / np.sqrt(shape[-1])).astype(ml_dtypes.bfloat16)

    def ones(n: int) -> Any:
        return np.ones(n, ml_dtypes.bfloat16)

    def quantised(name: str, k: int, n: int, bits: int = 4) -> dict[str, Any]:
        # Codes 0 to 15 have a standard deviation of 4.6: with this scale, outputs are about as large as inputs.
        scale = rng.uniform(0.8, 1.2, (k // GROUP_SIZE, n)) / (2**bits * 0.289 * np.sqrt(k))
        return {
            f"{name}.qweight": rng.integers(0, 2**32, (k * bits // 32, n), np.uint32).view(np.int32),
            f"{name}.scales": scale.astype(np.float16),
            f"{name}.qzeros": np.full((k // GROUP_SIZE, n * bits // 32), SYMMETRIC_ZEROS[bits], np.int32),
            f"{name}.g_idx": np.arange(k, dtype=np.int32) // GROUP_SIZE,
        }

    def save(number: int, tensors: dict[str, Any]) -> None:
        nonlocal total
        file = f"model-{number:05}-of-{num_layers + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(array.nbytes for array in tensors.values())

    save(
        1,
        {
            "model.embed_tokens.weight": bf16(vocab_size, hidden),
            "lm_head.weight": bf16(vocab_size, hidden),
            "model.norm.weight": ones(hidden),
        },
    )
    for layer in range(num_layers):
        name = f"model.layers.{layer}"
        tensors = {
            f"{name}.input_layernorm.weight": ones(hidden),
            f"{name}.post_attention_layernorm.weight": ones(hidden),
            f"{name}.self_attn.q_norm.weight": ones(sizes["head_dim"]),
            f"{name}.self_attn.k_norm.weight": ones(sizes["head_dim"]),
            f"{name}.mlp.gate.weight": bf16(sizes["num_experts"], hidden),
        }
        for part, k, n in (
            ("q", hidden, heads),
            ("k", hidden, kv_heads),
            ("v", hidden, kv_heads),
            ("o", heads, hidden),
        ):
            tensors |= quantised(f"{name}.self_attn.{part}_proj", k, n, attention_bits)
        for expert in range(sizes["num_experts"]):
            experts = f"{name}.mlp.experts.{expert}"
            tensors |= quantised(f"{experts}.gate_proj", hidden, inter)
            tensors |= quantised(f"{experts}.up_proj", hidden, inter)
            tensors |= quantised(f"{experts}.down_proj", inter, hidden)
        save(layer + 2, tensors)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    quantization: dict[str, Any] = {
        "bits": 4,
        "group_size": GROUP_SIZE,
        "desc_act": False,
        "sym": True,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
    }
    if attention_bits != 4:
        quantization["dynamic"] = {r"+:.*\.self_attn\..*": {"bits": attention_bits}}
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": num_layers,
        "vocab_size": vocab_size,
        "intermediate_size": 6144,
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "dtype": "bfloat16",
        **sizes,
        "quantization_config": quantization,
    }
    _write_json(folder / "config.json", config)
    return total


def num_weights(config: Mapping[str, Any]) -> int:
    """Number of weights of the matrices of such a model."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    heads = 2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    experts = config["num_experts"] * (3 * config["moe_intermediate_size"] + 1)
    return int(hidden * (config["num_hidden_layers"] * (heads * head_dim + experts) + 2 * config["vocab_size"]))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
