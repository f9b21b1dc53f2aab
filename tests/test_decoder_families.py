"""Plans of tiny models of every family: their logits, compared with transformers' own models of equal weights.

:mod:`marlin_cy.decoder.reference` computes a plan in float64, and transformers is made to. What a plan rounds to
float32 is not rounded here: the tables of RoPE, and the norms' factors of ``1 + weight``.
"""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from asserts import relative_error
from checkpoint_files import edit_json, edit_tensor

from marlin_cy import open_checkpoint
from marlin_cy.checkpoints.packed_writer import write_packed
from marlin_cy.decoder import build
from marlin_cy.decoder.build import build_plan, narrowed, read_config
from marlin_cy.decoder.plan import AttentionPlan, DenseLinear, MlpPlan, MoeFfnPlan, RopeTable
from marlin_cy.decoder.reference import reference_logits
from marlin_cy.decoder.rope import ROPE_TYPES
from marlin_cy.errors import CheckpointError, UnsupportedError

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

import language_models  # noqa: E402
from language_models import WITH_QUANTISED_HEAD, logits_in_float64, write_model  # noqa: E402

TOKENS = np.random.default_rng(1).integers(1, language_models.VOCABULARY, 40)
RELATIVE_ERROR = 1e-12
"""Float64's epsilon, 2.2e-16, times the number of roundings in a row: a few thousand."""

torch.set_num_threads(1)


def plan_of(folder, **options):
    with open_checkpoint(folder, num_threads=1) as checkpoint:
        return build_plan(checkpoint, **options)


def exact_table(rope, context_length, interleaved):
    angles = np.arange(context_length)[:, None] * ROPE_TYPES[rope.rope_type](rope, context_length)
    return RopeTable(rope.attention_factor * np.cos(angles), rope.attention_factor * np.sin(angles), interleaved)


def exact_norm(self, module, size):
    weight = self._loader.vector(f"{module}.weight", size).astype(np.float64)
    return weight + 1 if self._config.architecture.one_centred else weight


def assert_same_logits(quantised, dense):
    """Returns the plan."""
    expected = logits_in_float64(dense, TOKENS)
    assert expected.std() > 0.1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "rope_table", exact_table)
        patch.setattr(build.PlanBuilder, "_norm", exact_norm)
        exact = reference_logits(plan_of(quantised), TOKENS)
    assert relative_error(exact, expected) < RELATIVE_ERROR
    plan = plan_of(quantised)
    # Float32's roundoff, 6e-8, of some ten values in a row.
    assert relative_error(reference_logits(plan, TOKENS), expected) < 1e-6
    return plan


@pytest.fixture
def small(tmp_path):
    """The folder of a small Qwen3-MoE checkpoint, to be damaged."""
    return write_model(tmp_path, "qwen3_moe", dtype=torch.bfloat16)[0]


# ---------------------------------------------------------------------------------------------
# The right numbers


@pytest.mark.parametrize("model_type", language_models.CONFIGS)
def test_every_family(tmp_path, model_type):
    assert_same_logits(*write_model(tmp_path, model_type))


REVERSED = "full_attention", "linear_attention"
DEEPSEEK_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 16,
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gpt_oss", {"rope_parameters": None}),
        ("gpt_oss", {"attention_bias": False, "layer_types": ["full_attention", "sliding_attention"]}),
        ("deepseek_v3", {"q_lora_rank": None, "rope_parameters": DEEPSEEK_YARN}),
        ("deepseek_v2", {"attention_bias": True, "rope_parameters": DEEPSEEK_YARN}),
        ("deepseek_v3", {"rope_interleave": False, "attention_bias": True}),
        ("glm4_moe", {"use_qk_norm": False, "attention_bias": False, "partial_rotary_factor": 1.0}),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8, "attention_bias": True}),
        ("mixtral", {"sliding_window": 8, "head_dim": 32}),
        ("qwen2_moe", {"qkv_bias": False, "num_key_value_heads": 4}),
        ("qwen3_moe", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}}),
        ("qwen3_moe", {"decoder_sparse_step": 2, "hidden_act": "gelu_pytorch_tanh"}),
        ("qwen3_next", {"linear_num_value_heads": 8, "linear_conv_kernel_dim": 3, "mlp_only_layers": [1]}),
        ("qwen3_5_moe_text", {"layer_types": list(REVERSED), "linear_value_head_dim": 32}),
    ],
)
def test_settings(tmp_path, model_type, changes):
    assert_same_logits(*write_model(tmp_path, model_type, **changes))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e5, "rope_scaling": None, "partial_rotary_factor": 0.5},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    ],
)
def test_config_of_transformers_4(tmp_path, rope):
    quantised, dense = write_model(tmp_path, "glm4_moe")
    for folder in (quantised, dense):
        config = json.loads((folder / "config.json").read_text())
        del config["rope_parameters"]
        (folder / "config.json").write_text(json.dumps(config | rope))
    assert_same_logits(quantised, dense)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("model_type", "kept"),
    [
        ("qwen2_moe", "shared_expert."),
        ("qwen2_moe", "shared_expert.up_proj"),
        ("deepseek_v3", "shared_experts"),
        ("qwen2_moe", "layers.0.mlp"),
        ("deepseek_v2", "self_attn"),
        ("qwen3_next", "in_proj_qkvz"),
    ],
)
def test_layers_that_are_not_quantised(tmp_path, model_type, kept):
    plan = assert_same_logits(*write_model(tmp_path, model_type, kept=[kept]))
    if "shared" in kept:
        ffn = plan.layers[1].ffn
        assert isinstance(ffn, MoeFfnPlan)
        assert isinstance(ffn.shared.up, DenseLinear)
        assert isinstance(ffn.shared.down, DenseLinear) == ("up_proj" not in kept)
        assert ffn.layer.shared_expert is None
        assert (ffn.shared_gate is None) == (model_type == "deepseek_v3")
    if kept == "layers.0.mlp":
        assert isinstance(plan.layers[0].ffn, MlpPlan)
        assert isinstance(plan.layers[0].ffn.gate, DenseLinear)


def test_narrow_projections_that_are_quantised(tmp_path):
    """The widths of linear attention's b and a are not multiples of what a backend takes, so they are unpacked."""
    kept = re.compile(r"(lm_head|embed_tokens|norm|gate|conv1d)\.weight$")
    plan = assert_same_logits(*write_model(tmp_path, "qwen3_next", not_quantised=kept))
    assert isinstance(plan.layers[0].mixer.b, DenseLinear)


def test_heads(tmp_path):
    """A tied head is the embedding itself; a head may be quantised."""
    plan = assert_same_logits(*write_model(tmp_path / "tied", "qwen3_moe", tie_word_embeddings=True))
    assert plan.head.weight is plan.embedding
    plan = assert_same_logits(*write_model(tmp_path / "quantised", "qwen3_moe", not_quantised=WITH_QUANTISED_HEAD))
    assert not isinstance(plan.head, DenseLinear)


def test_packed_folder(tmp_path):
    """The same bits as its source."""
    quantised, _ = write_model(tmp_path, "qwen3_next")
    with open_checkpoint(quantised) as checkpoint:
        write_packed(checkpoint, tmp_path / "packed")
    logits = [reference_logits(plan_of(folder), TOKENS) for folder in (quantised, tmp_path / "packed")]
    np.testing.assert_array_equal(*logits)


# ---------------------------------------------------------------------------------------------
# The plan itself


def test_dense_weights_are_views_of_the_files(tmp_path):
    quantised, _ = write_model(tmp_path, "qwen3_moe", dtype=torch.bfloat16, kept=["self_attn"])
    plan = plan_of(quantised)
    attention = plan.layers[0].mixer
    matrices = [plan.embedding, plan.head.weight, plan.layers[0].ffn.router.weight]
    matrices += [projection.weight for projection in (attention.q, attention.k, attention.v, attention.o)]
    for matrix in matrices:
        assert matrix.dtype == ml_dtypes.bfloat16
        assert not matrix.flags.owndata
        assert not matrix.flags.writeable
    assert plan.final_norm.dtype == np.float32


def test_context_length(small):
    plan = plan_of(small, context_length=11)
    assert plan.context_length == 11
    assert plan.layers[0].mixer.rope.cos.shape == (11, 8)
    assert plan.layers[1].mixer.rope is plan.layers[0].mixer.rope
    assert plan_of(small).context_length == 128
    for wrong, exception in ((0, ValueError), (1 << 25, ValueError), (2.5, TypeError), ("8", TypeError)):
        with pytest.raises(exception, match="context_length: got"):
            plan_of(small, context_length=wrong)


def test_unpacked_matrices_are_narrowed_only_where_they_stay_accurate():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3, 20, 30)).astype(np.float32)
    rounded = weight.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert narrowed(weight).dtype == np.float32
    assert narrowed(rounded).dtype == np.float16
    np.testing.assert_array_equal(narrowed(rounded), rounded)
    assert narrowed(rounded * 2**20).dtype == np.float32
    assert narrowed(np.zeros_like(weight)).dtype == np.float16
    assert narrowed(np.swapaxes(weight, 1, 2)).flags.c_contiguous


def test_latent_attention_of_bfloat16_weights(tmp_path):
    quantised, _ = write_model(tmp_path, "deepseek_v2", dtype=torch.bfloat16, kept=["kv_b_proj"])
    mixer = plan_of(quantised).layers[0].mixer
    assert mixer.k_up.dtype == mixer.v_up.dtype == np.float16
    assert mixer.k_up.shape == (4, 32, 16)


# ---------------------------------------------------------------------------------------------
# What is refused

QUERY = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "change", "exception", "words"),
    [
        ("model.norm.weight", lambda array: None, CheckpointError, ["'model.norm.weight'", "missing"]),
        ("lm_head.weight", lambda array: None, CheckpointError, ["'lm_head.weight'", "missing"]),
        ("model.norm.weight", lambda array: array[:32], CheckpointError, ["'model.norm.weight'", "(32,)", "(64,)"]),
        ("model.embed_tokens.weight", lambda array: array[:50], CheckpointError, ["(50, 64)", "(96, 64)"]),
        ("model.embed_tokens.weight", lambda array: array.astype(np.int8), UnsupportedError, ["dtype I8", "BF16"]),
        ("model.layers.0.mlp.gate.weight", lambda array: array.astype(np.int8), UnsupportedError, ["gate", "I8"]),
        (f"{QUERY}.bias", lambda array: np.ones(64, np.float16), CheckpointError, ["q_proj.bias'", "no such bias"]),
        (f"{QUERY}.qweight", lambda array: None, CheckpointError, ["'" + QUERY + ".weight'", "missing"]),
    ],
)
def test_wrong_tensors(small, name, change, exception, words):
    edit_tensor(small, name, change)
    with pytest.raises(exception) as refused:
        plan_of(small)
    for word in words:
        assert word in str(refused.value)


def test_bias_of_zeros_that_the_model_lacks(small):
    """As AutoGPTQ writes them."""
    expected = reference_logits(plan_of(small), TOKENS)
    edit_tensor(small, f"{QUERY}.bias", lambda array: np.zeros(64, np.float16))
    np.testing.assert_array_equal(reference_logits(plan_of(small), TOKENS), expected)


def test_bias_that_is_missing(tmp_path):
    quantised, _ = write_model(tmp_path, "qwen2_moe")
    edit_tensor(quantised, f"{QUERY}.bias", lambda array: None)
    with pytest.raises(CheckpointError, match=f"'{QUERY}.bias'.*missing"):
        plan_of(quantised)


@pytest.mark.parametrize(
    ("model_type", "name", "message"),
    [
        ("gpt_oss", "router.bias", "router.bias'.*missing"),
        ("gpt_oss", "experts.down_proj_bias", "experts: the biases are missing"),
        ("deepseek_v3", "gate.e_score_correction_bias", "e_score_correction_bias'.*missing"),
    ],
)
def test_biases_of_experts_that_are_missing(tmp_path, model_type, name, message):
    quantised, _ = write_model(tmp_path, model_type)
    edit_tensor(quantised, f"model.layers.1.mlp.{name}", lambda array: None)
    with pytest.raises(CheckpointError, match=message):
        plan_of(quantised)


def test_gate_of_a_shared_expert_of_another_dtype(tmp_path):
    quantised, _ = write_model(tmp_path, "qwen2_moe")
    name = "model.layers.1.mlp.shared_expert_gate.weight"
    edit_tensor(quantised, name, lambda array: array.astype(np.int8))
    with pytest.raises(CheckpointError, match="shared_expert_gate.weight'.*got dtype int8"):
        plan_of(quantised)


def test_linear_of_another_size(small):
    """q_proj's tensors in k_proj's place."""
    for part in ("qweight", "scales", "qzeros"):
        held = {}
        edit_tensor(small, f"{QUERY}.{part}", lambda array, held=held: held.setdefault("array", array))
        edit_tensor(small, f"{QUERY}.{part}".replace("q_proj", "k_proj"), lambda array, held=held: held["array"])
    with pytest.raises(CheckpointError, match="k_proj: got 64 to 64 features, expected 64 to 32 by the configuration"):
        plan_of(small)


def test_experts_that_are_not_quantised(tmp_path):
    quantised, _ = write_model(tmp_path, "qwen3_moe", kept=["layers.1.mlp.experts"])
    with open_checkpoint(quantised) as checkpoint, pytest.raises(UnsupportedError, match=r"layers \[1\] are not quant"):
        read_config(checkpoint)


def test_dense_layers_without_a_size(tmp_path):
    quantised, _ = write_model(tmp_path, "qwen2_moe")
    edit_json(quantised, "config.json", intermediate_size=None)
    with open_checkpoint(quantised) as checkpoint, pytest.raises(CheckpointError, match="intermediate_size: missing"):
        read_config(checkpoint)


def test_layers_without_rope(tmp_path):
    """A null entry of a layer type in rope_parameters."""
    quantised, _ = write_model(tmp_path, "gpt_oss")
    rope = {"sliding_attention": {"rope_theta": 100.0}, "full_attention": None}
    edit_json(quantised, "config.json", rope_parameters=rope)
    mixers = [layer.mixer for layer in plan_of(quantised).layers]
    assert all(isinstance(mixer, AttentionPlan) for mixer in mixers)
    assert [mixer.rope is None for mixer in mixers] == [False, True]
    assert [mixer.window for mixer in mixers] == [16, None]
