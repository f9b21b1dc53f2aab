"""Tiny random language models of every family, as quantised checkpoints and as dense checkpoints of equal weights.

A model is made and saved by transformers, under the names that the family's checkpoints have. Its linear layers and
experts are then rounded to four bits: the packed numbers become the checkpoint, the rounded weights a second, dense one
that transformers loads by itself.
"""

import json
import re

import numpy as np
import torch
import transformers
from checkpoint_files import random_tensors
from safetensors.torch import load_file, save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from written_once import written_once

from marlin_cy.formats import gptq
from marlin_cy.weights.code_types import CODE_TYPES

GROUP = 32
QUANTIZATION = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": False}
VOCABULARY = 96
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
SHARED = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
DEEPSEEK = {
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
LINEAR_ATTENTION = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
CONFIGS = {
    "qwen2_moe": {"intermediate_size": 96, "norm_topk_prob": False, "mlp_only_layers": [0], **SHARED},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "intermediate_size": 96, "norm_topk_prob": True},
    "qwen3_next": {"intermediate_size": 96, **SHARED, **LINEAR_ATTENTION},
    "qwen3_5_moe_text": {**SHARED, **LINEAR_ATTENTION},
    "qwen3_5_moe": {**SHARED, **LINEAR_ATTENTION},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 96, "sliding_window": None},
    "deepseek_v2": {**DEEPSEEK, "topk_method": "group_limited_greedy", "norm_topk_prob": False},
    "deepseek_v3": {**DEEPSEEK, "norm_topk_prob": True},
    "glm4_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "norm_topk_prob": True,
        "attention_bias": True,
        "use_qk_norm": True,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "intermediate_size": 64,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
NOT_QUANTISED = re.compile(r"(lm_head|embed_tokens|norm|gate|conv1d|in_proj_(a|b|ba)|router|visual)\.weight$")
WITH_QUANTISED_HEAD = re.compile(r"embed_tokens|norm|gate\.weight")
"""What is not quantised of a model whose head is."""

transformers.utils.logging.disable_progress_bar()


def new_model(model_type, seed=0, gain=2.0, **changes):
    """A random model in float32; every parameter matters.

    ``gain`` is the ratio of the norms of a linear layer's outputs and inputs, about.
    """
    torch.manual_seed(seed)
    text_type = "qwen3_5_moe_text" if model_type == "qwen3_5_moe" else model_type
    config = transformers.AutoConfig.for_model(text_type, **{**COMMON, **CONFIGS[model_type], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        tensors = dict(model.named_parameters()) | {
            name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")
        }
        for name, tensor in tensors.items():
            if name.endswith("A_log"):
                torch.nn.init.normal_(tensor, mean=-3.0)  # a state that keeps some 0.3 to 0.99 of its values
            elif tensor.ndim == 1:
                tensor += 0.2 * torch.randn_like(tensor)
            else:
                torch.nn.init.normal_(tensor, std=0.02 if "embed" in name else gain * tensor.shape[-1] ** -0.5)
    return model


def write_large(folder, *, layers, experts):
    """A Qwen3-MoE checkpoint of ``layers * experts`` experts of 0.8 MB each, random bits; returns its size in bytes."""
    sizes = {"hidden_size": 1024, "num_attention_heads": 8, "head_dim": 128, "moe_intermediate_size": 512}
    sizes |= {"vocab_size": 8192, "num_hidden_layers": layers, "num_experts": experts, "num_experts_per_tok": 8}
    config = transformers.AutoConfig.for_model("qwen3_moe", **{**COMMON, **sizes}, intermediate_size=512)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    rng, tensors = np.random.default_rng(0), {}

    def add(name, n, k):
        parts = zip(("qweight", "scales", "qzeros"), random_tensors(rng, k, n, 128), strict=True)
        tensors.update({f"{name}.{part}": torch.from_numpy(array.copy()) for part, array in parts})

    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        if name.endswith("gate_up_proj"):
            for expert in range(experts):
                add(f"{module}.{expert}.gate_proj", 512, 1024)
                add(f"{module}.{expert}.up_proj", 512, 1024)
                add(f"{module}.{expert}.down_proj", 1024, 512)
        elif "self_attn" in name and name.endswith("proj.weight"):
            add(module, *parameter.shape)
        elif not name.endswith("experts.down_proj"):
            tensors[name] = 0.02 * torch.randn(parameter.shape, dtype=torch.bfloat16)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"quantization_config": QUANTIZATION}))
    return (folder / "model.safetensors").stat().st_size


@written_once
def write_model(
    folder,
    model_type,
    *,
    dtype=torch.float32,
    seed=0,
    gain=2.0,
    kept=(),
    not_quantised=NOT_QUANTISED,
    **changes,
):
    """Write ``folder / "quantised"`` and ``folder / "dense"``; returns both.

    Tensors whose names contain an entry of ``kept``, or a match of ``not_quantised``, are not quantised. ``seed`` and
    ``gain`` are those of :func:`new_model`.
    """
    dense, quantised = folder / "dense", folder / "quantised"
    new_model(model_type, seed, gain, **changes).to(dtype).save_pretrained(dense)
    config = json.loads((dense / "config.json").read_text())
    tensors, packed = {}, {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        if model_type == "qwen3_5_moe":
            name = re.sub(r"^model\.", "model.language_model.", name)
        if model_type == "gpt_oss" and re.search(r"experts\.\w+_proj$", name):
            codes, scales, rounded = round_to_mxfp4(tensor.float().numpy())
            packed[f"{name}_blocks"], packed[f"{name}_scales"] = torch.from_numpy(codes), torch.from_numpy(scales)
            tensor = torch.from_numpy(rounded)
        elif model_type != "gpt_oss" and is_quantised(name, tensor, kept, not_quantised):
            module = name.removesuffix(".weight")
            parts, rounded = round_to_gptq(tensor.float().numpy().T)
            packed |= {f"{module}.{part}": torch.from_numpy(array) for part, array in parts.items()}
            tensor = torch.from_numpy(np.ascontiguousarray(rounded.T))
        else:
            packed[name] = tensor
        tensors[name] = tensor
    if model_type == "qwen3_5_moe":
        # A further tensor of models of text and images, which transformers ignores.
        config = {
            "model_type": model_type,
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "text_config": config,
            "tie_word_embeddings": config["tie_word_embeddings"],
            "dtype": config["dtype"],
        }
        packed["model.visual.patch_embed.proj.weight"] = torch.ones(8, 8)
        parts, _ = round_to_gptq(np.ones((64, 32), np.float32))
        packed |= {f"mtp.fc.{part}": torch.from_numpy(array) for part, array in parts.items()}
    save_tensors(dense, tensors)
    (dense / "config.json").write_text(json.dumps(config))
    quantised.mkdir()
    save_tensors(quantised, packed)
    quantization = QUANTIZATION | {"group_size": GROUP}
    if model_type == "gpt_oss":
        quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return quantised, dense


def is_quantised(name, tensor, kept, not_quantised):
    return tensor.ndim == 2 and not not_quantised.search(name) and not any(part in name for part in kept)


def load_reference(dense, dtype=torch.float32):
    """The dense model, by transformers alone."""
    model_class = class_of(transformers.AutoConfig.from_pretrained(dense))
    return model_class.from_pretrained(dense, dtype=dtype, experts_implementation="eager").eval()


def class_of(config):
    """The class for causal language models, or for models of text and images."""
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise AssertionError(config.model_type)


def save_tensors(folder, tensors):
    """Write tensors or arrays as a folder's ``model.safetensors``."""
    found = {name: torch.from_numpy(t) if isinstance(t, np.ndarray) else t for name, t in tensors.items()}
    save_file({name: t.contiguous() for name, t in found.items()}, folder / "model.safetensors", {"format": "pt"})


def logits_in_float64(dense, tokens):
    """The dense model's logits, float64 ``[tokens, vocabulary]``, without a rounding to float32.

    Even in a float64 model, transformers normalises, rotates, routes and takes the softmax in float32. While this
    function runs, PyTorch's names for float32 are float64.
    """
    model = load_reference(dense, torch.float64)
    names = {"float32": torch.float32, "float": torch.float32}
    to_float, default = torch.Tensor.float, torch.get_default_dtype()
    try:
        for name in names:
            setattr(torch, name, torch.float64)
        torch.Tensor.float = torch.Tensor.double
        torch.set_default_dtype(torch.float64)
        for module in model.modules():
            if hasattr(module, "compute_default_rope_parameters"):
                functions = {**ROPE_INIT_FUNCTIONS, "default": module.compute_default_rope_parameters}
                module.inv_freq = functions[module.rope_type](module.config)[0]
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)[None]).logits[0]
    finally:
        for name, dtype in names.items():
            setattr(torch, name, dtype)
        torch.Tensor.float = to_float
        torch.set_default_dtype(default)
    return logits.numpy()


def round_to_gptq(weight):
    """``(tensors by name, float32 [K, N])`` of a weight ``[K, N]`` rounded to the nearest of 16 steps per group."""
    k, n = weight.shape
    groups = weight.reshape(k // GROUP, GROUP, n)
    low, high = groups.min(axis=1), groups.max(axis=1)
    scale = np.maximum((high - low) / 15, 1e-4).astype(np.float16)
    zero = np.clip(np.rint(-low / scale.astype(np.float32)), 1, 16).astype(np.int64)
    q = np.clip(np.rint(groups / scale.astype(np.float32)[:, None]) + zero[:, None], 0, 15).astype(np.int64)
    rounded = (q - zero[:, None]).astype(np.float32) * scale.astype(np.float32)[:, None]
    qweight, scales, qzeros = gptq.pack_gptq(q.reshape(k, n), scale, zero)
    g_idx = np.arange(k, dtype=np.int32) // GROUP
    parts = {"qweight": qweight, "scales": scales, "qzeros": qzeros, "g_idx": g_idx}
    return parts, rounded.reshape(k, n)


def round_to_mxfp4(weight):
    """``(blocks, scales, float32 weight)`` of experts' weights ``[E, K, N]``, as gpt-oss stores them.

    ``blocks`` are uint8 ``[E, N, K / 32, 16]``, the first of two values in the low nibble; ``scales`` are uint8
    ``[E, N, K / 32]``, powers of two less 127. Source: transformers, ``integrations/mxfp4.py``.
    """
    experts, k, n = weight.shape
    groups = np.swapaxes(weight, 1, 2).reshape(experts, n, k // 32, 32)
    exponent = np.ceil(np.log2(np.abs(groups).max(axis=-1, keepdims=True) / 6))
    scaled = groups / 2.0**exponent
    values = CODE_TYPES["e2m1"].decode_table
    codes = np.abs(scaled[..., None] - values).argmin(axis=-1).astype(np.uint8)
    rounded = (values[codes] * 2.0**exponent).astype(np.float32)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    scales = (exponent[..., 0] + 127).astype(np.uint8)
    return blocks, scales, np.ascontiguousarray(np.swapaxes(rounded.reshape(experts, n, k), 1, 2))
