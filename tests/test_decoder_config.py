"""``config.json`` as the decoder reads it: the values of real models, what is refused, and every field damaged."""

import copy

import numpy as np
import pytest

from marlin_cy.checkpoints.families import FAMILIES
from marlin_cy.decoder.architecture import ARCHITECTURES
from marlin_cy.decoder.architecture import MISSING as LACKING
from marlin_cy.decoder.config import (
    AttentionConfig,
    DecoderConfig,
    DeltaNetConfig,
    LatentAttentionConfig,
    read_decoder_config,
)
from marlin_cy.decoder.rope import RopeConfig, rope_table
from marlin_cy.errors import CheckpointError, UnsupportedError

# The fields of real models' config.json that the decoder reads, at their own sizes.
QWEN2 = {
    "model_type": "qwen2_moe",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "vocab_size": 151936,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
QWEN3 = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "vocab_size": 151936,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 32000,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
}
GLM = {
    "model_type": "glm4_moe",
    "attention_bias": True,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "vocab_size": 151552,
    "num_hidden_layers": 3,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "use_qk_norm": False,
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "vocab_size": 201088,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "initial_context_length": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "vocab_size": 129280,
    "num_hidden_layers": 4,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
}
QWEN3_5 = {
    "model_type": "qwen3_5_moe_text",
    "attention_bias": False,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "vocab_size": 248320,
    "num_hidden_layers": 4,
    "full_attention_interval": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
}
NEXT = {
    **{key: value for key, value in QWEN3_5.items() if key not in ("layer_types", "rope_parameters")},
    "model_type": "qwen3_next",
    "intermediate_size": 5120,
    "partial_rotary_factor": 0.25,
    "rope_scaling": None,
    "rope_theta": 10000000,
}
CONFIGS = {
    config["model_type"]: config for config in (QWEN2, QWEN3, MIXTRAL, GLM, GPT_OSS, DEEPSEEK, QWEN3_5, NEXT)
} | {
    "deepseek_v2": DEEPSEEK | {"model_type": "deepseek_v2", "q_lora_rank": None},
    "qwen3_5_moe": {
        "model_type": "qwen3_5_moe",
        "tie_word_embeddings": False,
        "text_config": QWEN3_5,
    },
}


def read(config, **changes):
    return read_decoder_config({**config, **changes}, "config.json")


# ---------------------------------------------------------------------------------------------
# Real models


def test_every_family_has_an_architecture_or_lacks_something():
    assert not ARCHITECTURES.keys() & LACKING.keys()
    # mistral3 is Mistral-4's model of text and images, whose language model names the family.
    assert ARCHITECTURES.keys() | LACKING.keys() == FAMILIES.keys() | {"mistral3"}
    assert CONFIGS.keys() <= ARCHITECTURES.keys()


def test_qwen3():
    config = read(QWEN3)
    assert config == DecoderConfig(
        model_type="qwen3_moe",
        architecture=ARCHITECTURES["qwen3_moe"],
        hidden_size=2048,
        vocab_size=151936,
        context_length=40960,
        norm_eps=1e-6,
        tied=False,
        layer_types=("full_attention",) * 4,
        attention=AttentionConfig(32, 4, 128, False, False, True, False, False, None),
        delta_net=None,
        ropes={"full_attention": RopeConfig("default", 128, 1e6, 40960)},
        rope_interleaved=False,
        dense_size=6144,
    )
    longer = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    rope = read(QWEN3, rope_scaling=longer).ropes["full_attention"]
    expected = RopeConfig("yarn", 128, 1e6, 40960, original_positions=32768, factor=4.0)
    assert rope == RopeConfig(**{**vars(expected), "attention_factor": 0.1 * np.log(4) + 1})


def test_qwen2():
    config = read(QWEN2)
    assert config.attention == AttentionConfig(16, 16, 128, True, False, False, False, False, None)
    assert config.layer_types == ("full_attention",) * 4
    assert read(QWEN2, qkv_bias=False).attention.bias is False
    windows = read(QWEN2, use_sliding_window=True, max_window_layers=3)
    assert windows.layer_types == ("sliding_attention", "full_attention", "sliding_attention", "full_attention")
    assert windows.attention.window == 32768


def test_mixtral():
    config = read(MIXTRAL)
    assert config.attention == AttentionConfig(32, 8, 128, False, False, False, False, False, None)
    assert config.layer_types == ("full_attention",) * 3
    windows = read(MIXTRAL, sliding_window=4096)
    assert windows.layer_types == ("sliding_attention",) * 3
    assert windows.attention.window == 4096
    assert read({key: value for key, value in MIXTRAL.items() if key != "rope_theta"}) == config


def test_glm():
    config = read(GLM)
    assert config.attention == AttentionConfig(96, 8, 128, True, False, False, False, False, None)
    assert config.ropes == {"full_attention": RopeConfig("default", 64, 1e6, 131072)}
    assert config.norm_eps == 1e-5
    assert read(GLM, use_qk_norm=True).attention.head_norm is True


def test_gpt_oss():
    config = read(GPT_OSS)
    assert config.attention == AttentionConfig(64, 8, 64, True, True, False, True, False, 128)
    assert config.layer_types == ("sliding_attention", "full_attention") * 2
    rope = RopeConfig(
        "yarn",
        64,
        150000,
        131072,
        original_positions=4096,
        factor=32,
        attention_factor=0.1 * np.log(32) + 1,
        truncate=False,
    )
    assert config.ropes == dict.fromkeys(["sliding_attention", "full_attention"], rope)
    # transformers has the model's own settings as defaults.
    assert read(GPT_OSS, rope_scaling=None, rope_theta=None, layer_types=None, head_dim=None) == config


def test_deepseek():
    config = read(DEEPSEEK)
    assert config.attention == LatentAttentionConfig(128, 1536, 512, 128, 64, 128, False)
    mscale = 0.1 * np.log(40) + 1
    rope = RopeConfig("yarn", 64, 10000, 163840, 4096, 40, attention_factor=1.0, score_factor=mscale**2)
    assert config.ropes == {"full_attention": rope}
    assert config.rope_interleaved is True
    assert read(DEEPSEEK, rope_interleave=False).rope_interleaved is False
    lite = read(CONFIGS["deepseek_v2"])
    assert lite.attention.q_rank is None
    assert lite.rope_interleaved is True


def test_qwen3_5_and_next():
    config = read(QWEN3_5)
    assert config.attention == AttentionConfig(16, 2, 256, False, False, True, False, True, None)
    assert config.delta_net == DeltaNetConfig(16, 32, 128, 128, 4)
    assert config.delta_net.channels == 8192
    assert config.layer_types == ("linear_attention",) * 3 + ("full_attention",)
    assert config.ropes == {"full_attention": RopeConfig("default", 64, 1e7, 262144)}
    assert config.dense_size is None
    following = read(NEXT)
    for field in ("attention", "delta_net", "layer_types", "ropes"):
        assert getattr(following, field) == getattr(config, field)
    nested = read(CONFIGS["qwen3_5_moe"])
    assert {**vars(nested), "model_type": ""} == {**vars(config), "model_type": ""}


def test_rope_of_each_layer_type():
    entries = {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_type": "linear", "factor": 8}}
    config = read(GPT_OSS, rope_scaling=None, rope_theta=None, rope_parameters=entries)
    assert config.ropes == {
        "sliding_attention": RopeConfig("default", 64, 1e4, 131072),
        "full_attention": RopeConfig("linear", 64, 150000, 131072, original_positions=131072, factor=8),
    }
    entries["full_attention"] = None
    config = read(GPT_OSS, rope_scaling=None, rope_theta=None, rope_parameters=entries)
    assert config.ropes["full_attention"] is None


def without(config, *names):
    return {key: value for key, value in config.items() if key not in names}


@pytest.mark.parametrize(
    ("config", "name", "found", "expected"),
    [
        (QWEN3, "num_key_value_heads", lambda config: config.attention.num_kv_heads, 32),
        (QWEN3, "head_dim", lambda config: config.attention.head_dim, 64),
        (NEXT, "head_dim", lambda config: config.attention.head_dim, 256),
        (QWEN3, "rms_norm_eps", lambda config: config.norm_eps, 1e-6),
        (MIXTRAL, "rms_norm_eps", lambda config: config.norm_eps, 1e-5),
        (MIXTRAL, "rope_theta", lambda config: config.ropes["full_attention"].theta, 1e6),
        (QWEN3, "rope_theta", lambda config: config.ropes["full_attention"].theta, 1e4),
        (GLM, "partial_rotary_factor", lambda config: config.ropes["full_attention"].dim, 64),
        (NEXT, "partial_rotary_factor", lambda config: config.ropes["full_attention"].dim, 64),
        (QWEN3_5, "layer_types", lambda config: config.layer_types.count("full_attention"), 1),
        (QWEN3_5, "linear_conv_kernel_dim", lambda config: config.delta_net.conv_width, 4),
        (DEEPSEEK, "q_lora_rank", lambda config: config.attention.q_rank, None),
        (QWEN3, "tie_word_embeddings", lambda config: config.tied, False),
    ],
)
def test_defaults(config, name, found, expected):
    """A value that is missing or null is transformers' default."""
    assert found(read(without(config, name))) == expected
    assert found(read(config, **{name: None})) == expected


# ---------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("config", "changes", "exception", "message"),
    [
        (QWEN3, {"model_type": "abacus"}, UnsupportedError, "model_type 'abacus', the decoder supports qwen2_moe, "),
        (QWEN3, {"hidden_size": None}, CheckpointError, "hidden_size: missing"),
        (QWEN3, {"vocab_size": 2**31}, UnsupportedError, "vocab_size 2147483648, supported: at most 2147483647"),
        (QWEN3, {"num_hidden_layers": 10**9}, UnsupportedError, "num_hidden_layers 1000000000"),
        (QWEN3, {"max_position_embeddings": 1 << 40}, UnsupportedError, "max_position_embeddings 1099511627776"),
        (QWEN3, {"num_key_value_heads": 5}, CheckpointError, "num_key_value_heads: got 5, expected a divisor of num"),
        (QWEN3, {"head_dim": 100}, UnsupportedError, "head_dim: values of 100 and keys of 100 numbers"),
        (QWEN3, {"head_dim": 656}, UnsupportedError, "keys of an even number up to 640"),
        (QWEN3, {"head_dim": None, "num_attention_heads": 96}, CheckpointError, "got 96, expected a divisor of hidden"),
        (QWEN3, {"rms_norm_eps": 0}, CheckpointError, "rms_norm_eps: got 0.0, expected a float32 between 0 and 1"),
        (QWEN3, {"attention_bias": 1}, CheckpointError, "attention_bias: got 1, expected bool"),
        (QWEN3, {"use_sliding_window": True, "sliding_window": 0}, CheckpointError, "sliding_window: got 0"),
        (QWEN3, {"partial_rotary_factor": 0.5}, UnsupportedError, "0.5, this family rotates whole heads"),
        (QWEN3, {"layer_types": ["sliding_attention"] * 4}, UnsupportedError, "for layer 0, expected 'full_attention'"),
        (QWEN2, {"layer_types": ["abacus"] * 4}, UnsupportedError, "'abacus' for layer 0, supported: full_attention"),
        (QWEN2, {"layer_types": ["full_attention"]}, CheckpointError, "layer_types: got 1 entries, expected 4"),
        (QWEN3_5, {"linear_num_value_heads": 24}, CheckpointError, "got 24, expected a multiple of linear_num_key_hea"),
        (QWEN3_5, {"hidden_act": "gelu"}, UnsupportedError, "hidden_act 'gelu', linear attention supports silu"),
        (QWEN3_5, {"rope_theta": 1e6}, CheckpointError, "rope_theta: got 10000000.0 and 1000000.0, which contradict"),
        (GLM, {"partial_rotary_factor": 0.29}, CheckpointError, "got 0.29 of 128 values .* an even number of values"),
        (DEEPSEEK, {"num_key_value_heads": 8}, CheckpointError, "got 8, expected num_attention_heads, 128"),
        (DEEPSEEK, {"kv_lora_rank": 600}, UnsupportedError, "values of 600 and keys of 664 numbers"),
        (DEEPSEEK, {"mlp_bias": True}, UnsupportedError, "mlp_bias True is not supported"),
        (MIXTRAL, {"final_logit_softcapping": 30.0}, UnsupportedError, "final_logit_softcapping 30.0 is not supported"),
        (
            CONFIGS["qwen3_5_moe"],
            {"tie_word_embeddings": True},
            CheckpointError,
            "tie_word_embeddings: got True, and False in text_config, which contradict",
        ),
    ],
)
def test_refused(config, changes, exception, message):
    with pytest.raises(exception, match=message) as refused:
        read(config, **changes)
    assert "config.json" in str(refused.value)


@pytest.mark.parametrize(
    ("rope", "exception", "message"),
    [
        ({"rope_type": "longrope"}, UnsupportedError, "rope_type 'longrope', supported: default, linear, dynamic"),
        ({"type": "abacus"}, UnsupportedError, "rope_type 'abacus'"),
        ({"type": "linear", "rope_type": "yarn"}, CheckpointError, "which contradict each other"),
        ({"rope_type": "linear"}, CheckpointError, "factor: missing"),
        ({"rope_type": "linear", "factor": 0.5}, CheckpointError, "factor: got 0.5, expected 1.0 to"),
        ({"rope_type": "linear", "factor": "2"}, CheckpointError, "factor: got '2', expected a finite number"),
        ({"rope_theta": 1}, CheckpointError, "rope_theta: got 1.0 and 1000000.0"),
        ({"rope_type": "yarn", "factor": 4, "beta_fast": -1}, CheckpointError, "beta_fast: got -1.0"),
        ({"rope_type": "yarn", "factor": 4, "truncate": 0}, CheckpointError, "truncate: got 0, expected bool"),
        ({"rope_type": "yarn", "factor": 4, "attention_factor": 0}, CheckpointError, "attention_factor: got 0"),
        ({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 0}, CheckpointError, "got 0, expected"),
        ({"rope_type": "llama3", "factor": 8, "high_freq_factor": 4}, CheckpointError, "low_freq_factor: missing"),
        (
            {"rope_type": "llama3", "factor": 8, "high_freq_factor": 1, "low_freq_factor": 1},
            CheckpointError,
            "high_freq_factor: got 1.0, expected more than low_freq_factor, 1.0",
        ),
        ({"full_attention": 3}, CheckpointError, "full_attention: got 3, expected dict"),
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_refused(key, rope, exception, message):
    with pytest.raises(exception, match=message):
        read(QWEN3, **{key: rope})


def test_rope_of_a_layer_type_that_is_missing():
    rope = {"full_attention": {"rope_type": "default"}}
    with pytest.raises(CheckpointError, match="rope_parameters: sliding_attention: missing"):
        read(GPT_OSS, rope_scaling=None, rope_parameters=rope)


def places_in(config, at=()):
    for key, value in config.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from places_in(value, (*at, key))


MISSING = object()
DAMAGE = [MISSING, None, "abacus", True, False, -1, 0, 1, 3, 0.5, -0.5, 1e300, 1e-300, 10**30, -(10**400), [], [3], {}]
STARTS = CONFIGS | {
    "linear": QWEN3 | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "dynamic": QWEN3 | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama3": QWEN3
    | {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    },
}


@pytest.mark.parametrize("start", STARTS)
def test_every_field_damaged(start):
    """A CheckpointError, an UnsupportedError, or a config whose tables are finite; nothing else."""
    outcomes = {"read": 0, "refused": 0}
    for place in places_in(STARTS[start]):
        for value in DAMAGE:
            damaged = copy.deepcopy(STARTS[start])
            inner = damaged
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            if value is MISSING:
                del inner[place[-1]]
            try:
                found = read(damaged)
            except (CheckpointError, UnsupportedError):
                outcomes["refused"] += 1
                continue
            outcomes["read"] += 1
            for rope in set(found.ropes.values()) - {None}:
                table = rope_table(rope, 3)
                assert np.isfinite(table.cos).all()
                assert np.isfinite(table.sin).all()
    print(outcomes)
    assert min(outcomes.values()) > 20
