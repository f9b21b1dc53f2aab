"""Damaged GGUF files: a CheckpointError, an UnsupportedError, or a model that loads; nothing else.

``MARLIN_CY_FUZZ_EXAMPLES=10000 python -m pytest -m "sweep or not sweep" tests/test_gguf_fuzz.py`` tries as many files.
"""

import itertools
import os
import struct

import numpy as np
import pytest

pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from gguf_files import Entry, random_blocks, values_of, write_gguf  # noqa: E402

from marlin_cy import open_checkpoint  # noqa: E402
from marlin_cy.decoder.build import build_plan  # noqa: E402
from marlin_cy.decoder.sampling import read_sampling  # noqa: E402
from marlin_cy.decoder.text import Tokenizer  # noqa: E402
from marlin_cy.errors import CheckpointError, UnsupportedError  # noqa: E402

TOKENS = ["a", "b", "ab", "Ġ", "<|im_end|>", "[PAD5]", "c", "d"]
COMMON = {
    "block_count": 2,
    "context_length": 32,
    "embedding_length": 32,
    "feed_forward_length": 32,
    "attention.head_count": 2,
    "attention.head_count_kv": 2,
    "attention.key_length": 16,
    "attention.value_length": 16,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 1e4,
    "expert_count": 2,
    "expert_used_count": 1,
    "expert_feed_forward_length": 32,
}
EXPERTS = {
    "ffn_gate_inp.weight": (2, 32),
    "ffn_gate_exps.weight": (2, 32, 32),
    "ffn_up_exps.weight": (2, 32, 32),
    "ffn_down_exps.weight": (2, 32, 32),
}
SHARED = {f"ffn_{part}_shexp.weight": (32, 32) for part in ("gate", "up", "down")}
NORMS = {"attn_norm.weight": (32,), "post_attention_norm.weight": (32,)}
ATTENTION = {f"attn_{part}.weight": (32, 32) for part in ("q", "k", "v", "output")}
HEAD_NORMS = {"attn_q_norm.weight": (16,), "attn_k_norm.weight": (16,)}
MODELS = {
    "qwen3moe": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 16},
        [{**ATTENTION, **HEAD_NORMS, "attn_norm.weight": (32,), "ffn_norm.weight": (32,), **EXPERTS}] * 2,
    ),
    "deepseek2": (
        {
            "rope.dimension_count": 16,
            "attention.key_length_mla": 32,
            "attention.value_length_mla": 16,
            "attention.kv_lora_rank": 32,
            "attention.q_lora_rank": 32,
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "expert_weights_scale": 1.5,
            "expert_weights_norm": True,
            "expert_gating_func": 2,
        },
        [
            {
                "attn_norm.weight": (32,),
                "ffn_norm.weight": (32,),
                "attn_q_a.weight": (32, 32),
                "attn_q_a_norm.weight": (32,),
                "attn_q_b.weight": (64, 32),
                "attn_kv_a_mqa.weight": (48, 32),
                "attn_kv_a_norm.weight": (32,),
                "attn_k_b.weight": (2, 32, 16),
                "attn_v_b.weight": (2, 16, 32),
                "attn_output.weight": (32, 32),
                **ffn,
            }
            for ffn in (
                {f"ffn_{part}.weight": (32, 32) for part in ("gate", "up", "down")},
                {**EXPERTS, **SHARED, "exp_probs_b.bias": (2,)},
            )
        ],
    ),
    "qwen35moe": (
        {
            "rope.dimension_count": 8,
            "expert_shared_feed_forward_length": 32,
            "ssm.conv_kernel": 4,
            "ssm.state_size": 32,
            "ssm.group_count": 1,
            "ssm.time_step_rank": 2,
            "ssm.inner_size": 64,
            "full_attention_interval": 2,
        },
        [
            {**mixer, **NORMS, **EXPERTS, **SHARED, "ffn_gate_inp_shexp.weight": (32,)}
            for mixer in (
                {
                    "attn_qkv.weight": (128, 32),
                    "attn_gate.weight": (64, 32),
                    "ssm_beta.weight": (2, 32),
                    "ssm_alpha.weight": (2, 32),
                    "ssm_conv1d.weight": (128, 4),
                    "ssm_dt.bias": (2,),
                    "ssm_a": (2,),
                    "ssm_norm.weight": (32,),
                    "ssm_out.weight": (32, 64),
                },
                {**ATTENTION, **HEAD_NORMS, "attn_q.weight": (64, 32)},
            )
        ],
    ),
}
KINDS = ("Q4_0", "Q8_0", "Q5_1", "IQ4_NL", "F16")
EXAMPLES, PART = int(os.environ.get("MARLIN_CY_FUZZ_EXAMPLES", "1200")), 240


def model(arch):
    """``(fields, tensors)`` of a small model."""
    rng, kinds = np.random.default_rng(0), itertools.cycle(KINDS)
    settings, layers = MODELS[arch]
    fields = {"general.architecture": arch, "general.sampling.temp": 0.5}
    fields |= {f"{arch}.{name}": value for name, value in (COMMON | settings).items()}
    fields |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [1, 1, 1, 1, 3, 5, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 4,
        "tokenizer.chat_template": "{{ messages }}",
    }
    shapes = {"token_embd.weight": (8, 32), "output.weight": (8, 32), "output_norm.weight": (32,)}
    shapes |= {f"blk.{number}.{name}": shape for number, layer in enumerate(layers) for name, shape in layer.items()}
    tensors = {}
    for name, shape in shapes.items():
        kind = "Q4_0" if "exps" in name or "shexp" in name else next(kinds)
        if len(shape) < 2 or shape[-1] % 32 or name.endswith(("inp.weight", "conv1d.weight")) or kind == "F16":
            tensors[name] = Entry(-np.ones(shape) if name.endswith("ssm_a") else rng.standard_normal(shape))
        else:
            data = random_blocks(rng, kind, shape)
            tensors[name] = Entry(values_of(data, kind), kind, data)
    return fields, tensors


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """For each architecture: its fields, tensors, and the bytes of its file."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for arch in MODELS:
        path = folder / f"{arch}.gguf"
        write_gguf(path, *model(arch))
        found[arch] = (*model(arch), path.read_bytes())
        assert run(path) is None  # undamaged, it loads
    return found


def run(path):
    """None for a model that loads, else the error, which is one of the permitted kinds."""
    try:
        with open_checkpoint(path, num_threads=1) as checkpoint:
            build_plan(checkpoint, context_length=4)
    except (CheckpointError, UnsupportedError) as error:
        found = error
    else:
        found = None
    for read in (Tokenizer, read_sampling):
        try:
            read(path)
        except (CheckpointError, UnsupportedError) as error:
            found = error
    return found


# ---------------------------------------------------------------------------------------------
# Damage: functions of a generator, a file's bytes and the size of its header

EXTREMES = (0, 1, 2, 7, 31, 33, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
LONG_EXTREMES = (2**32, 2**40, 2**62, 2**63, 2**64 - 1)


def flip(rng, data, header):
    for place in rng.integers(0, header, rng.integers(1, 4)):
        data[place] ^= 1 << rng.integers(8)


def put(rng, data, header):
    wide = rng.random() < 0.5
    value = int(rng.choice(np.array(EXTREMES + LONG_EXTREMES * wide, dtype=object)))
    place = rng.integers(0, header - 8)
    data[place : place + (8 if wide else 4)] = struct.pack("<Q" if wide else "<I", value)


def nudge(rng, data, header):
    """A number becomes a little larger or smaller."""
    place = rng.integers(0, header - 4)
    (value,) = struct.unpack_from("<I", data, place)
    struct.pack_into("<I", data, place, (value + int(rng.integers(-2, 3))) % 2**32)


def cut(rng, data, header):
    del data[rng.integers(0, len(data)) :]


def take_away(rng, data, header):
    begin = rng.integers(0, header)
    del data[begin : begin + rng.integers(1, 40)]


def insert(rng, data, header):
    place = rng.integers(0, header)
    data[place:place] = rng.bytes(rng.integers(1, 40))


def damage_weights(rng, data, header):
    for place in rng.integers(header, len(data), 20):
        data[place] = rng.integers(256)


DAMAGES = (flip, flip, put, put, nudge, nudge, cut, take_away, insert, damage_weights)
VALUES = (
    0,
    1,
    3,
    2**31,
    2**32 - 1,
    -1.0,
    float("nan"),
    float("inf"),
    1e38,
    "",
    "x",
    True,
    False,
    [],
    [1, 2],
    ["a"],
    [0.5],
)


def damaged_field(rng, fields):
    """Fields, one of which is missing or has another value."""
    name = str(rng.choice([name for name in fields if name != "general.architecture"]))
    changed = dict(fields)
    value = VALUES[rng.integers(len(VALUES))] if rng.random() < 0.8 else None
    if value is None:
        del changed[name]
    else:
        changed[name] = value
    return changed


def try_cases(models, folder, begin, count):
    path = folder / "model.gguf"
    outcomes = {True: 0, False: 0}
    for number in range(begin, begin + count):
        rng = np.random.default_rng([1, number])
        fields, tensors, data = models[list(models)[number % len(models)]]
        path.unlink(missing_ok=True)
        if number % 5 == 0:
            write_gguf(path, damaged_field(rng, fields), tensors)
        else:
            changed = bytearray(data)
            DAMAGES[rng.integers(len(DAMAGES))](rng, changed, data.index(b"token_embd") + 2000)
            path.write_bytes(changed)
        try:
            outcomes[run(path) is None] += 1
        except Exception as error:
            raise AssertionError(f"case {number}: {type(error).__name__}: {error}") from error
    return outcomes


@pytest.mark.sampled(1)
@pytest.mark.parametrize("begin", range(0, EXAMPLES, PART))
def test_any_damage_is_said(models, tmp_path, begin):
    outcomes = try_cases(models, tmp_path, begin, PART)
    assert min(outcomes.values()) > PART // 20
