"""GGUF models of every architecture: their logits, compared with transformers' models of the dequantised weights."""

import numpy as np
import pytest
from asserts import relative_error

pytest.importorskip("gguf", reason="gguf is not installed")
torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

import language_models  # noqa: E402
from gguf_files import ARCHITECTURES, BLOCK_TYPES, Entry, by_kind, write_gguf, write_gguf_model  # noqa: E402
from language_models import logits_in_float64  # noqa: E402

from marlin_cy import load_model, open_checkpoint  # noqa: E402
from marlin_cy.checkpoints.gguf.architectures import ARCHITECTURES as ROWS  # noqa: E402
from marlin_cy.checkpoints.packed_writer import write_packed  # noqa: E402
from marlin_cy.decoder.build import build_plan  # noqa: E402
from marlin_cy.decoder.reference import reference_logits  # noqa: E402
from marlin_cy.errors import CheckpointError, MarlinError, UnsupportedError  # noqa: E402

TOKENS = np.random.default_rng(1).integers(1, language_models.VOCABULARY, 40)
KINDS = {"gpt_oss": "MXFP4"}
# Heads of values must be whole blocks, where their order differs.
CHANGES = {"qwen3_5_moe_text": {"linear_value_head_dim": 32}}

torch.set_num_threads(1)


def written(folder, model_type, kind=None, **options):
    return write_gguf_model(
        folder, model_type, kind or KINDS.get(model_type, "Q4_0"), **CHANGES.get(model_type, {}) | options
    )


def assert_same_logits(path, dense):
    """Returns the plan. The bound is float32's roundoff of norms, RoPE and the tables, of some ten values in a row."""
    expected = logits_in_float64(dense, TOKENS)
    assert expected.std() > 0.1
    with open_checkpoint(path, num_threads=1) as checkpoint:
        plan = build_plan(checkpoint)
    assert relative_error(reference_logits(plan, TOKENS), expected) < 1e-6
    return plan


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A Qwen3-MoE model: ``(path, dense folder)``, not to be changed."""
    return written(tmp_path_factory.mktemp("qwen"), "qwen3_moe")


# ---------------------------------------------------------------------------------------------
# The right numbers


def test_every_architecture_is_tested():
    assert set(ARCHITECTURES.values()) == set(ROWS)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_family(tmp_path, model_type):
    assert_same_logits(*written(tmp_path, model_type))


WIDE = {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_every_type(tmp_path, kind):
    """By the plan, by the decoder, and from a packed folder with the same bits."""
    path, dense = written(tmp_path, "qwen3_moe", kind, **WIDE)
    assert_same_logits(path, dense)
    with open_checkpoint(path) as checkpoint:
        write_packed(checkpoint, tmp_path / "packed")
    found = [decoded(folder) for folder in (path, tmp_path / "packed")]
    assert relative_error(found[0], logits_in_float64(dense, TOKENS)) < 5e-4
    assert np.array_equal(*found)


def decoded(path):
    """Logits of the decoder on the CPU."""
    model = load_model(path, num_threads=1, compute_dtype="int16", cache_dtype="float32")
    return model.forward(TOKENS, all_logits=True)


MIXES = {
    "Q4_K_M": [("down_proj|v_proj", "Q6_K"), ("embed_tokens|lm_head", "Q6_K")],
    "gate and up of one family of types": [("up_proj", "Q5_K")],
    "gate and up of two families": [("up_proj", "Q6_K"), ("q_proj", "F16"), ("k_proj", "Q8_0")],
}


@pytest.mark.parametrize("mix", MIXES)
def test_mixed_types(tmp_path, mix):
    path, dense = written(tmp_path, "qwen3_moe", "Q4_K", kinds=MIXES[mix], **WIDE)
    assert_same_logits(path, dense)
    assert relative_error(decoded(path), logits_in_float64(dense, TOKENS)) < 5e-4


@pytest.mark.parametrize("up", ["Q5_0", "Q4_1", "F16"])
def test_shared_experts_of_mixed_types(tmp_path, up):
    path, dense = written(
        tmp_path, "qwen2_moe", kinds=[(r"shared_expert\.up_proj", up), (r"shared_expert\.down", "Q8_0")]
    )
    assert_same_logits(path, dense)
    with open_checkpoint(path) as checkpoint:
        write_packed(checkpoint, tmp_path / "packed")
    assert_same_logits(tmp_path / "packed", dense)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_XS", "Q5_1"])
def test_reordered_inputs_of_two_levels(tmp_path, kind):
    """The output projection of Qwen3.5, the heads of whose inputs lie inside of a block of 256."""
    sizes = {"hidden_size": 256, "linear_num_value_heads": 8, "linear_num_key_heads": 2}
    path, dense = written(tmp_path, "qwen3_5_moe_text", "Q4_0", kinds=[("out_proj", kind)], **sizes)
    assert_same_logits(path, dense)


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("deepseek_v2", {"split": True, "q_lora_rank": None}),
        ("deepseek_v3", {"split": True, "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
        ("deepseek_v2", {"topk_method": "greedy", "n_group": 1, "topk_group": 1}),
        ("qwen2_moe", {"qkv_bias": False, "mlp_only_layers": []}),
        ("qwen3_moe", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}}),
        ("qwen3_moe", {"rope_parameters": YARN, "tie_word_embeddings": True}),
        ("qwen3_next", {"linear_num_value_heads": 2, "layer_types": ["full_attention", "linear_attention"]}),
        ("qwen3_5_moe_text", {"linear_num_value_heads": 8, "linear_num_key_heads": 4}),
        ("mixtral", {"head_dim": 32, "num_key_value_heads": 4}),
        ("glm4_moe", {"use_qk_norm": False, "attention_bias": False, "partial_rotary_factor": 1.0}),
        ("gpt_oss", {"rope_parameters": YARN | {"truncate": False}}),
    ],
)
def test_settings(tmp_path, model_type, changes):
    assert_same_logits(*written(tmp_path, model_type, **changes))


def test_floats_of_every_type(tmp_path):
    kinds = [
        (r"q_proj", "F16"),
        (r"k_proj", "BF16"),
        (r"o_proj", "F32"),
        (r"embed|lm_head", "BF16"),
        (r"mlp.gate", "F16"),
    ]
    plan = assert_same_logits(*written(tmp_path, "qwen3_moe", kinds=kinds))
    mixer = plan.layers[0].mixer
    assert [str(part.weight.dtype) for part in (mixer.q, mixer.k, mixer.o)] == ["float16", "bfloat16", "float32"]
    assert str(plan.embedding.dtype) == str(plan.head.weight.dtype) == "bfloat16"


def test_quantised_embedding_router_and_head(tmp_path):
    kinds = [(r"embed_tokens", "Q6_K"), (r"mlp.gate.weight", "Q8_0"), (r"lm_head", "Q4_0"), (r"norm", "F32")]
    plan = assert_same_logits(*written(tmp_path, "qwen3_moe", kinds=kinds, hidden_size=256))
    assert str(plan.embedding.dtype) == "float32"
    assert not hasattr(plan.head, "weight")


def test_fused_projections(tmp_path):
    """``attn_qkv`` and ``ffn_gate_up_exps``, which llama.cpp's converter writes on request."""

    def fuse(fields, tensors):
        for layer in range(2):
            for names, joined, axis in (
                ([f"attn_{name}.weight" for name in "qkv"], "attn_qkv.weight", 0),
                ([f"ffn_{name}_exps.weight" for name in ("gate", "up")], "ffn_gate_up_exps.weight", 1),
            ):
                parts = [tensors.pop(f"blk.{layer}.{name}") for name in names]
                tensors[f"blk.{layer}.{joined}"] = Entry(
                    np.concatenate([part.values for part in parts], axis),
                    parts[0].kind,
                    np.concatenate([part.data for part in parts], axis),
                )

    assert_same_logits(*written(tmp_path, "qwen3_moe", edit=fuse))


def test_older_files_of_qwen3_next(tmp_path):
    """Queries, keys, values and gates in one tensor, and no list of recurrent layers."""

    def join(fields, tensors):
        del fields["qwen3next.attention.recurrent_layers"]
        fields["qwen3next.full_attention_interval"] = 2
        qkv, z = tensors.pop("blk.0.attn_qkv.weight"), tensors.pop("blk.0.attn_gate.weight")
        data = np.concatenate([qkv.data, z.data])
        tensors["blk.0.ssm_in.weight"] = Entry(None, qkv.kind, data[np.argsort(language_order())])

    def language_order():
        return by_kind({f"linear_{name}": size for name, size in SIZES.items()})

    SIZES = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 16, "value_head_dim": 16}
    assert_same_logits(*written(tmp_path, "qwen3_next", edit=join))


def test_layers_that_predict_several_tokens(tmp_path):
    def add(fields, tensors):
        fields |= {"glm4moe.block_count": 3, "glm4moe.nextn_predict_layers": 1}
        tensors["blk.2.nextn.eh_proj.weight"] = Entry(np.ones((64, 128)))

    path, dense = written(tmp_path, "glm4_moe", edit=add)
    assert_same_logits(path, dense)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.skipped_tensors == ["blk.2.nextn.eh_proj.weight"]
        assert checkpoint.num_layers == 2


def test_parts(tmp_path, qwen):
    stored = {}
    written(
        tmp_path, "qwen3_moe", edit=lambda fields, tensors: stored.update(fields=dict(fields), tensors=dict(tensors))
    )
    write_gguf(tmp_path / "part.gguf", stored["fields"], stored["tensors"], split_max_tensors=10)
    (tmp_path / "model.gguf").unlink()
    assert_same_logits(tmp_path, tmp_path / "dense")


# ---------------------------------------------------------------------------------------------
# Everything that is built on it


def test_the_decoder_on_the_cpu(qwen):
    path, dense = qwen
    expected = logits_in_float64(dense, TOKENS)
    logits = load_model(path, num_threads=1, compute_dtype="int16", cache_dtype="float32").forward(
        TOKENS, all_logits=True
    )
    assert relative_error(logits, expected) < 5e-4


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3", "qwen3_5_moe_text", "gpt_oss"])
def test_packed_folders(tmp_path, model_type):
    path, dense = written(tmp_path, model_type)
    with open_checkpoint(path) as checkpoint:
        report = write_packed(checkpoint, tmp_path / "packed")
    assert report["source_bytes"] == path.stat().st_size
    assert_same_logits(tmp_path / "packed", dense)
    whole = load_model(path, num_threads=1).forward(TOKENS)
    assert np.array_equal(load_model(tmp_path / "packed", num_threads=1).forward(TOKENS), whole)


def test_what_the_checkpoint_says(qwen):
    with open_checkpoint(qwen[0]) as checkpoint:
        assert (checkpoint.format, checkpoint.codes, checkpoint.scheme) == ("gguf", "uint4", None)
        assert {kind.group_size for kind in checkpoint.expert_kinds(0)} == {32}
        assert checkpoint.expert_symmetry(0) == (True, True)
        assert checkpoint.expert_bytes(0) == 4 * 3 * 32 * 64 // 32 * 18
        assert len(checkpoint.linears) == 8
        assert set(checkpoint.quantized_tensors) >= {f"{name}.weight" for name in checkpoint.linears}
        name = "model.layers.0.self_attn.q_proj.weight"
        assert checkpoint.tensor_info(name).dtype == "Q4_0"
        with pytest.raises(UnsupportedError, match="Q4_0 has no NumPy equivalent"):
            checkpoint.tensor(name)
        with pytest.raises(CheckpointError, match="missing"):
            checkpoint.tensor("model.layers.0.x")
        with pytest.raises(CheckpointError, match="missing, or not quantised"):
            checkpoint.linear("model.embed_tokens")
        assert checkpoint.raw_tensor(name).nbytes == checkpoint.tensor_info(name).nbytes
    with pytest.raises(ValueError, match="was closed"):
        checkpoint.tensor("model.norm.weight")


# ---------------------------------------------------------------------------------------------
# What is refused


def refused(folder, edit, message, error=MarlinError, model_type="qwen3_moe", **options):
    """By opening the checkpoint or, at the latest, by building the plan."""
    path, _ = written(folder, model_type, edit=edit, **options)
    with pytest.raises(error, match=message):
        build_plan(open_checkpoint(path))


def setting(name, value):
    def edit(fields, tensors):
        fields[name] = value

    return edit


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("qwen3moe.attention.causal", False, "attention.causal False is not supported"),
        ("qwen3moe.final_logit_softcapping", 30.0, "final_logit_softcapping 30.0 is not supported"),
        ("qwen3moe.rope.scaling.attn_factor", 1.5, "attn_factor 1.5 is not supported"),
        ("qwen3moe.rope.scaling.type", "longrope", "rope.scaling.factor: missing"),
        ("qwen3moe.rope.freq_base_swa", 5.0, "rope.freq_base_swa 5.0"),
        ("qwen3moe.rope.dimension_count", 8, "this family rotates whole heads"),
        ("qwen3moe.attention.value_length", 32, "attention.value_length 32 beside a key_length of 16"),
        ("qwen3moe.nextn_predict_layers", 2, "nextn_predict_layers: got 2, expected less than block_count"),
        ("qwen3moe.expert_count", 3, r"ffn_gate_(inp|exps).*got .* expected"),
        ("qwen3moe.expert_used_count", 5, "num_experts_per_tok: got 5"),
        (
            "qwen3moe.expert_feed_forward_length",
            64,
            r"ffn_gate_exps.*got Q4_0 \(4, 32, 64\), expected Q4_0 \(4, 64, 64\)",
        ),
        ("qwen3moe.embedding_length", 128, "expected .* by the metadata"),
        ("qwen3moe.attention.head_count", 8, "expected"),
        ("qwen3moe.block_count", 3, "missing"),
        ("qwen3moe.context_length", 0, "context_length: got 0"),
    ],
)
def test_settings_that_contradict_the_tensors(tmp_path, name, value, message):
    refused(tmp_path, setting(name, value), message)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("model_type", "name", "value", "message"),
    [
        ("deepseek_v3", "deepseek2.expert_gating_func", 4, "expert_gating_func 4, supported: 1 and 2"),
        ("deepseek_v3", "deepseek2.attention.key_length_mla", 16, "expected more than rope.dimension_count"),
        ("deepseek_v2", "deepseek2.expert_weights_norm", True, "norm_topk_prob True is not supported"),
        ("glm4_moe", "glm4moe.expert_gating_func", 1, "expert_gating_func 1, GLM-4.5 has 2"),
        ("mixtral", "llama.expert_count", 0, "a model without experts"),
        ("qwen3_next", "qwen3next.ssm.inner_size", 65, "ssm.inner_size: got 65, expected a multiple"),
        ("qwen3_next", "qwen3next.attention.recurrent_layers", [True], "recurrent_layers: got .*, expected 2 values"),
        ("qwen3_next", "qwen3next.ssm.group_count", 4, r"blk\.0\.(attn_qkv|ssm_conv1d).*got .*, expected"),
        ("qwen3_5_moe_text", "qwen35moe.ssm.group_count", 3, "expected a multiple of ssm.group_count|got .* expected"),
    ],
)
def test_settings_of_families(tmp_path, model_type, name, value, message):
    refused(tmp_path, setting(name, value), message, model_type=model_type)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "tensor",
    ["rope_freqs.weight", "blk.0.attn_rot_embd.weight", "blk.0.attn_q_norm.scale", "blk.x.attn_q.weight", "other"],
)
def test_tensors_that_are_not_known(tmp_path, tensor):
    def edit(fields, tensors):
        tensors[tensor] = Entry(np.ones(8))

    refused(tmp_path, edit, f"tensor '{tensor}': not known for architecture 'qwen3moe'", UnsupportedError)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "tensor",
    [
        *("token_embd.weight", "output_norm.weight", "blk.0.attn_norm.weight", "blk.1.ffn_norm.weight"),
        *("blk.0.attn_q.weight", "blk.1.attn_output.weight", "blk.0.attn_k_norm.weight", "blk.0.ffn_gate_inp.weight"),
        *("blk.0.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight", "blk.0.ffn_down_exps.weight"),
    ],
)
def test_tensors_that_are_missing(tmp_path, tensor):
    refused(tmp_path, lambda fields, tensors: tensors.pop(tensor), "missing", CheckpointError)


def test_tensors_with_the_same_meaning(tmp_path):
    def edit(fields, tensors):
        tensors["blk.0.exp_probs_b"] = tensors["blk.1.exp_probs_b"] = Entry(np.ones(8))

    refused(tmp_path, edit, "blk.1.exp_probs_b.bias' too, which means the same", CheckpointError, model_type="glm4_moe")


@pytest.mark.parametrize("part", ["k", "v"])
def test_half_of_a_projection(tmp_path, part):
    def edit(fields, tensors):
        del tensors[f"blk.0.attn_{part}_b.weight"]

    refused(tmp_path, edit, f"attn_{part}_b.weight': missing", CheckpointError, model_type="deepseek_v3", split=True)


def test_a_type_that_is_not_supported(tmp_path):
    def edit(fields, tensors):
        tensors["blk.0.attn_q.weight"] = Entry(None, "Q2_K", np.zeros((64, 84), np.uint8))

    refused(
        tmp_path,
        edit,
        "tensor 'blk.0.attn_q.weight': type Q2_K, supported for linear layers: Q4_0, Q4_1, .*, BF16",
        UnsupportedError,
        hidden_size=256,
    )


def test_experts_that_are_not_all_quantised(tmp_path):
    refused(
        tmp_path,
        None,
        "experts.gate_proj has type F16 beside quantised ones",
        UnsupportedError,
        kinds=[("gate_proj", "F16")],
    )


def test_experts_that_are_not_quantised(tmp_path):
    path, _ = written(tmp_path, "qwen3_moe", kinds=[("experts", "F16")])
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.dense_moe_layers == [0, 1]
    with pytest.raises(UnsupportedError, match=r"the experts of layers \[0, 1\] are not quantised"):
        load_model(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scales_that_are_not_finite(tmp_path, value):
    def edit(fields, tensors):
        tensors["blk.1.ffn_up_exps.weight"].data[2, 5, 18:20] = np.array([value], np.float16).view(np.uint8)

    refused(tmp_path, edit, "blk.1.ffn_up_exps.weight': scale: got (nan|inf)", CheckpointError)


def test_a_decay_that_is_not_negative(tmp_path):
    def edit(fields, tensors):
        tensors["blk.0.ssm_a"].values[1] = 0.5

    refused(tmp_path, edit, "ssm_a': got 0.5, expected negative numbers", CheckpointError, model_type="qwen3_next")


def test_an_order_that_cuts_groups(tmp_path):
    refused(
        tmp_path, None, "cuts groups of 32", UnsupportedError, model_type="qwen3_5_moe_text", linear_value_head_dim=16
    )
