"""Every family's tiny model: by transformers with packed layers, and each MoE layer by itself.

The references are transformers' own classes with the same rounded weights, dense.
"""

import pytest
from asserts import relative_error

from marlin_cy import open_checkpoint
from marlin_cy.errors import CheckpointError

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

from family_models import CONFIGS, class_of, write_family  # noqa: E402

from marlin_cy.integrations.transformers import load  # noqa: E402

RELATIVE_ERROR = 5e-4
"""Products are off by 5e-5 or less (asserts.gemm_bound), and a network of a few layers hands on what it gets."""

TOKENS = torch.randint(1, 80, (1, 12), generator=torch.Generator().manual_seed(1))

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def reference_of(dense):
    config = transformers.AutoConfig.from_pretrained(dense)
    model = class_of(config).from_pretrained(dense, dtype=torch.float32, experts_implementation="eager")
    return model.eval()


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
def test_by_transformers(tmp_path, model_type):
    quantised, dense = write_family(tmp_path, model_type)
    expected = reference_of(dense)(TOKENS).logits
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
def test_each_layer(tmp_path, model_type):
    """Routing, experts and shared expert of each MoE layer."""
    quantised, dense = write_family(tmp_path, model_type)
    blocks = blocks_of(reference_of(dense))
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
    reference = reference_of(dense)
    assert error_of(load(quantised, num_threads=1)(TOKENS).logits, reference(TOKENS).logits) < RELATIVE_ERROR
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(2))
    index, block = max(blocks_of(reference).items())
    with open_checkpoint(quantised, num_threads=1) as checkpoint:
        layer, ctx = checkpoint.moe_layer(index), checkpoint.backend.new_context(num_threads=1)
        found = layer(ctx, x.numpy(), checkpoint.router_logits(index, x.numpy()))
    assert relative_error(found, reference_layer(model_type, block, x).double().numpy()) < RELATIVE_ERROR
