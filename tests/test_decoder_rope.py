"""RoPE tables, compared with transformers' frequencies and attention factors."""

import numpy as np
import pytest

from marlin_cy.decoder.reference import rope
from marlin_cy.decoder.rope import ROPE_TYPES, read_rope, rope_table

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding  # noqa: E402

SIZES = {"hidden_size": 512, "num_attention_heads": 4, "head_dim": 128, "max_position_embeddings": 4096}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
CASES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "gpt-oss": {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 128},
    "deepseek": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn betas": {"rope_type": "yarn", "factor": 8, "beta_fast": 20, "beta_slow": 2, "attention_factor": 1.25},
    "yarn without factor": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 256},
    "yarn of one pair": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1.0, "beta_slow": 1.0},
}


def test_every_type_is_tested():
    assert {case["rope_type"] for case in CASES.values()} == ROPE_TYPES.keys()


@pytest.mark.parametrize("partial", [0.5, 1.0])
@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("name", CASES)
def test_against_transformers(name, theta, partial):
    """Within float32's rounding of transformers' frequencies, at every position."""
    given = {**CASES[name], "rope_theta": theta, "partial_rotary_factor": partial}
    reader = read_rope({**SIZES, "rope_parameters": given}, 128, frozenset({"full_attention"}), 1.0, 1e4, "config.json")
    config = transformers.Glm4MoeConfig(**SIZES, rope_parameters=dict(given))
    length = 5000 if name == "dynamic" else 300
    if given["rope_type"] == "default":
        frequencies, factor = Glm4MoeRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        options = {"seq_len": length} if name == "dynamic" else {}
        frequencies, factor = ROPE_INIT_FUNCTIONS[given["rope_type"]](config, **options)
    table = rope_table(reader["full_attention"], length)
    assert table.pairs == int(128 * partial) // 2 == len(frequencies)
    angles = np.arange(length)[:, None] * frequencies.double().numpy()
    # A float32 frequency is off by some roundings of itself, and so the angle by as many of the angle.
    bound = 1e-7 + factor * 8 * np.finfo(np.float32).eps * (1 + angles)
    assert (np.abs(table.cos - factor * np.cos(angles)) < bound).all()
    assert (np.abs(table.sin - factor * np.sin(angles)) < bound).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation(interleaved):
    """A rotation by the angle of the position keeps the length of each pair, and the rest of the head."""
    config = {**SIZES, "rope_parameters": {"rope_theta": 100.0}}
    settings = read_rope(config, 16, frozenset({"full_attention"}), 0.5, 1e4, "config.json")["full_attention"]
    table = rope_table(settings, 9, interleaved)
    x = np.random.default_rng(0).standard_normal((9, 2, 16))
    turned = rope(x, table, np.arange(9))
    np.testing.assert_array_equal(turned[..., 8:], x[..., 8:])
    first, second = ([0, 2, 4, 6], [1, 3, 5, 7]) if interleaved else ([0, 1, 2, 3], [4, 5, 6, 7])
    pairs, expected = turned[..., first] + 1j * turned[..., second], x[..., first] + 1j * x[..., second]
    angle = np.arange(9)[:, None, None] * 100.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(pairs, expected * np.exp(1j * angle), atol=1e-6)
