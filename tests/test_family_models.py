"""Every family's tiny model: by transformers with packed layers, and each MoE layer by itself.

The references are transformers' own classes with the same rounded weights, dense.
"""

import functools

import numpy as np
import pytest
from asserts import relative_error
from checkpoint_files import edit_tensor

from marlin_cy import open_checkpoint
from marlin_cy.decoder.architecture import ARCHITECTURES, MISSING
from marlin_cy.decoder.config import read_decoder_config
from marlin_cy.decoder.load import load_model
from marlin_cy.errors import CheckpointError, UnsupportedError

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

import family_models  # noqa: E402
from family_models import CONFIGS, write_family  # noqa: E402
from language_models import load_reference  # noqa: E402

from marlin_cy.integrations.configs import describe_of  # noqa: E402
from marlin_cy.integrations.expert_modules import check_experts  # noqa: E402
from marlin_cy.integrations.transformers import load  # noqa: E402

RELATIVE_ERROR = 5e-4
"""Products are off by 5e-5 or less (asserts.gemm_bound), and a network of a few layers hands on what it gets."""

TOKENS = torch.randint(1, 80, (1, 12), generator=torch.Generator().manual_seed(1))

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """``family(model_type)``: the folder of its quantised model, and the same weights dense by transformers."""

    @functools.cache
    def written(model_type):
        quantised, dense = write_family(tmp_path_factory.mktemp(model_type), model_type)
        return quantised, load_reference(dense)

    return written


def blocks_of(model):
    """``{layer: (module, block)}``: the smallest module around each layer's experts that routes."""
    found = {}
    for path, module in model.named_modules():
        if path.endswith(".experts") and (hasattr(module, "down_proj")):
            block = path.removesuffix(".experts")
            layer = next(int(part) for part in reversed(block.split(".")) if part.isdecimal())
            found[layer] = model.get_submodule(block)
    return found


def error_of(actual, expected):
    return relative_error(actual.double().numpy(), expected.double().numpy())


@pytest.mark.parametrize("model_type", CONFIGS)
def test_by_transformers(family, model_type):
    quantised, reference = family(model_type)
    expected = reference(TOKENS).logits
    assert expected.std() > 0.05
    model = load(quantised, num_threads=1)
    assert error_of(model(TOKENS).logits, expected) < RELATIVE_ERROR


def reference_layer(model_type, block, x):
    """The output of a block's routed experts and shared expert."""
    if model_type == "gemma4_text":  # the block is the whole layer
        _, weights, ids = block.router(x)
        return block.experts(x, ids, weights)
    result = block(x[None])
    return (result[0] if isinstance(result, tuple) else result).reshape(x.shape)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_each_layer(family, model_type):
    """Routing, experts and shared expert of each MoE layer."""
    quantised, reference = family(model_type)
    blocks = blocks_of(reference)
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(2))
    with open_checkpoint(quantised, num_threads=1) as checkpoint:
        assert checkpoint.moe_layers == sorted(blocks)
        compared = 0
        ctx = checkpoint.backend.new_context(num_threads=1)
        for index, block in blocks.items():
            if hasattr(getattr(block, "gate", None), "tid2eid"):
                with pytest.raises(CheckpointError, match=r"gate\.tid2eid': unknown for DeepSeek-V4"):
                    checkpoint.moe_layer(index)
                continue
            layer = checkpoint.moe_layer(index)
            found = layer(ctx, x.numpy(), checkpoint.router_logits(index, x.numpy()))
            expected = reference_layer(model_type, block, x)
            assert relative_error(found, expected.double().numpy()) < RELATIVE_ERROR
            compared += 1
    assert compared


@pytest.mark.parametrize("model_type", family_models.WITHOUT_A_ROW)
def test_a_family_without_a_row(tmp_path, model_type):
    """Transformers' class and its conversion table say what a whole model needs. Only routing is not known."""
    quantised, dense = write_family(tmp_path, model_type)
    expected = load_reference(dense)(TOKENS).logits
    assert error_of(load(quantised, num_threads=1)(TOKENS).logits, expected) < RELATIVE_ERROR
    with pytest.raises(UnsupportedError, match=f"model_type '{model_type}', supported: qwen2_moe, "):
        open_checkpoint(quantised)
    with (
        open_checkpoint(quantised, describe=describe_of(quantised)) as checkpoint,
        pytest.raises(UnsupportedError, match=r"the routing of \w+ForCausalLM is not known: use Checkpoint\.experts"),
    ):
        checkpoint.moe_layer(1)


class OverriddenGate(torch.nn.Module):
    """Experts as transformers' decorator leaves them, with a gate of their own."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate.clamp(max=15)) * up


def test_gate_that_a_class_overrides():
    """Clamps that a family's row does not name are found, although no tensor shows them."""
    with pytest.raises(UnsupportedError, match="x: OverriddenGate computes another activation than 'silu'"):
        check_experts("x", OverriddenGate(), "silu")
    module = OverriddenGate()
    module._apply_gate = lambda gate_up: torch.nn.functional.silu(gate_up.chunk(2, -1)[0]) * gate_up.chunk(2, -1)[1]
    check_experts("x", module, "silu")
    module.has_post_expert_norm = True
    with pytest.raises(UnsupportedError, match="x: experts with a norm are not supported"):
        check_experts("x", module, "silu")


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("minimax_m2", "block_sparse_moe.gate.e_score_correction_bias"),
        ("olmoe", "mlp.gate.e_score_correction_bias"),
        ("olmoe", "mlp.shared_expert.up_proj.weight"),
        ("hy_v3", "mlp.experts.8.up_proj.qweight"),
    ],
)
def test_tensors_that_a_layer_would_not_use(tmp_path, model_type, name):
    quantised, _ = write_family(tmp_path, model_type)
    edit_tensor(quantised, f"model.layers.1.{name}", lambda _: np.ones(8, np.float32))
    with open_checkpoint(quantised) as checkpoint:
        for shared_expert in (True, False):
            with pytest.raises(CheckpointError, match=rf"{name}': unknown for .*: the layer would not use it"):
                checkpoint.moe_layer(1, shared_expert=shared_expert)
        assert [name in str(problem) for problem in checkpoint.problems(layers=True)] == [True]
        assert not checkpoint.problems()


def test_correction_bias_that_is_missing(tmp_path):
    quantised, _ = write_family(tmp_path, "minimax_m2")
    edit_tensor(quantised, "model.layers.0.block_sparse_moe.e_score_correction_bias", lambda _: None)
    message = r"block_sparse_moe\.e_score_correction_bias': missing"
    with open_checkpoint(quantised) as checkpoint, pytest.raises(CheckpointError, match=message):
        checkpoint.moe_layer(0)


# ---------------------------------------------------------------------------------------------
# The decoder

DECODED = [model_type for model_type in CONFIGS if model_type in ARCHITECTURES]


@pytest.mark.parametrize("model_type", DECODED)
def test_by_the_decoder(family, model_type):
    quantised, reference = family(model_type)
    expected = reference(TOKENS).logits[0].double().numpy()
    model = load_model(quantised, num_threads=1, cache_dtype="float32")
    assert relative_error(model.forward(TOKENS[0].numpy(), all_logits=True), expected) < RELATIVE_ERROR


@pytest.mark.parametrize("model_type", [model_type for model_type in CONFIGS if model_type not in ARCHITECTURES])
def test_what_the_decoder_lacks(tmp_path, model_type):
    config = family_models.new_config(model_type).to_dict()
    with pytest.raises(UnsupportedError, match=f"model_type '{model_type}': the decoder lacks {MISSING[model_type]}"):
        read_decoder_config(config, "config.json")


@pytest.mark.parametrize("name", ["self_attn.q_norm.weight", "self_attn.sinks", "post_feedforward_layernorm.weight"])
def test_tensors_that_the_decoder_would_not_use(tmp_path, name):
    """A model with further norms is another model."""
    quantised, _ = write_family(tmp_path, "solar_open")
    edit_tensor(quantised, f"model.layers.1.{name}", lambda _: np.ones(16, np.float32))
    with pytest.raises(CheckpointError, match=f"{name}': the decoder would not use it"):
        load_model(quantised, num_threads=1)


# ---------------------------------------------------------------------------------------------
# Names

FAMILIES_OF_TWO_NAMES = [
    "minimax_m2",
    "laguna",
    "exaone_moe",
    "hy_v3",
    "lfm2_moe",
    "ernie4_5_moe",
    "kimi_linear",
    "bailing_hybrid",
    "phimoe",
    "deepseek_v4",
    "nemotron_h",
]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("model_type", FAMILIES_OF_TWO_NAMES)
def test_names_of_modules(tmp_path, model_type):
    """The names of transformers' modules, which llm-compressor and GPTQModel write, mean the same."""
    quantised, dense = write_family(tmp_path, model_type, module_names=True, method="compressed-tensors")
    reference = load_reference(dense)
    assert error_of(load(quantised, num_threads=1)(TOKENS).logits, reference(TOKENS).logits) < RELATIVE_ERROR
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(2))
    index, block = max(blocks_of(reference).items())
    with open_checkpoint(quantised, num_threads=1) as checkpoint:
        layer, ctx = checkpoint.moe_layer(index), checkpoint.backend.new_context(num_threads=1)
        found = layer(ctx, x.numpy(), checkpoint.router_logits(index, x.numpy()))
    assert relative_error(found, reference_layer(model_type, block, x).double().numpy()) < RELATIVE_ERROR
