"""Small GGUF models: random blocks of every type, models of transformers' classes in llama.cpp's form, and damage.

A model's linear layers and experts get the values of random blocks. The GGUF file holds the blocks, a dense checkpoint
of transformers the values. Orders and names are those of llama.cpp's ``conversion/*.py``.
"""

import json
import re
import struct

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from written_once import written_once

# For each type: (place of the float16 d, place of the float16 m or dmin, its ratio to d for values around 0).
SCALES = {
    "Q4_0": (0, None, 0),
    "Q4_1": (0, 2, -7.5),
    "Q5_0": (0, None, 0),
    "Q5_1": (0, 2, -15.5),
    "Q8_0": (0, None, 0),
    "Q4_K": (0, 2, 7.5),
    "Q5_K": (0, 2, 15.5),
    "Q6_K": (208, None, 0),
    "IQ4_NL": (0, None, 0),
    "IQ4_XS": (0, None, 0),
}
BLOCK_TYPES = (*SCALES, "MXFP4")


def random_blocks(rng, kind, shape, std=0.1):
    """uint8 ``[..., bytes of a row]``: random blocks whose values have about this standard deviation."""
    block, nbytes = gguf.GGML_QUANT_SIZES[Type[kind]]
    count = int(np.prod(shape)) // block
    data = rng.integers(0, 256, (count, nbytes), dtype=np.uint8)
    if kind == "MXFP4":
        data[:, 0] = rng.integers(-1, 2, count) + 127 + round(np.log2(std / 2.5))
        return data.reshape(*shape[:-1], -1)
    place, second, ratio = SCALES[kind]

    def scaled(d):
        d = np.asarray(d * factors, np.float16)
        data[:, place : place + 2] = d[:, None].view(np.uint8)
        if second is not None:
            m = (ratio * d.astype(np.float32)).astype(np.float16)
            data[:, second : second + 2] = m[:, None].view(np.uint8)
        return data

    factors = rng.uniform(0.8, 1.2, count)
    return scaled(std / values_of(scaled(1.0), kind).std() if count else 1.0).reshape(*shape[:-1], -1)


def values_of(data, kind):
    """float32: the values of blocks, by the package gguf, which takes long for many short rows."""
    return gguf.quants.dequantize(data.reshape(1, -1), Type[kind]).reshape(*data.shape[:-1], -1)


# ---------------------------------------------------------------------------------------------
# Models


ARCHITECTURES = {
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
    "qwen3_5_moe_text": "qwen35moe",
    "mixtral": "llama",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm4_moe": "glm4moe",
    "gpt_oss": "gpt-oss",
}
LINEAR = re.compile(r"(?<!lm_head)_proj\.weight$|in_proj_(qkvz|qkv|z)\.weight$|\.w[123]\.weight$")
MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
EXPERT = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}


class Entry:
    """A tensor on its way into a file: values, or blocks with their values."""

    def __init__(self, values, kind="F32", data=None):
        self.values, self.kind, self.data = values, kind, data

    def with_rows(self, rows):
        return Entry(self.values[rows], self.kind, None if self.data is None else self.data[rows])

    def of_experts(self, rows):
        """Some rows of every expert."""
        return Entry(self.values[:, rows], self.kind, None if self.data is None else self.data[:, rows])

    def columns_of(self, columns):
        """Columns in another order. Blocks have it already."""
        return self if self.data is not None else Entry(self.values[:, columns])


@written_once
def write_gguf_model(folder, model_type, kind="Q4_0", *, kinds=(), seed=0, edit=None, split=False, **changes):
    """Write ``folder / "model.gguf"`` and ``folder / "dense"``, a checkpoint of transformers; returns both.

    ``kinds`` are pairs ``(pattern, type)``: the types of tensors whose names in the family match, in place of ``kind``;
    "F32", "F16" and "BF16" are not quantised. ``edit(fields, tensors)`` changes what is written. ``split``: deepseek2's
    ``kv_b_proj`` in two parts, as newer files have it.
    """
    from language_models import new_model, save_tensors
    from safetensors.torch import load_file

    rng = np.random.default_rng(seed)
    dense = folder / "dense"
    new_model(model_type, seed, **changes).save_pretrained(dense)
    config = json.loads((dense / "config.json").read_text())
    tensors = {name: tensor.float().numpy() for name, tensor in load_file(dense / "model.safetensors").items()}
    entries = {}
    for name, values in list(tensors.items()):
        chosen = next((other for pattern, other in kinds if re.search(pattern, name)), None)
        if chosen is None and (LINEAR.search(name) or re.search(r"experts\.\w+_proj$", name)):
            chosen = kind
        entry = rounded(rng, values, chosen, by_inputs=name.endswith("_proj"))
        if model_type == "qwen3_5_moe_text" and name.endswith("out_proj.weight") and entry.data is not None:
            # Blocks are of inputs in llama.cpp's order.
            entry.values = entry.values[:, np.argsort(tiles(config, config["linear_value_head_dim"]))]
        entries[name] = entry
        tensors[name] = entry.values
        if name.endswith("_proj"):  # gpt-oss stores [experts, inputs, outputs]
            tensors[name] = np.swapaxes(entry.values, 1, 2)
    save_tensors(dense, {name: np.ascontiguousarray(array) for name, array in tensors.items()})
    fields, stored = in_llama_cpp_form(config, entries, split)
    if edit is not None:
        edit(fields, stored)
    path = folder / "model.gguf"
    write_gguf(path, fields, stored)
    return path, dense


def rounded(rng, values, kind, by_inputs=False):
    """The entry of a tensor in a type."""
    if by_inputs:
        values = np.swapaxes(values, 1, 2)
    if kind in (None, "F32"):
        return Entry(values)
    if kind in ("F16", "BF16"):
        data = gguf.quants.quantize(values, Type[kind])
        return Entry(values_of(data, kind), kind, data)
    data = random_blocks(rng, kind, values.shape, values.std())
    return Entry(values_of(data, kind), kind, data)


def in_llama_cpp_form(config, entries, split=False):
    """``(fields, tensors)``: what llama.cpp stores of a model."""
    model_type = config["model_type"]
    arch = ARCHITECTURES[model_type]
    stored, experts = {}, {}
    for name, entry in entries.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        number, inner = (int(match[1]), match[2]) if match else (None, name)
        prefix = "" if number is None else f"blk.{number}."
        if expert := re.fullmatch(r"\w+\.experts\.(\d+)\.(\w+)\.weight", inner):
            experts.setdefault((number, EXPERT[expert[2]]), {})[int(expert[1])] = entry
            continue
        for found, other in special(config, arch, inner, entry, split):
            stored[f"{prefix}{found}"] = other
    for (number, part), found in experts.items():
        ordered = [found[index] for index in range(len(found))]
        data = None if ordered[0].data is None else np.stack([entry.data for entry in ordered])
        stored[f"blk.{number}.ffn_{part}_exps.weight"] = Entry(
            np.stack([entry.values for entry in ordered]), ordered[0].kind, data
        )
    return fields_of(config, arch), stored


def special(config, arch, name, entry, split):
    """``(name in the layer, entry)`` pairs of a tensor of the family."""
    module, _, end = name.rpartition(".")
    heads = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}
    reorder = arch == "qwen35moe"
    if arch in ("qwen3next", "qwen35moe") and name.endswith("norm.weight") and module != "linear_attn.norm":
        entry = Entry(entry.values + np.float32(1))
    if arch == "llama" and module in heads:
        entry = entry.with_rows(pairs_together(len(entry.values), config[heads[module]]))
    match name:
        case "post_attention_layernorm.weight":
            post = arch in ("qwen3next", "qwen35moe", "glm4moe", "gpt-oss")
            return [("post_attention_norm.weight" if post else "ffn_norm.weight", entry)]
        case "self_attn.sinks":
            return [("attn_sinks.weight", entry)]
        case "mlp.gate.e_score_correction_bias":
            return [("exp_probs_b.bias", entry)]
        case "self_attn.kv_b_proj.weight" if split:
            width = config["qk_nope_head_dim"], config["v_head_dim"]
            by_head = entry.values.reshape(-1, sum(width), entry.values.shape[1])
            keys, values = by_head[:, : width[0]], by_head[:, width[0] :]
            return [("attn_k_b.weight", Entry(np.swapaxes(keys, 1, 2))), ("attn_v_b.weight", Entry(values))]
        case "linear_attn.A_log":
            return [("ssm_a", tiled(config, Entry(-np.exp(entry.values)), 1, reorder))]
        case "linear_attn.dt_bias":
            return [("ssm_dt.bias", tiled(config, entry, 1, reorder))]
        case "linear_attn.conv1d.weight":
            return [("ssm_conv1d.weight", tiled(config, Entry(entry.values[:, 0]), None, reorder))]
        case "linear_attn.in_proj_qkv.weight":
            return [("attn_qkv.weight", tiled(config, entry, None, reorder))]
        case "linear_attn.in_proj_z.weight":
            return [("attn_gate.weight", tiled(config, entry, config["linear_value_head_dim"], reorder))]
        case "linear_attn.in_proj_b.weight" | "linear_attn.in_proj_a.weight":
            return [(f"{MODULES[module]}.weight", tiled(config, entry, 1, reorder))]
        case "linear_attn.out_proj.weight" if reorder:
            return [("ssm_out.weight", entry.columns_of(tiles(config, config["linear_value_head_dim"])))]
        case "linear_attn.in_proj_qkvz.weight":
            rows = by_kind(config)
            values = config["linear_num_value_heads"] * config["linear_value_head_dim"]
            return [
                ("attn_qkv.weight", entry.with_rows(rows[:-values])),
                ("attn_gate.weight", entry.with_rows(rows[-values:])),
            ]
        case "mlp.experts.gate_up_proj" | "mlp.experts.gate_up_proj_bias":
            end = "bias" if name.endswith("bias") else "weight"
            return [
                (f"ffn_{part}_exps.{end}", entry.of_experts(slice(first, None, 2)))
                for first, part in ((0, "gate"), (1, "up"))
            ]
        case "mlp.experts.down_proj":
            return [("ffn_down_exps.weight", entry)]
        case "mlp.experts.down_proj_bias":
            return [("ffn_down_exps.bias", entry)]
        case "mlp.shared_expert_gate.weight":
            return [("ffn_gate_inp_shexp.weight", Entry(entry.values[0]))]
    if shared := re.fullmatch(r"mlp\.shared_experts?\.(\w+)", module):
        return [(f"ffn_{EXPERT[shared[1]]}_shexp.{end}", entry)]
    return [(f"{MODULES[module]}.{end}", entry)]


def pairs_together(size, heads):
    """llama.cpp's ``LlamaModel.permute``: the family's row of each stored row."""
    return np.arange(size).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


def tiles(config, width):
    """The family's place of each stored place, where value heads of ``width`` places are tiled."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    return np.arange(values * width).reshape(keys, values // keys, width).swapaxes(0, 1).ravel()


def tiled(config, entry, width, reorder):
    """An entry with its value heads' rows tiled; ``width`` None: rows of keys come first."""
    if not reorder:
        return entry
    if width is not None:
        return entry.with_rows(tiles(config, width))
    keys = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    return entry.with_rows(np.concatenate([np.arange(keys), keys + tiles(config, config["linear_value_head_dim"])]))


def by_kind(config):
    """The rows of ``in_proj_qkvz`` with all queries first, then keys, values and gates."""
    heads, key = config["linear_num_key_heads"], config["linear_key_head_dim"]
    value = config["linear_num_value_heads"] // heads * config["linear_value_head_dim"]
    rows = np.arange(heads * 2 * (key + value)).reshape(heads, -1)
    return np.concatenate([part.ravel() for part in np.split(rows, [key, 2 * key, 2 * key + value], axis=1)])


def fields_of(config, arch):
    """The metadata of a configuration."""
    rope = config.get("rope_parameters") or {}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    fields = {
        "general.architecture": arch,
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config.get("intermediate_size") or 96,
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        "expert_used_count": config["num_experts_per_tok"],
        "expert_count": next(
            config[name] for name in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(name)
        ),
        "vocab_size": config["vocab_size"],
        "tokenizer.ggml.model": "none",
    }
    inner = config.get("moe_intermediate_size")
    fields["expert_feed_forward_length"] = inner or config["intermediate_size"]
    if arch == "llama":
        fields["rope.dimension_count"] = head_dim
        del fields["expert_feed_forward_length"]
    if shared := config.get("shared_expert_intermediate_size"):
        fields["expert_shared_feed_forward_length"] = shared
    if arch in ("qwen3next", "qwen35moe"):
        factor = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 0.25
        values = config["linear_num_value_heads"]
        fields |= {
            "rope.dimension_count": int(head_dim * factor),
            "ssm.conv_kernel": config["linear_conv_kernel_dim"],
            "ssm.state_size": config["linear_key_head_dim"],
            "ssm.group_count": config["linear_num_key_heads"],
            "ssm.time_step_rank": values,
            "ssm.inner_size": values * config["linear_value_head_dim"],
            "attention.recurrent_layers": [kind == "linear_attention" for kind in config["layer_types"]],
        }
    if arch in ("glm4moe", "deepseek2"):
        fields |= {
            "leading_dense_block_count": config["first_k_dense_replace"],
            "expert_shared_count": config["n_shared_experts"],
            "expert_weights_scale": float(config["routed_scaling_factor"]),
            "expert_weights_norm": bool(config.get("norm_topk_prob")),
            "expert_group_count": config["n_group"],
            "expert_group_used_count": config["topk_group"],
            "expert_gating_func": 1 if config["model_type"] == "deepseek_v2" else 2,
        }
    if arch == "glm4moe":
        factor = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 0.5
        fields["rope.dimension_count"] = int(head_dim * factor)
    if arch == "deepseek2":
        rotated, latent = config["qk_rope_head_dim"], config["kv_lora_rank"]
        fields |= {
            "attention.head_count_kv": 1,
            "rope.dimension_count": rotated,
            "attention.kv_lora_rank": latent,
            "attention.key_length": latent + rotated,
            "attention.value_length": latent,
            "attention.key_length_mla": config["qk_nope_head_dim"] + rotated,
            "attention.value_length_mla": config["v_head_dim"],
        }
        if config.get("q_lora_rank"):
            fields["attention.q_lora_rank"] = config["q_lora_rank"]
    if arch == "gpt-oss":
        fields["attention.sliding_window"] = config["sliding_window"]
    if (kind := rope.get("rope_type", "default")) != "default":
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        if kind == "yarn":
            fields["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        if "mscale_all_dim" in rope:
            fields["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    return {
        name if "." in name and name.split(".")[0] in ("general", "tokenizer") else f"{arch}.{name}": value
        for name, value in fields.items()
    }


# ---------------------------------------------------------------------------------------------
# Files


def write_gguf(path, fields, tensors, **options):
    """Write a file, or parts of it with gguf's options ``split_max_tensors`` and the like."""
    writer = gguf.GGUFWriter(path, fields["general.architecture"], use_temp_file=False, **options)
    for name, value in fields.items():
        if name != "general.architecture":
            add_field(writer, name, value)
    for name, entry in tensors.items():
        if entry.kind == "F32":
            writer.add_tensor(name, np.ascontiguousarray(entry.values, np.float32))
        else:
            writer.add_tensor(name, np.ascontiguousarray(entry.data), raw_dtype=Type[entry.kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_field(writer, name, value):
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def raw_header(fields=(), tensors=(), *, version=3, magic=b"GGUF", counts=None):
    """The bytes of a header: ``fields`` are ``(name, type, bytes)``, ``tensors`` ``(name, sizes, type, offset)``."""

    def text(value):
        data = value if isinstance(value, bytes) else value.encode()
        return struct.pack("<Q", len(data)) + data

    found = (len(tensors), len(fields)) if counts is None else counts
    data = magic + struct.pack("<IQQ", version, *found)
    for name, kind, value in fields:
        data += text(name) + struct.pack("<I", kind) + value
    for name, sizes, kind, offset in tensors:
        data += text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
    return data


# ---------------------------------------------------------------------------------------------
# Tokenizers


def tokenizer_fields(document, config, pre="default", **others):
    """The metadata of a byte-level BPE's ``tokenizer.json`` and ``tokenizer_config.json``."""
    model = document["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    kinds = [1] * len(tokens)
    for added in document["added_tokens"]:
        if added["id"] == len(tokens):
            tokens.append(added["content"])
            kinds.append(1)
        kinds[added["id"]] = 3 if added["special"] else 4
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
    }
    for name in ("bos", "eos"):
        text = config.get(f"{name}_token")
        text = text["content"] if isinstance(text, dict) else text
        if text is not None:
            fields[f"tokenizer.ggml.{name}_token_id"] = tokens.index(text)
    if isinstance(config.get("chat_template"), str):
        fields["tokenizer.chat_template"] = config["chat_template"]
    return fields | others
