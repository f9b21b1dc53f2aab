"""Tiny checkpoints for vLLM in every format, and what a model says about a prompt in vLLM and by this library."""

import json
from contextlib import contextmanager

import numpy as np
import torch
from checkpoint_files import METHODS, edit_json, edit_tensor
from language_models import GROUP, write_model
from safetensors.numpy import load_file, save_file

from marlin_cy.formats.gptq import to_canonical
from marlin_cy.weights.canonical import unpack_words

PROMPT = [7, 3, 40, 11, 95, 2, 61, 61, 18, 33, 5, 80, 24, 1, 9, 55]
NEW_TOKENS = 4
SIZES = {"hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 64}
"""vLLM's attention on CPUs has heads of 32 and more columns; half of 64 is a group."""


def write_format(folder, form, model_type="qwen3_moe", **changes):
    """Write a checkpoint in a format; returns its folder."""
    quantised, _ = write_model(folder, model_type, **{**SIZES, **changes})
    if form in ("awq", "compressed-tensors"):
        convert(quantised, form)
    elif form == "auto-round":
        edit_json(
            quantised,
            "config.json",
            quantization_config={
                "quant_method": "auto-round",
                "bits": 4,
                "group_size": GROUP,
                "sym": False,
                "packing_format": "auto_round:auto_gptq",
            },
        )
    elif form == "gptq, desc_act":
        permute(quantised)
    else:
        assert form in ("gptq", "mxfp4"), form
    return quantised


def convert(folder, method):
    """Rewrite a checkpoint of GPTQ's tensors in another format. Zero points of 16 become 15."""
    parts_of, quantization = METHODS[method]
    found = load_file(folder / "model.safetensors")
    tensors = {name: array for name, array in found.items() if not name.endswith(GPTQ_PARTS)}
    for name in found:
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            qweight, scales, qzeros = (found[f"{module}.{part}"] for part in ("qweight", "scales", "qzeros"))
            k, n = 8 * qweight.shape[0], qweight.shape[1]
            weight = to_canonical(qweight, scales, qzeros, bits=4, group_size=GROUP, k=k, n=n)
            zero = np.minimum(weight.zero, 15)
            parts = parts_of(unpack_words(weight.words), weight.scale, zero, None, None)
            tensors |= {f"{module}.{part}": np.ascontiguousarray(array) for part, array in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder, "config.json", quantization_config=quantization(group_size=GROUP))


GPTQ_PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")


def permute(folder):
    """Put rows of K into other groups, as ``desc_act`` does: gate and up of an expert alike."""
    rng = np.random.default_rng(0)
    orders = {}
    for name in load_file(folder / "model.safetensors"):
        if name.endswith(".g_idx"):
            key = name.replace("up_proj", "gate_proj")

            def new(g_idx, key=key):
                return orders.setdefault(key, rng.permutation(g_idx))

            edit_tensor(folder, name, new)
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder, "config.json", quantization_config={**quantization, "desc_act": True})


@contextmanager
def engine(folder, **options):
    """vLLM's engine on a folder, in float32 unless ``options`` say otherwise."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 8, "seed": 0}
    settings |= {"kv_cache_memory_bytes": 2**26, "enable_prefix_caching": False, "max_num_batched_tokens": 64}
    settings |= {"skip_tokenizer_init": True, "disable_log_stats": True}
    llm = LLM(str(folder), **settings | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def said_by_vllm(llm, prompt=PROMPT):
    """``(tokens, log-probabilities)``: the tokens that follow the prompt; of the prompt's tokens but the first."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, prompt_logprobs=0, ignore_eos=True, detokenize=False)
    (found,) = llm.generate([{"prompt_token_ids": prompt}], wanted, use_tqdm=False)
    logprobs = [entry[token].logprob for entry, token in zip(found.prompt_logprobs[1:], prompt[1:], strict=True)]
    return list(found.outputs[0].token_ids), np.array(logprobs)


def said_by_load(folder, prompt=PROMPT, dtype="float32"):
    """As :func:`said_by_vllm`, by ``marlin_cy.integrations.transformers.load``."""
    from marlin_cy.integrations.transformers import load

    model = load(folder, dtype=dtype)
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            logits = model(tokens).logits.float()
            tokens = torch.cat([tokens, logits[:, -1:].argmax(dim=-1)], dim=1)
    logprobs = logits.log_softmax(dim=-1)[0, torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
    return tokens[0, len(prompt) :].tolist(), logprobs.numpy()
