"""The reference layer, compared with the blocks of transformers."""

import importlib

import numpy as np
import pytest
from asserts import assert_close

import marlin_cy
from marlin_cy import reference


def dense(tensor):
    """A weight that transformers keeps as ``[out, in]`` (of each expert), float64, the other way around."""
    return np.swapaxes(tensor.detach().numpy().astype(np.float64), -1, -2)


class TestTransformers:
    """The reference computes the same as the blocks of transformers with the same weights and routers."""

    @pytest.fixture
    def block(self, rng):
        """``block(module, class, config, options)``: one with random weights."""
        torch = pytest.importorskip("torch")
        pytest.importorskip("transformers")

        def make(folder, name, config_name, **options):
            module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
            config_module = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
            sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_experts_per_tok": 2}
            config = getattr(config_module, config_name)(**sizes, **options)
            config._experts_implementation = "eager"
            made = getattr(module, name)(config)
            with torch.no_grad():
                for values in (*made.parameters(), *made.buffers()):
                    values.copy_(torch.from_numpy(rng.standard_normal(values.shape) / 4))
            return made

        return make

    def check(self, block, rng, logits, routing, gate_up, down, **options):
        """Compare the reference with a block's output; ``logits(x)`` returns the logits of the block's router."""
        import torch

        x = rng.standard_normal((1, 30, 32)).astype(np.float32)
        with torch.no_grad():
            output = block(torch.from_numpy(x))
        actual = (output[0] if isinstance(output, tuple) else output).numpy().reshape(30, -1)
        x = x[0]
        shared = options.pop("shared", None)
        if shared is not None:
            shared = reference.shared_expert(x, **shared)
        ids, weights = reference.route(logits(x), routing)
        expected = reference.moe_layer(x, gate_up, down, ids, weights, shared=shared, **options)
        assert_close(actual, expected, 1e-5 * np.abs(expected).max())

    def shared(self, mlp, **options):
        gate_up = np.concatenate([dense(mlp.gate_proj.weight), dense(mlp.up_proj.weight)], axis=1)
        return {"gate_up": gate_up, "down": dense(mlp.down_proj.weight), **options}

    @pytest.mark.parametrize(("name", "hidden_act"), [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_new")])
    def test_mixtral(self, block, rng, name, hidden_act):
        sizes = {"num_local_experts": 6, "intermediate_size": 48, "hidden_act": hidden_act}
        made = block("mixtral", "MixtralSparseMoeBlock", "MixtralConfig", **sizes)
        experts = made.experts
        self.check(
            made,
            rng,
            lambda x: x @ dense(made.gate.weight),
            marlin_cy.Routing(6, 2),
            dense(experts.gate_up_proj),
            dense(experts.down_proj),
            activation=name,
        )

    def test_qwen2(self, block, rng):
        """A shared expert with a gate."""
        sizes = {"num_experts": 6, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80}
        made = block("qwen2_moe", "Qwen2MoeSparseMoeBlock", "Qwen2MoeConfig", norm_topk_prob=False, **sizes)
        self.check(
            made,
            rng,
            lambda x: x @ dense(made.gate.weight),
            marlin_cy.Routing(6, 2, norm_topk_prob=False),
            dense(made.experts.gate_up_proj),
            dense(made.experts.down_proj),
            shared=self.shared(made.shared_expert, gate_weight=dense(made.shared_expert_gate.weight)[:, 0]),
        )

    def test_deepseek_v3(self, block, rng):
        """A shared expert without a gate, and a bias that is no part of the weights."""
        sizes = {
            "n_routed_experts": 8,
            "moe_intermediate_size": 48,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
        }
        made = block("deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config", routed_scaling_factor=2.5, **sizes)
        routing = marlin_cy.Routing(
            8,
            2,
            scoring="sigmoid",
            correction_bias=made.gate.e_score_correction_bias.numpy(),
            num_groups=4,
            topk_groups=2,
            group_score="top2_sum",
            routed_scaling_factor=2.5,
        )
        self.check(
            made,
            rng,
            lambda x: x @ dense(made.gate.weight),
            routing,
            dense(made.experts.gate_up_proj),
            dense(made.experts.down_proj),
            shared=self.shared(made.shared_experts),
        )

    def test_gpt_oss(self, block, rng):
        """Biases, and gates beyond 7. gpt-oss interleaves gates and ups."""
        made = block("gpt_oss", "GptOssMLP", "GptOssConfig", num_local_experts=6, intermediate_size=48)
        experts = made.experts
        in_halves = np.concatenate([np.arange(0, 96, 2), np.arange(1, 96, 2)])
        made.experts.gate_up_proj.data *= 4
        self.check(
            made,
            rng,
            lambda x: x @ dense(made.router.weight) + made.router.bias.detach().numpy(),
            marlin_cy.Routing(6, 2, scoring="softmax_topk"),
            experts.gate_up_proj.detach().numpy().astype(np.float64)[:, :, in_halves],
            experts.down_proj.detach().numpy().astype(np.float64),
            activation="swigluoai",
            gate_up_bias=experts.gate_up_proj_bias.detach().numpy()[:, in_halves],
            down_bias=experts.down_proj_bias.detach().numpy(),
        )

    def test_llama4(self, block, rng):
        """Weights on the input."""
        sizes = {"num_local_experts": 6, "intermediate_size": 48}
        made = block("llama4", "Llama4TextMoe", "Llama4TextConfig", **sizes)
        made.top_k = made.router.top_k = 1
        self.check(
            made,
            rng,
            lambda x: x @ dense(made.router.weight),
            marlin_cy.Routing(6, 1, scoring="sigmoid", norm_topk_prob=False),
            made.experts.gate_up_proj.detach().numpy().astype(np.float64),
            made.experts.down_proj.detach().numpy().astype(np.float64),
            apply_router_weight_on_input=True,
            shared=self.shared(made.shared_expert),
        )
