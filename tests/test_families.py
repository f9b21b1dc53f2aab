"""Model families: their configurations, and whole folders of each, loaded and run."""

import shutil

import numpy as np
import pytest
from asserts import relative_error
from checkpoint_files import (
    CONFIGS,
    METHODS,
    edit_json,
    edit_tensor,
    write_checkpoint,
    write_gpt_oss,
    write_tensors,
)

from marlin_cy import get_backend, open_checkpoint, reference
from marlin_cy.activations import ACTIVATIONS
from marlin_cy.checkpoints.families import FAMILIES, MoeSpec, find_moe_layers, read_moe_spec
from marlin_cy.checkpoints.safetensors import SafetensorsFolder
from marlin_cy.errors import CheckpointError, UnsupportedError

SIZES = {"hidden_size": 64, "num_experts_per_tok": 2, "num_hidden_layers": 5}
# One layer with int16 activations is off by some 5e-5; two products and a shared expert, by less than this.
BOUND = 2e-4


def spec_of(model_type, **config):
    return read_moe_spec({**SIZES, **config}, FAMILIES[model_type], "config.json")


class TestConfiguration:
    """Sizes are small; all other keys and values are copied from the models' own files."""

    def test_qwen3(self):
        spec = spec_of("qwen3_moe", num_experts=128, moe_intermediate_size=96, norm_topk_prob=True, hidden_act="silu")
        assert spec == MoeSpec(128, 2, 64, 96)

    def test_qwen2_with_a_shared_expert(self):
        spec = spec_of(
            "qwen2_moe",
            num_experts=60,
            moe_intermediate_size=96,
            shared_expert_intermediate_size=192,
            norm_topk_prob=False,
        )
        assert spec == MoeSpec(60, 2, 64, 96, shared_intermediate_size=192, norm_topk_prob=False)

    def test_qwen3_5_always_normalises(self):
        spec = spec_of("qwen3_5_moe", num_experts=256, moe_intermediate_size=96, shared_expert_intermediate_size=96)
        assert spec == MoeSpec(256, 2, 64, 96, shared_intermediate_size=96)

    def test_qwen3_next(self):
        spec = spec_of("qwen3_next", num_experts=512, moe_intermediate_size=96, shared_expert_intermediate_size=96)
        assert spec == MoeSpec(512, 2, 64, 96, shared_intermediate_size=96)

    def test_mixtral(self):
        assert spec_of("mixtral", num_local_experts=8, intermediate_size=96) == MoeSpec(8, 2, 64, 96)

    def test_deepseek_v2(self):
        config = {
            "n_routed_experts": 160,
            "moe_intermediate_size": 96,
            "n_shared_experts": 2,
            "topk_method": "group_limited_greedy",
            "n_group": 8,
            "topk_group": 3,
            "routed_scaling_factor": 16.0,
            "scoring_func": "softmax",
            "norm_topk_prob": False,
        }
        expected = {"norm_topk_prob": False, "shared_intermediate_size": 192, "routed_scaling_factor": 16.0}
        spec = spec_of("deepseek_v2", **config)
        assert spec == MoeSpec(160, 2, 64, 96, num_groups=8, topk_groups=3, group_score="max", **expected)
        lite = spec_of("deepseek_v2", **config | {"topk_method": "greedy", "n_group": 1, "topk_group": 1})
        assert lite == MoeSpec(160, 2, 64, 96, **expected)

    def test_deepseek_v3(self):
        spec = spec_of(
            "deepseek_v3",
            n_routed_experts=256,
            moe_intermediate_size=96,
            n_shared_experts=1,
            topk_method="noaux_tc",
            n_group=8,
            topk_group=4,
            routed_scaling_factor=2.5,
            scoring_func="sigmoid",
            norm_topk_prob=True,
        )
        assert spec == MoeSpec(
            256,
            2,
            64,
            96,
            shared_intermediate_size=96,
            scoring="sigmoid",
            num_groups=8,
            topk_groups=4,
            group_score="top2_sum",
            routed_scaling_factor=2.5,
        )

    def test_glm4(self):
        spec = spec_of(
            "glm4_moe",
            n_routed_experts=128,
            moe_intermediate_size=96,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.0,
            norm_topk_prob=True,
        )
        assert spec == MoeSpec(128, 2, 64, 96, shared_intermediate_size=96, scoring="sigmoid", group_score="top2_sum")

    def test_gpt_oss(self):
        spec = spec_of("gpt_oss", num_local_experts=32, intermediate_size=96, swiglu_limit=7.0, hidden_act="silu")
        assert spec == MoeSpec(32, 2, 64, 96, activation="swigluoai", scoring="softmax_topk")

    @pytest.mark.parametrize(
        ("hidden_act", "expected"), [("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), (None, "silu")]
    )
    def test_activations(self, hidden_act, expected):
        spec = spec_of("qwen3_moe", num_experts=8, moe_intermediate_size=96, hidden_act=hidden_act)
        assert spec.activation == expected

    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({}, [0, 1, 2, 3, 4]),
            ({"first_k_dense_replace": 2}, [2, 3, 4]),
            ({"decoder_sparse_step": 2}, [1, 3]),
            ({"mlp_only_layers": [0, 3]}, [1, 2, 4]),
            ({"moe_layer_freq": 2}, [0, 2, 4]),
            ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, [2, 4]),
        ],
    )
    def test_which_layers_are_moe_layers(self, config, expected):
        assert find_moe_layers({**SIZES, **config}, 100, "config.json") == expected

    @pytest.mark.parametrize(
        ("model_type", "config", "exception", "message"),
        [
            ("deepseek_v3", {"topk_method": "topk"}, UnsupportedError, "topk_method 'topk', supported: greedy, group_"),
            ("deepseek_v3", {"scoring_func": "softmax"}, UnsupportedError, "scoring_func 'softmax', DeepSeek-V3 has"),
            (
                "deepseek_v3",
                {"n_group": 5},
                CheckpointError,
                "n_group, topk_group: got 5 and 1, expected n_group to divide 8",
            ),
            ("deepseek_v3", {"topk_group": 2}, CheckpointError, "n_group, topk_group: got 1 and 2"),
            ("deepseek_v3", {"n_group": "8"}, CheckpointError, "n_group: got '8', expected int"),
            (
                "deepseek_v3",
                {"routed_scaling_factor": "2"},
                CheckpointError,
                "routed_scaling_factor: got '2', expected a",
            ),
            ("deepseek_v3", {"n_shared_experts": -1}, CheckpointError, "shared expert's width: got -96, expected 0 or"),
            (
                "deepseek_v2",
                {"norm_topk_prob": True},
                UnsupportedError,
                "norm_topk_prob True is not supported for DeepSeek-V2",
            ),
            ("gpt_oss", {"swiglu_limit": 8.0}, UnsupportedError, "swiglu_limit 8.0, only 7.0 is supported"),
            ("gpt_oss", {"swiglu_alpha": 1}, UnsupportedError, "swiglu_alpha 1.0, only 1.702 is supported"),
            ("qwen3_moe", {"hidden_act": "relu"}, UnsupportedError, "hidden_act 'relu', supported: silu, swish, gelu"),
            ("qwen3_moe", {"hidden_act": 3}, CheckpointError, "hidden_act: got 3, expected str"),
        ],
    )
    def test_refused(self, model_type, config, exception, message):
        sizes = {"num_experts": 8, "moe_intermediate_size": 96, "intermediate_size": 96}
        with pytest.raises(exception, match=message):
            spec_of(model_type, **sizes | config)


def run(checkpoint, index, x, **options):
    """A layer's output, and the router's logits that it got."""
    logits = x @ checkpoint.router_weight(index).astype(np.float32).T
    if checkpoint.router_bias(index) is not None:
        logits += checkpoint.router_bias(index).astype(np.float32)
    layer = checkpoint.moe_layer(index, **options)
    return layer, layer(get_backend("cpu").new_context(), x, logits), logits


def dense_mlp(x, gate, up, down):
    return ACTIVATIONS["silu"].reference(x @ gate, x @ up) @ down


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_a_folder_of_each_family(tmp_path, rng, model_type):
    family = FAMILIES[model_type]
    shared = 96 if family.shared_expert else None
    weights = write_checkpoint(
        tmp_path, model_type=model_type, num_experts=4, group_size=32, inter=96, shared=shared, expert_bias=True, seed=3
    )
    x = rng.standard_normal((5, 64)).astype(np.float32)
    with open_checkpoint(tmp_path) as checkpoint:
        assert (checkpoint.moe_layers, checkpoint.dense_moe_layers) == ([0, 1], [])
        layer, out, logits = run(checkpoint, 1, x)
        alone = run(checkpoint, 1, x, shared_expert=False)[1]
        block = checkpoint.moe_block(1)
        names = [f"{block}.experts.{expert}" for expert in range(4)]
        bias = {
            part: np.stack([checkpoint.tensor(f"{name}.{part}.bias").astype(np.float64) for name in names])
            for part in (family.gate, family.up, family.down)
        }
        ids, topk_weights = reference.route(logits, layer.routing)
        expected = reference.moe_layer(
            x,
            [
                np.concatenate([weights[f"{name}.{family.gate}"], weights[f"{name}.{family.up}"]], axis=1)
                for name in names
            ],
            [weights[f"{name}.{family.down}"] for name in names],
            ids,
            topk_weights,
            gate_up_bias=np.concatenate([bias[family.gate], bias[family.up]], axis=1),
            down_bias=bias[family.down],
        )
        assert relative_error(alone, expected) < BOUND
        if shared:
            module = f"{block}.{family.shared_expert}"
            added = dense_mlp(x, *(weights[f"{module}.{part}"] for part in (family.gate, family.up, family.down)))
            if family.shared_gate:
                gate = checkpoint.tensor(f"{block}.{family.shared_gate}.weight").astype(np.float64)[0]
                added = added / (1 + np.exp(-(x @ gate)))[:, None]
            expected = expected + added
        assert relative_error(out, expected) < BOUND
        if family.scoring == "sigmoid":
            np.testing.assert_array_equal(layer.routing.correction_bias, checkpoint.correction_bias(1))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_folder_of_each_method(tmp_path, backend, rng, method):
    """Zero points are 0 to 15, and bfloat16 scales are rounded as written."""
    weights = write_checkpoint(tmp_path, method=method, group_size=32, checkpoint_format="gptq_v2", seed=8)
    with open_checkpoint(tmp_path, backend=backend) as checkpoint:
        assert checkpoint.format == method
        assert checkpoint.linears == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
        layer = checkpoint.moe_layer(1)
        linear = checkpoint.linear(checkpoint.linears[0])
    ctx, stored = backend.new_context(), np.eye(64, dtype=np.float32)
    tolerance = 2.0**-8 if method == "compressed-tensors" else BOUND  # the scales were rounded to bfloat16
    for expert in range(3):
        names = [f"model.layers.1.mlp.experts.{expert}.{part}_proj" for part in ("gate", "up")]
        out = backend.empty((64, 192), np.float32)
        layer.gate_up.gemm_phase_batched(ctx, backend.from_host(stored), [(expert, 0, 0, 64)], out, 64)
        expected = np.concatenate([weights[name] for name in names], axis=1)
        assert relative_error(backend.to_host(out), expected) < tolerance
    out = backend.empty((64, 32), np.float32)
    linear.forward(ctx, backend.from_host(stored), out, 64)
    bias = np.asarray(SafetensorsFolder(tmp_path).tensor("model.layers.0.self_attn.q_proj.bias"), np.float64)
    assert relative_error(backend.to_host(out), weights["model.layers.0.self_attn.q_proj"] + bias) < tolerance


def test_experts_in_one_tensor(tmp_path, rng):
    """compressed-tensors with all experts of a layer in one tensor, gate before up."""
    write_checkpoint(tmp_path / "single", method="compressed-tensors", group_size=32, checkpoint_format="gptq_v2")
    tensors, fused = SafetensorsFolder(tmp_path / "single"), {}
    for name in tensors.names:
        if ".experts." not in name:
            fused[name] = tensors.tensor(name)
    for layer in range(2):
        block = f"model.layers.{layer}.mlp.experts"
        for suffix in ("weight_packed", "weight_scale", "weight_zero_point"):
            parts = {
                part: np.stack([tensors.tensor(f"{block}.{expert}.{part}_proj.{suffix}") for expert in range(3)])
                for part in ("gate", "up", "down")
            }
            fused[f"{block}.gate_up_proj.{suffix}"] = np.concatenate([parts["gate"], parts["up"]], axis=1)
            fused[f"{block}.down_proj.{suffix}"] = parts["down"]
    (tmp_path / "fused").mkdir()
    shutil.copyfile(tmp_path / "single" / "config.json", tmp_path / "fused" / "config.json")
    write_tensors(tmp_path / "fused", fused)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    with open_checkpoint(tmp_path / "single") as single, open_checkpoint(tmp_path / "fused") as checkpoint:
        assert checkpoint.expert_bytes(1) == single.expert_bytes(1) - 9 * 16  # the weight_shapes
        np.testing.assert_array_equal(run(checkpoint, 1, x)[1], run(single, 1, x)[1])


@pytest.mark.parametrize("inter", [96, 32])
def test_gpt_oss_folder(tmp_path, rng, inter):
    """With 32, both biases have 64 numbers, and only one has gate and up in turn."""
    weights = write_gpt_oss(tmp_path, inter=inter, seed=5)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    with open_checkpoint(tmp_path) as checkpoint:
        layer, out, logits = run(checkpoint, 0, x)
    experts = "model.layers.0.mlp.experts"

    def in_order(array):
        return np.concatenate([array[..., 0::2], array[..., 1::2]], axis=-1)

    ids, topk_weights = reference.route(logits, layer.routing)
    expected = reference.moe_layer(
        x,
        list(in_order(weights[f"{experts}.gate_up_proj"])),
        list(weights[f"{experts}.down_proj"]),
        ids,
        topk_weights,
        activation="swigluoai",
        gate_up_bias=in_order(weights[f"{experts}.gate_up_proj_bias"]),
        down_bias=weights[f"{experts}.down_proj_bias"],
    )
    assert relative_error(out, expected) < BOUND


@pytest.mark.parametrize("prefix", ["model.language_model.layers", "language_model.model.layers"])
def test_language_model_inside_another(tmp_path, prefix):
    weights = write_checkpoint(tmp_path, model_type="qwen3_5_moe_text", prefix=prefix)
    edit_json(tmp_path, "config.json", model_type="qwen3_5_moe")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.moe_block(1) == f"{prefix}.1.mlp"
        assert checkpoint.moe_layer(1).num_experts == 3
        assert checkpoint.linears == [f"{prefix}.{layer}.self_attn.q_proj" for layer in range(2)]
        assert f"{prefix}.1.mlp.experts.0.up_proj" in weights


class TestMixtures:
    def test_layers_that_are_not_quantised(self, tmp_path):
        write_checkpoint(tmp_path, layers=3, dense_layers=(1,))
        with open_checkpoint(tmp_path) as checkpoint:
            assert (checkpoint.moe_layers, checkpoint.dense_moe_layers) == ([0, 2], [1])
            with pytest.raises(IndexError, match=r"layer: got 1, expected one of the MoE layers: \[0, 2\]"):
                checkpoint.moe_layer(1)
            assert "model.layers.1.mlp.experts.0.up_proj.weight" not in checkpoint.quantized_tensors
            assert "model.layers.2.mlp.experts.0.up_proj.qweight" in checkpoint.quantized_tensors

    def test_a_matrix_with_a_part_of_its_tensors(self, tmp_path):
        """A dense weight beside it does not make it dense; ``test_widening.py`` has matrices that are dense."""
        write_checkpoint(tmp_path, dense_layers=(1,))
        name = "model.layers.1.mlp.experts.2.up_proj"
        edit_tensor(tmp_path, f"{name}.qweight", lambda _: np.zeros((8, 96), np.int32))
        with pytest.raises(CheckpointError, match=rf"{name}.scales': missing"):
            open_checkpoint(tmp_path)

    def test_shared_expert_that_is_not(self, tmp_path, rng):
        write_checkpoint(tmp_path, model_type="qwen2_moe", shared=96)
        for layer in range(2):
            name = f"model.layers.{layer}.mlp.shared_expert.up_proj"
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                edit_tensor(tmp_path, f"{name}.{part}", lambda _: None)
            edit_tensor(tmp_path, f"{name}.weight", lambda _: np.zeros((96, 64), np.float16))
        with open_checkpoint(tmp_path) as checkpoint:
            with pytest.raises(UnsupportedError, match=r"shared_expert\.up_proj is not quantised; load the layer with"):
                checkpoint.moe_layer(0)
            assert checkpoint.moe_layer(0, shared_expert=False).shared_expert is None

    def test_shared_expert_of_another_width(self, tmp_path):
        write_checkpoint(tmp_path, model_type="qwen2_moe", shared=96)
        edit_json(tmp_path, "config.json", shared_expert_intermediate_size=64)
        with (
            open_checkpoint(tmp_path) as checkpoint,
            pytest.raises(CheckpointError, match=r"gate_proj: got 64 to 96 features, expected 64 to 64 by"),
        ):
            checkpoint.moe_layer(0)

    def test_correction_bias_of_another_length(self, tmp_path):
        write_checkpoint(tmp_path, model_type="glm4_moe")
        name = "model.layers.0.mlp.gate.e_score_correction_bias"
        edit_tensor(tmp_path, name, lambda bias: bias[:-1])
        with (
            open_checkpoint(tmp_path) as checkpoint,
            pytest.raises(CheckpointError, match=rf"{name}': got F32 \(2,\), expected F32 \(3,\)"),
        ):
            checkpoint.moe_layer(0)

    def test_correction_bias_that_is_not_finite(self, tmp_path):
        write_checkpoint(tmp_path, model_type="glm4_moe")
        name = "model.layers.0.mlp.gate.e_score_correction_bias"
        edit_tensor(tmp_path, name, lambda bias: bias * np.nan)
        with (
            open_checkpoint(tmp_path) as checkpoint,
            pytest.raises(CheckpointError, match=rf"{name}': correction_bias: got"),
        ):
            checkpoint.moe_layer(0)

    def test_more_choices_than_the_groups_have(self, tmp_path):
        write_checkpoint(tmp_path, model_type="deepseek_v3", num_experts=4, group_size=32)
        edit_json(tmp_path, "config.json", num_experts_per_tok=3)
        with pytest.raises(
            CheckpointError, match=r"config\.json: top_k: got 3, expected at most 2, the number of experts in 1 groups"
        ):
            open_checkpoint(tmp_path)

    def test_names_that_no_family_has(self, tmp_path):
        write_checkpoint(tmp_path, model_type="mixtral")
        edit_json(tmp_path, "config.json", model_type="qwen3_moe", moe_intermediate_size=96)
        with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.mlp\.experts\.0\.gate_proj\.qweight': missing"):
            open_checkpoint(tmp_path)
