"""Faults that users of other programs reported, each with the right outcome. Every fault stands for its kind."""

import json
import re

import numpy as np
import pytest
from asserts import relative_error
from checkpoint_files import edit_json, edit_tensor

from marlin_cy import open_checkpoint
from marlin_cy.cli import main
from marlin_cy.errors import CheckpointError, UnsupportedError

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

from family_models import QUANTIZATIONS, write_family  # noqa: E402
from language_models import load_reference, save_tensors  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from marlin_cy.checkpoints.packed_writer import write_packed  # noqa: E402
from marlin_cy.decoder.build import build_plan  # noqa: E402
from marlin_cy.decoder.reference import reference_logits  # noqa: E402
from marlin_cy.integrations.transformers import load  # noqa: E402

RELATIVE_ERROR = 5e-4
TOKENS = np.random.default_rng(1).integers(1, 80, 12)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def assert_right(quantised, dense):
    """Logits by load() and by the decoder's plan are those of the same rounded weights, dense."""
    tokens = torch.from_numpy(TOKENS)[None]
    expected = load_reference(dense)(tokens).logits[0].double().numpy()
    assert relative_error(load(quantised, num_threads=1)(tokens).logits[0].double().numpy(), expected) < RELATIVE_ERROR
    with open_checkpoint(quantised, num_threads=1) as checkpoint:
        assert relative_error(reference_logits(build_plan(checkpoint), TOKENS), expected) < 1e-5


def change_tensors(folder, change):
    """Replace the tensors of a folder by ``change(tensors)``."""
    save_tensors(folder, change(load_file(folder / "model.safetensors")))


# ---------------------------------------------------------------------------------------------
# Quantised tensors of what is not a plain linear layer


def test_quantised_routers(tmp_path):
    quantised, dense = write_family(tmp_path, "qwen3_moe", also=[r"mlp\.gate\.weight$"])
    assert_right(quantised, dense)
    with open_checkpoint(quantised) as checkpoint:
        weight = checkpoint.router_weight(0)
        np.testing.assert_array_equal(weight, load_file(dense / "model.safetensors")["model.layers.0.mlp.gate.weight"])
        assert checkpoint.moe_layer(0).num_experts == 8


@pytest.mark.parametrize("also", ["embed_tokens", "lm_head"])
def test_quantised_embedding_or_head(tmp_path, also):
    quantised, dense = write_family(tmp_path, "qwen3_moe", also=[also])
    assert_right(quantised, dense)


def test_quantised_head_of_a_tied_model(tmp_path):
    """The files have a head of their own, whatever ``tie_word_embeddings`` says."""
    quantised, dense = write_family(tmp_path, "qwen3_moe", also=["lm_head"])
    edit_json(quantised, "config.json", tie_word_embeddings=True)
    assert_right(quantised, dense)


@pytest.mark.parametrize("equal", [True, False])
def test_dense_head_of_a_tied_model(tmp_path, equal):
    """A head that differs from the embedding is used."""
    quantised, dense = write_family(tmp_path, "qwen3_moe")
    for folder in (quantised, dense):
        edit_json(folder, "config.json", tie_word_embeddings=True)
        if equal:
            change_tensors(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    assert_right(quantised, dense)


# ---------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
def test_mixtral_under_the_names_of_llm_compressor(tmp_path, method):
    def new_name(name):
        name = name.replace("block_sparse_moe", "mlp")
        for old, new in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            name = re.sub(rf"(experts\.\d+\.){old}\b", rf"\1{new}", name)
        return name

    assert_right(*write_family(tmp_path, "mixtral", method=method, rename=new_name))


@pytest.mark.parametrize("told", ["by its tensors", "by the config"])
def test_layers_that_predict_further_tokens(tmp_path, told):
    quantised, dense = write_family(tmp_path, "glm4_moe")

    def with_layer(tensors):
        last = {name.replace(".1.", ".2."): t.clone() for name, t in tensors.items() if "layers.1." in name}
        more = {"model.layers.2.eh_proj.weight": torch.ones(64, 128)} if told == "by its tensors" else {}
        return tensors | last | more

    change_tensors(quantised, with_layer)
    if told == "by the config":
        edit_json(quantised, "config.json", num_nextn_predict_layers=1)
    assert_right(quantised, dense)
    with open_checkpoint(quantised) as checkpoint:
        assert checkpoint.prediction_layers == [2]
        assert checkpoint.moe_layers == [1]


def test_layers_beyond_the_last(tmp_path):
    """A config with too few layers must not give a shorter model."""
    quantised, _ = write_family(tmp_path, "qwen3_moe")
    edit_json(quantised, "config.json", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"layers\.1\..*num_hidden_layers is 1, and the layer does not predict"):
        open_checkpoint(quantised)


# ---------------------------------------------------------------------------------------------
# Parts that are not quantised, tensors without a meaning, defaults


def test_shared_expert_that_is_not_quantised(tmp_path, capsys, quick_bandwidth):
    quantised, dense = write_family(tmp_path, "qwen3_5_moe_text", method="compressed-tensors", kept=["shared_expert"])
    assert_right(quantised, dense)
    with open_checkpoint(quantised) as checkpoint:
        write_packed(checkpoint, tmp_path / "packed")
    for folder in (quantised, tmp_path / "packed"):
        assert main(["run", str(folder), "--tokens", "2", "--repeat", "1", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["without_shared_expert"] == [0, 1]
        assert main(["run", str(folder), "--tokens", "2", "--repeat", "1"]) == 0
        assert "Routed experts only, as the shared expert is not quantised: layers 0-1" in capsys.readouterr().out
        assert main(["inspect", str(folder)]) == 0
        assert "shared experts that are not quantised, which `run` leaves out: layers 0-1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["self_attn.k_scale", "self_attn.v_scale", "self_attn.k_proj.output_scale", "self_attn.q_proj.input_scale"]
)
def test_scales_of_a_quantised_cache(tmp_path, name):
    quantised, dense = write_family(tmp_path, "qwen3_moe", method="compressed-tensors")
    edit_tensor(quantised, f"model.layers.1.{name}", lambda _: np.array([0.02], np.float32))
    assert_right(quantised, dense)


@pytest.mark.parametrize(
    "more", [{"backend": "auto_round:gptq:exllamav2"}, {"backend": "auto_round:gptq"}, {}, {"backend": "auto"}]
)
def test_auto_round_without_packing_format(tmp_path, more):
    quantised, dense = write_family(tmp_path, "qwen3_moe")
    old = {"quant_method": "intel/auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}
    edit_json(quantised, "config.json", quantization_config=old | more)
    assert_right(quantised, dense)


# ---------------------------------------------------------------------------------------------
# Other formats, and contradictions


def test_g_idx_of_zeros(tmp_path):
    """With ``desc_act`` false, row k is in group ``k // group_size``."""
    quantised, dense = write_family(tmp_path, "qwen3_moe")
    change_tensors(quantised, lambda t: {n: torch.zeros_like(x) if "g_idx" in n else x for n, x in t.items()})
    assert_right(quantised, dense)


@pytest.fixture
def int8_attention(tmp_path):
    """``(quantised, dense)``: 4-bit experts, and attention in plain int8 with a scale for each output."""
    quantised, dense = write_family(tmp_path, "qwen3_moe", method="compressed-tensors", kept=["self_attn"])
    stored, rounded = load_file(quantised / "model.safetensors"), load_file(dense / "model.safetensors")
    for name in [name for name in stored if re.search(r"self_attn\.\w_proj\.weight$", name)]:
        scale = (stored[name].abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
        stored[name] = (stored[name] / scale.float()).round().clamp(-127, 127).to(torch.int8)
        stored[f"{name}_scale"] = scale
        rounded[name] = stored[name].float() * scale.float()
    save_tensors(quantised, stored)
    save_tensors(dense, rounded)
    experts = QUANTIZATIONS["compressed-tensors"]["config_groups"]["group_0"]["weights"]
    eight = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
    groups = {
        "group_0": {"targets": ["re:.*mlp.experts.*"], "format": "pack-quantized", "weights": experts},
        "group_1": {"targets": ["re:.*self_attn.*"], "format": "int-quantized", "weights": eight},
    }
    edit_json(
        quantised,
        "config.json",
        quantization_config__format="mixed-precision",
        quantization_config__config_groups=groups,
    )
    return quantised, dense


def test_attention_of_8_bits(int8_attention, tmp_path, capsys):
    """Integers beside a scale; ``test_float8.py`` has FP8."""
    quantised, dense = int8_attention
    assert_right(quantised, dense)
    with open_checkpoint(quantised) as checkpoint:
        write_packed(checkpoint, tmp_path / "packed")
    assert_right(tmp_path / "packed", dense)
    assert main(["inspect", str(quantised), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["refused"] == []
    assert "8 linear layers in int8: scales by channel 8" in report["unusual"]


def test_attention_of_8_bits_with_zero_points(int8_attention, capsys):
    quantised, _ = int8_attention
    change_tensors(
        quantised,
        lambda t: (
            t | {n.replace("_scale", "_zero_point"): torch.ones_like(t[n]) for n in t if "attn" in n and "_scale" in n}
        ),
    )
    message = r"layers\.0\.self_attn\.k_proj: format 'int-quantized', supported: pack-quantized"
    with pytest.raises(UnsupportedError, match=message):
        load(quantised)
    assert main(["inspect", str(quantised), "--json"]) == 0
    refused = json.loads(capsys.readouterr().out)["refused"]
    assert len(refused) == 8
    assert re.search(message, refused[0])
    assert main(["inspect", str(quantised)]) == 0
    assert "format 'int-quantized'" in capsys.readouterr().out


def test_git_lfs_pointer(tmp_path):
    quantised, _ = write_family(tmp_path, "qwen3_moe")
    (quantised / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a Git LFS pointer: .*git lfs pull"):
        open_checkpoint(quantised)
