"""Tiny random models of the families that transformers runs, as checkpoints of either set of names.

As :mod:`language_models`, for all other families: a model is made and saved by transformers, and rounded to four bits.
Experts in one tensor are stored one by one, as quantisers store them.
"""

import json
import re

import numpy as np
import torch
import transformers
from language_models import (
    COMMON,
    DEEPSEEK,
    LINEAR_ATTENTION,
    QUANTIZATION,
    SHARED,
    class_of,
    round_to_gptq,
    save_tensors,
)
from safetensors.torch import load_file
from written_once import written_once

from marlin_cy.formats.compressed_tensors import pack_compressed
from marlin_cy.weights.canonical import unpack_words

GROUPED = {key: value for key, value in DEEPSEEK.items() if not re.search("lora|head_dim|qk_", key)}
SPARSE = {"num_experts": 8, "moe_intermediate_size": 32, "intermediate_size": 96}
DENSE_FIRST = SPARSE | {"first_k_dense_replace": 1, "num_shared_experts": 2, "routed_scaling_factor": 1.5}
TWO_GROUPS = {"n_group": 2, "topk_group": 1}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
INDEXER = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 64}
TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}

CONFIGS = {
    "gemma4_text": SPARSE
    | {
        "top_k_experts": 2,
        "enable_moe_block": True,
        "global_head_dim": 32,
        "num_global_key_value_heads": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    },
    "glm4_moe_lite": {**DEEPSEEK, "norm_topk_prob": True, "mlp_layer_types": ["dense", "sparse"]},
    "minimax_m2": {"num_local_experts": 8, "intermediate_size": 32, "rotary_dim": 16},
    "qwen3_vl_moe": {
        "text_config": SPARSE | {"model_type": "qwen3_vl_moe_text", "rope_parameters": MROPE},
        "vision_config": TOWER | {"deepstack_visual_indexes": [0]},
    },
    "glm4v_moe": {
        "text_config": GROUPED
        | {
            "model_type": "glm4v_moe_text",
            "rope_parameters": MROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
        },
        "vision_config": TOWER,
    },
    "laguna": SPARSE
    | {
        "shared_expert_intermediate_size": 64,
        "mlp_layer_types": ["dense", "sparse"],
        "moe_routed_scaling_factor": 1.5,
    },
    "kimi_k2": {**DEEPSEEK, "norm_topk_prob": True},
    "kimi_k25": {
        "text_config": DEEPSEEK | {"model_type": "deepseek_v3", "norm_topk_prob": True},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    },
    "deepseek_v32": DEEPSEEK | INDEXER,
    "glm_moe_dsa": DEEPSEEK | INDEXER,
    "mistral3": {
        "text_config": DEEPSEEK | {"model_type": "mistral4", "head_dim": 32},
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    },
    "qwen4_exp_text": {
        **SHARED,
        **LINEAR_ATTENTION,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 16,
    },
    "olmoe": {"num_experts": 8, "intermediate_size": 32},
    "dots1": GROUPED,
    "solar_open": GROUPED | {"first_k_dense_replace": 0},
    "cohere2_moe": {"num_experts": 8, "intermediate_size": 32, "num_shared_experts": 1},
    "exaone_moe": DENSE_FIRST | TWO_GROUPS,
    "hy_v3": {**DENSE_FIRST, "router_scaling_factor": 1.5},
    "mimo_v2_flash": SPARSE | TWO_GROUPS | {"n_routed_experts": 8, "v_head_dim": 16},
    "afmoe": SPARSE | {"num_shared_experts": 1, "num_dense_layers": 1, "route_scale": 1.5},
    "lfm2_moe": SPARSE | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "intermediate_size": 32},
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "intermediate_size": 96,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
    },
    "kimi_linear": DENSE_FIRST | LATENT | {"q_lora_rank": None, "layer_types": ["linear_attention", "full_attention"]},
    "bailing_hybrid": DENSE_FIRST | LATENT | TWO_GROUPS | {"num_hidden_layers": 6},
    "jamba": {
        "num_experts": 4,
        "intermediate_size": 32,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "phimoe": {"num_local_experts": 8, "intermediate_size": 32},
    "deepseek_v4": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 32,
        "mlp_layer_types": ["hash_moe", "moe"],
    },
    "minimax_m3_vl_text": {
        "num_local_experts": 8,
        "intermediate_size": 32,
        "dense_intermediate_size": 96,
        "shared_intermediate_size": 32,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "nemotron_h": SPARSE | TWO_GROUPS | {"n_routed_experts": 8, "moe_shared_expert_intermediate_size": 32},
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size": 32,
        "intermediate_size_mlp": 96,
    },
}
"""The keys of ``config.json`` in which a family's tiny model differs from :data:`language_models.COMMON`."""

OTHERS = {
    "qwen3_moe": SPARSE | {"norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 96, "sliding_window": None},
    "qwen3_5_moe_text": {**SHARED, **LINEAR_ATTENTION},
    "glm4_moe": {**GROUPED, "attention_bias": True, "use_qk_norm": True},
}
"""Families that tests of other things use. Those in :data:`language_models.CONFIGS` are compared there."""

WITHOUT_A_ROW = {
    "flex_olmo": {"num_experts": 8, "intermediate_size": 32},
    "minimax": {
        "num_local_experts": 8,
        "intermediate_size": 32,
        "layer_types": ["full_attention", "full_attention"],
    },
    "mellum": SPARSE | {"norm_topk_prob": True},
}
"""Families that no row describes; transformers' class and its conversion table do."""


MAKERS_TYPES = {"kimi_k2": "deepseek_v3"}
"""The class of transformers for a ``model_type`` that only the model's makers know."""

KEPT = re.compile(
    r"(lm_head|embed\w*|norm|conv\w*|in_proj_\w+|router\S*|visual\S*|vision\S*|multi_modal\S*|mm_projector\S*|"
    r"gate(\.wg)?|[fgb]_(a_|b_)?proj|\w*_hc\S*|hc_\S*|indexer\S*|ple\S*|compressor\S*|mixer\.(in|out)_proj|mamba\S*|"
    r"bc_norm\S*|dt_proj|x_proj|wo_[ab]|o_[ab]_proj)\.weight$|\.(visual|vision_tower|indexer|compressor|mamba|conv)\."
)
"""Matrices that are not quantised, as tools leave them, and those of parts that this library does not run."""

transformers.utils.logging.disable_progress_bar()


def new_config(model_type, **changes):
    own = (CONFIGS | OTHERS | WITHOUT_A_ROW)[model_type] | changes
    if "text_config" in own:
        sizes = {"image_token_id": 90, "image_token_index": 90, "video_token_id": 91, "tie_word_embeddings": False}
        sizes |= {"vision_start_token_id": 92, "vision_end_token_id": 93}
        return transformers.AutoConfig.for_model(
            model_type, **sizes, **own | {"text_config": COMMON | own["text_config"]}
        )
    return transformers.AutoConfig.for_model(MAKERS_TYPES.get(model_type, model_type), **COMMON | own)


def new_model(model_type, seed=0, **changes):
    """A random model in float32; every parameter matters, and so do all biases that select experts."""
    torch.manual_seed(seed)
    config = new_config(model_type, **changes)
    config._experts_implementation = "eager"
    model = class_of(config)(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):
                picks = torch.rand(len(tensor), model.config.num_local_experts).argsort(dim=1)
                tensor.copy_(picks[:, : tensor.shape[1]])
            elif re.search(r"(correction_bias|expert_bias)$", name):
                tensor += 0.2 * torch.randn_like(tensor)
            elif name.endswith(("A_log", "dt_bias", "inv_freq")) or "visual" in name or "vision" in name:
                continue
            elif re.search(r"norm\S*\.weight$|layer_scalar|per_expert_scale|router\.scale", name) and tensor.ndim == 1:
                tensor *= 1 + 0.2 * torch.randn_like(tensor)
            elif tensor.ndim > 1 and tensor.is_floating_point():
                torch.nn.init.normal_(tensor, std=0.05 if "embed" in name else 1.5 * tensor.shape[-1] ** -0.5)
    return model


@written_once
def write_family(folder, model_type, *, method="gptq", module_names=False, kept=(), also=(), rename=None, **changes):
    """Write ``folder / "quantised"`` and ``folder / "dense"``; returns both.

    Parameters
    ----------
    method : {"gptq", "compressed-tensors"}
    module_names : bool
        Use the names of transformers' modules instead of those in which transformers saves.
    kept, also : sequence of str
        Expressions found in the names of matrices that are not quantised, or that are quantised too.
    rename : callable, optional
        Gives the names of the quantised checkpoint.
    """
    dense, quantised = folder / "dense", folder / "quantised"
    model = new_model(model_type, **changes)
    model.save_pretrained(dense)
    config = json.loads((dense / "config.json").read_text())
    saved, packed = load_file(dense / "model.safetensors"), {}
    if module_names:
        saved = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def add(module, weight):
        parts, rounded = rounded_parts(weight.float().numpy(), method)
        packed.update({f"{module}.{part}": torch.from_numpy(array) for part, array in parts.items()})
        return torch.from_numpy(rounded)

    def is_chosen(name, tensor):
        if (
            tensor.ndim != 2
            or tensor.shape[0] % 8
            or tensor.shape[1] % 32
            or not name.endswith(".weight")
            or any(re.search(part, name) for part in kept)
        ):
            return False
        return not KEPT.search(name) or any(re.search(part, name) for part in also)

    rounded = {}
    for name, tensor in saved.items():
        # transformers 5.24 saves Kimi-K2.5's language model under names of its image encoder.
        name = name.replace("language_model.model.blocks.", "language_model.model.layers.")
        if fused := re.search(r"experts\.(gate_up_proj|up_proj|down_proj)$", name):
            rounded[name] = torch.stack(list(map_experts(name, fused[1], tensor, add, model_type)))
        elif is_chosen(name, tensor):
            rounded[name] = add(name.removesuffix(".weight"), tensor)
        else:
            packed[name] = rounded[name] = tensor
    if module_names:
        model.load_state_dict(rounded)
        model.save_pretrained(dense)
    else:
        save_tensors(dense, rounded)
    quantised.mkdir()
    save_tensors(quantised, {(rename or str)(name): tensor for name, tensor in packed.items()})
    if model_type in MAKERS_TYPES:
        config["model_type"] = model_type
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATIONS[method]}))
    return quantised, dense


QUANTIZATIONS = {
    "gptq": QUANTIZATION | {"group_size": 32},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
            }
        },
        "ignore": ["lm_head"],
    },
}


def map_experts(name, part, tensor, add, model_type):
    """Quantise the experts of one tensor, each layer under its own name; yields the rounded tensor of each expert."""
    base, names = name.removesuffix(f".{part}"), part.split("_")[:-1]
    for expert, weight in enumerate(tensor):
        rows = weight.T if model_type == "llama4_text" else weight
        done = [
            add(f"{base}.{expert}.{one}_proj", piece) for one, piece in zip(names, rows.chunk(len(names)), strict=True)
        ]
        result = torch.cat(done)
        yield result.T if model_type == "llama4_text" else result


def rounded_parts(weight, method):
    """``(tensors by suffix, float32 [N, K])`` of a weight ``[N, K]``."""
    parts, rounded = round_to_gptq(np.ascontiguousarray(weight.T))
    if method == "compressed-tensors":
        codes = unpack_words(parts["qweight"].view(np.uint32))
        scale = parts["scales"]
        groups = rounded.reshape(len(scale), -1, rounded.shape[1])
        zero = np.rint(codes.reshape(groups.shape)[:, 0] - groups[:, 0] / scale.astype(np.float32)).astype(int)
        zero = np.minimum(zero, 15)
        packed, scales, zeros = pack_compressed(codes, scale, zero)
        rounded = ((codes.reshape(groups.shape) - zero[:, None]) * scale.astype(np.float32)[:, None]).reshape(
            rounded.shape
        )
        parts = {"weight_packed": packed, "weight_scale": scales, "weight_zero_point": zeros}
        parts["weight_shape"] = np.array(weight.shape, np.int64)
    return parts, np.ascontiguousarray(rounded.T.astype(np.float32))
