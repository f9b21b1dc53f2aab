"""Small synthetic GPTQ checkpoints, and ways to damage them."""

import json
import re
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from marlin_cy.checkpoints.families import FAMILIES
from marlin_cy.formats import gptq
from marlin_cy.formats.awq import pack_awq
from marlin_cy.formats.compressed_tensors import pack_compressed
from marlin_cy.formats.json_fields import read_json
from marlin_cy.weights.code_types import CODE_TYPES

# The differences between the configurations of families; all other settings are equal.
CONFIGS = {
    "qwen2_moe": {"norm_topk_prob": True},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_next": {"norm_topk_prob": True},
    "qwen3_5_moe_text": {},
    "mixtral": {},
    "deepseek_v2": {
        "topk_method": "group_limited_greedy",
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 16.0,
    },
    "deepseek_v3": {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
    },
    "glm4_moe": {"norm_topk_prob": True, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
}


def random_weight(rng, k, n, group_size, *, checkpoint_format="gptq", sym=False):
    """``(q, scale, zero)`` of a ``[k, n]`` weight, over all that the format can hold."""
    groups = -(-k // group_size)
    low = gptq.ZERO_OFFSETS[checkpoint_format]
    zero = np.full((groups, n), 8) if sym else rng.integers(low, low + 16, (groups, n))
    return rng.integers(0, 16, (k, n)), (rng.uniform(0.5, 2, (groups, n)) / 64).astype(np.float16), zero


def random_tensors(rng, k, n, group_size):
    """``(qweight, scales, qzeros)`` of a ``[k, n]`` weight, any bits."""
    shapes = gptq.tensor_shapes(k, n, group_size)
    qweight, qzeros = (
        np.frombuffer(rng.bytes(4 * np.prod(shapes[name])), np.int32).reshape(shapes[name])
        for name in ("qweight", "qzeros")
    )
    return qweight, np.full(shapes["scales"], 0.01, np.float16), qzeros


def dequantised(q, scale, zero, g_idx):
    """float64 ``[K, N]``."""
    return scale.astype(np.float64)[g_idx] * (q - zero[g_idx])


def gptq_parts(q, scale, zero, g_idx, checkpoint_format):
    parts = gptq.pack_gptq(q, scale, zero, checkpoint_format=checkpoint_format)
    return dict(zip(("qweight", "scales", "qzeros", "g_idx"), (*parts, g_idx), strict=True))


def gptq_quantization(group_size, desc_act, sym, checkpoint_format):
    return {
        "bits": 4,
        "group_size": group_size,
        "desc_act": desc_act,
        "sym": sym,
        "quant_method": "gptq",
        "checkpoint_format": checkpoint_format,
    }


def awq_parts(q, scale, zero, g_idx, checkpoint_format):
    return dict(zip(("qweight", "scales", "qzeros"), pack_awq(q, scale, zero), strict=True))


def awq_quantization(group_size, **_):
    return {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}


def compressed_parts(q, scale, zero, g_idx, checkpoint_format):
    packed, scales, zeros = pack_compressed(q, scale.astype(ml_dtypes.bfloat16), zero)
    shape = np.array(q.shape[::-1], np.int64)
    return {"weight_packed": packed, "weight_scale": scales, "weight_zero_point": zeros, "weight_shape": shape}


def compressed_quantization(group_size, **_):
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group_size, "symmetric": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


METHODS = {
    "gptq": (gptq_parts, gptq_quantization),
    "awq": (awq_parts, awq_quantization),
    "compressed-tensors": (compressed_parts, compressed_quantization),
}
"""For each: a layer's tensors from its codes, and the quantisation config."""


def write_checkpoint(
    folder,
    *,
    model_type="qwen3_moe",
    layers=2,
    num_experts=3,
    hidden=64,
    inter=96,
    group_size=64,
    checkpoint_format="gptq",
    method="gptq",
    sym=False,
    desc_act=False,
    shards=1,
    seed=0,
    with_weights=True,
    shared=None,
    expert_bias=False,
    dense_layers=(),
    prefix="model.layers",
):
    """Write a checkpoint folder; returns the float64 weight of every quantised linear layer, by name.

    ``with_weights=False`` returns none and is fast: for large ones. ``shared`` is the width of a shared expert,
    ``expert_bias`` gives experts biases, ``dense_layers`` have experts that are not quantised, ``method`` is one of
    METHODS.
    """
    pack, quantization = METHODS[method]
    family = FAMILIES[model_type]
    rng = np.random.default_rng(seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, weights = {}, {}

    def add(name, k, n, g_idx):
        size = k if group_size == -1 else group_size
        if with_weights:
            q, scale, zero = random_weight(rng, k, n, size, checkpoint_format=checkpoint_format, sym=sym)
            weights[name] = dequantised(q, scale, zero, g_idx)
            parts = pack(q, scale, zero, g_idx, checkpoint_format)
        else:
            parts = dict(zip(("qweight", "scales", "qzeros"), random_tensors(rng, k, n, size), strict=True))
        for part, array in parts.items():
            tensors[f"{name}.{part}"] = array

    def new_g_idx(k):
        g_idx = np.arange(k, dtype=np.int32) // (k if group_size == -1 else group_size)
        return rng.permutation(g_idx) if desc_act else g_idx

    for layer in range(layers):
        add(f"{prefix}.{layer}.self_attn.q_proj", hidden, 32, new_g_idx(hidden))
        tensors[f"{prefix}.{layer}.self_attn.q_proj.bias"] = rng.standard_normal(32).astype(np.float16)
        block = f"{prefix}.{layer}.{family.block}"
        tensors[f"{block}.gate.weight"] = rng.standard_normal((num_experts, hidden)).astype(np.float32)
        if family.correction is not None:
            tensors[f"{block}.{family.correction}"] = rng.standard_normal(num_experts).astype(np.float32)
        for expert in range(num_experts):
            gate, up, down = (f"{block}.experts.{expert}.{name}" for name in (family.gate, family.up, family.down))
            if layer in dense_layers:
                for name, shape in ((gate, (inter, hidden)), (up, (inter, hidden)), (down, (hidden, inter))):
                    tensors[f"{name}.weight"] = rng.standard_normal(shape).astype(np.float16)
                continue
            common = new_g_idx(hidden)
            add(gate, hidden, inter, common)
            add(up, hidden, inter, common)
            add(down, inter, hidden, new_g_idx(inter))
            if expert_bias:
                for name, n in ((gate, inter), (up, inter), (down, hidden)):
                    tensors[f"{name}.bias"] = rng.standard_normal(n).astype(np.float16)
        if shared:
            common = new_g_idx(hidden)
            expert = f"{block}.{family.shared_expert}"
            add(f"{expert}.{family.gate}", hidden, shared, common)
            add(f"{expert}.{family.up}", hidden, shared, common)
            add(f"{expert}.{family.down}", shared, hidden, new_g_idx(shared))
            if family.shared_gate:
                tensors[f"{block}.{family.shared_gate}.weight"] = rng.standard_normal((1, hidden)).astype(np.float16)

    config = {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "num_local_experts": num_experts,
        "num_experts_per_tok": 2,
        "hidden_size": hidden,
        family.intermediate_size: inter,
        "hidden_act": "silu",
        **CONFIGS[model_type],
    }
    if shared:
        config |= (
            {"shared_expert_intermediate_size": shared} if family.shared_gate else {"n_shared_experts": shared // inter}
        )
    settings = quantization(group_size=group_size, desc_act=desc_act, sym=sym, checkpoint_format=checkpoint_format)
    write_json(folder, "config.json", {**config, "quantization_config": settings})
    if method == "gptq":
        write_json(folder, "quantize_config.json", settings)
    write_tensors(folder, tensors, shards)
    return weights


def write_gpt_oss(folder, *, layers=1, num_experts=4, hidden=64, inter=96, seed=0):
    """Write a checkpoint of gpt-oss's form; returns the experts' weights and biases by name, float64.

    Gate and up columns lie in turn, as the format has them.
    """
    rng = np.random.default_rng(seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, expected = {}, {}
    for layer in range(layers):
        block = f"model.layers.{layer}.mlp"
        for part, shape in (("weight", (num_experts, hidden)), ("bias", (num_experts,))):
            tensors[f"{block}.router.{part}"] = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
        for name, k, n in (("gate_up_proj", hidden, 2 * inter), ("down_proj", inter, hidden)):
            codes = rng.integers(0, 16, (num_experts, n, k))
            exponents = rng.integers(117, 125, (num_experts, n, k // 32))
            pairs = codes[..., 0::2] | codes[..., 1::2] << 4
            tensors[f"{block}.experts.{name}_blocks"] = pairs.astype(np.uint8).reshape(num_experts, n, k // 32, 16)
            tensors[f"{block}.experts.{name}_scales"] = exponents.astype(np.uint8)
            bias = rng.standard_normal((num_experts, n)).astype(ml_dtypes.bfloat16)
            tensors[f"{block}.experts.{name}_bias"] = bias
            scales = np.repeat(2.0 ** (exponents - 127.0), 32, axis=2)
            expected[f"{block}.experts.{name}"] = (CODE_TYPES["e2m1"].decode_table[codes] * scales).transpose(0, 2, 1)
            expected[f"{block}.experts.{name}_bias"] = bias.astype(np.float64)
    config = {
        "model_type": "gpt_oss",
        "num_hidden_layers": layers,
        "num_local_experts": num_experts,
        "num_experts_per_tok": 2,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "hidden_act": "silu",
        "swiglu_limit": 7.0,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    }
    write_json(folder, "config.json", config)
    write_tensors(folder, tensors)
    return expected


def write_float8(folder, **sizes):
    """Write a GPTQ checkpoint with FP8 layers of each kind of scale, one in int8, and a few experts that are float."""
    write_checkpoint(folder, **sizes)
    rng, tensors = np.random.default_rng(1), load_file(folder / "model.safetensors")
    scales = {"weight_scale": (1,), "weight_scale_inv": (1, 1), "scale": (64, 1)}
    for number, (suffix, shape) in enumerate(scales.items()):
        module = f"model.layers.0.self_attn.other_{number}"
        weight = rng.standard_normal((64, 64)).astype(np.float32)
        tensors[f"{module}.weight"] = weight.astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{module}.{suffix}"] = rng.uniform(0.001, 0.01, shape).astype(np.float32)
        tensors[f"{module}.input_scale"] = np.ones(1, np.float32)
    tensors["model.layers.0.self_attn.int8.weight"] = rng.integers(-128, 128, (64, 64)).astype(np.int8)
    tensors["model.layers.0.self_attn.int8.weight_scale"] = rng.uniform(0.001, 0.01, (64, 1)).astype(np.float32)
    for name in ("experts.0.down_proj", "experts.1.up_proj"):
        module = f"model.layers.0.mlp.{name}"
        _, scale, _, g_idx = (tensors.pop(f"{module}.{part}") for part in ("qweight", "scales", "qzeros", "g_idx"))
        tensors[f"{module}.weight"] = rng.standard_normal((scale.shape[1], len(g_idx))).astype(np.float16)
    save_file(tensors, folder / "model.safetensors")


def write_widths(folder, method, **sizes):
    """Write a checkpoint whose down projections and attention have 8 bits, by rules of the configuration."""
    write_checkpoint(folder, method=method, **sizes)
    tensors, eight = load_file(folder / "model.safetensors"), re.compile(r"self_attn|\.down_proj")
    for name in [name for name in tensors if eight.search(name)]:
        if name.endswith((".qweight", ".qzeros", ".weight_packed", ".weight_zero_point")):
            tensors[name] = np.concatenate([tensors[name]] * 2, axis=WORDS_AXIS[name.rpartition(".")[2]])
    save_file(tensors, folder / "model.safetensors")
    config = read_json(folder / "config.json")
    quantization = config["quantization_config"]
    if method == "gptq":
        quantization["dynamic"] = {r".*(self_attn|\.down_proj).*": {"bits": 8}}
        write_json(folder, "quantize_config.json", quantization)
    else:
        (group,) = quantization["config_groups"].values()
        weights = {**group["weights"], "num_bits": 8}
        quantization["config_groups"]["group_1"] = {"targets": ["re:.*(self_attn|\\.down_proj).*"], "weights": weights}
    write_json(folder, "config.json", config)


WORDS_AXIS = {"qweight": 0, "qzeros": 1, "weight_packed": 1, "weight_zero_point": 0}
"""The axis along which words hold several codes."""


def write_deepseek_fp4(folder, *, num_experts=2, hidden=64, inter=32):
    """Write a checkpoint of DeepSeek-V4's form with one layer."""
    rng, tensors = np.random.default_rng(1), {}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    block = "layers.0.ffn"
    tensors[f"{block}.gate.weight"] = rng.standard_normal((num_experts, hidden)).astype(np.float32)
    tensors[f"{block}.gate.bias"] = rng.standard_normal(num_experts).astype(np.float32)
    for expert in range(num_experts):
        for name, k, n in (("w1", hidden, inter), ("w3", hidden, inter), ("w2", inter, hidden)):
            module = f"{block}.experts.{expert}.{name}"
            tensors[f"{module}.weight"] = rng.integers(-128, 128, (n, k // 2)).astype(np.int8)
            exponents = rng.integers(117, 125, (n, k // 32)).astype(np.uint8)
            tensors[f"{module}.scale"] = exponents.view(ml_dtypes.float8_e8m0fnu)
    config = {
        "model_type": "deepseek_v4",
        "num_hidden_layers": 1,
        "n_routed_experts": num_experts,
        "num_experts_per_tok": 2,
        "hidden_size": hidden,
        "moe_intermediate_size": inter,
        "scoring_func": "sqrtsoftplus",
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }
    write_json(folder, "config.json", config)
    write_tensors(folder, tensors)


def write_json(folder, name, value):
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def write_tensors(folder, tensors, shards=1):
    """As one file, or as shards with an index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        names = list(tensors)[shard::shards]
        save_file({tensor: tensors[tensor] for tensor in names}, folder / name)
        weight_map |= dict.fromkeys(names, name)
    write_json(folder, "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def edit_json(folder, name, **changes):
    """Change keys of a JSON object; None takes a key out, ``outer__inner`` reaches one level down."""
    config = json.loads((folder / name).read_text(encoding="utf-8"))
    for key, value in changes.items():
        *outer, key = key.split("__")
        target = config[outer[0]] if outer else config
        if value is None:
            target.pop(key)
        else:
            target[key] = value
    write_json(folder, name, config)


def edit_tensor(folder, name, change, file="model.safetensors"):
    """Replace a tensor by ``change(copy of it)``; None takes it out."""
    tensors = load_file(folder / file)
    array = change(tensors.pop(name, np.empty(0)).copy())
    if array is not None:
        tensors[name] = array
    save_file(tensors, folder / file)


def edit_header(path, change):
    """Replace a safetensors file's header by ``change(header)``, keeping all other bytes."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
    header += b" " * (-(8 + len(header)) % 64)  # tensors stay where kernels want them
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def truncate(path, size):
    """Cut a file to ``size`` bytes; a negative size counts from its end."""
    content = path.read_bytes()
    path.write_bytes(content[:size])


def header_bytes(text, data=b""):
    """A function that writes a folder's model.safetensors from a header's text and the bytes after it."""
    return lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
