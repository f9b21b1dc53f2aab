"""DeepSeek-V4's own checkpoints: experts of 4-bit floats with scales of 8-bit exponents, and all else in FP8."""

import json
import re

import numpy as np
import pytest
from asserts import relative_error
from checkpoint_files import edit_json

from marlin_cy import open_checkpoint
from marlin_cy.checkpoints.packed_writer import write_packed
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats.registry import read_scheme

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

from family_models import new_model  # noqa: E402
from float8_files import to_float8  # noqa: E402
from language_models import load_reference, round_to_mxfp4, save_tensors  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from marlin_cy.integrations.transformers import load  # noqa: E402

QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [16, 8],
}
TOKENS = torch.randint(1, 80, (1, 12), generator=torch.Generator().manual_seed(1))
EXPERT = re.compile(r"experts\.\d+\.w\d\.weight$")
IN_FLOAT8 = re.compile(r"(attn\.w(q_a|q_b|kv|o_a|o_b)|shared_experts\.w\d)\.weight$")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``(quantised, dense)``; the names are those of the makers' files."""
    root = tmp_path_factory.mktemp("deepseek-v4")
    dense, quantised = root / "dense", root / "quantised"
    quantised.mkdir()
    new_model("deepseek_v4").save_pretrained(dense)
    tensors, rounded = {}, load_file(dense / "model.safetensors")
    for name, tensor in rounded.items():
        own = name.removeprefix("model.").replace("embed_tokens", "embed").replace("lm_head", "head")
        scale = f"{own.removesuffix('.weight')}.scale"
        if EXPERT.search(name):
            codes, exponents, values = round_to_mxfp4(tensor.numpy().T[None])
            rounded[name] = torch.from_numpy(np.ascontiguousarray(values[0].T))
            tensors[own] = torch.from_numpy(codes[0].reshape(len(tensor), -1).view(np.int8))
            tensors[scale] = torch.from_numpy(exponents[0]).view(torch.float8_e8m0fnu)
        elif IN_FLOAT8.search(name):
            tensors[own], tensors[scale], rounded[name] = to_float8(tensor, "exponents", (16, 8))
        else:
            tensors[own] = tensor
    tensors["mtp.0.ffn.experts.0.w1.weight"] = torch.zeros(32, 32, dtype=torch.int8)
    tensors["mtp.0.attn.wkv.weight"] = torch.zeros(16, 64).to(torch.float8_e4m3fn)
    save_tensors(dense, rounded)
    save_tensors(quantised, tensors)
    config = json.loads((dense / "config.json").read_text())
    config |= {"expert_dtype": "fp4", "quantization_config": QUANTIZATION}
    (quantised / "config.json").write_text(json.dumps(config))
    return quantised, dense


@pytest.mark.parametrize("packed", [False, True])
def test_whole_model(folders, tmp_path, packed):
    quantised, dense = folders
    expected = load_reference(dense)(TOKENS).logits.double().numpy()
    if packed:
        with open_checkpoint(quantised, num_threads=1) as checkpoint:
            write_packed(checkpoint, tmp_path / "packed")
        quantised = tmp_path / "packed"
    assert relative_error(load(quantised, num_threads=1)(TOKENS).logits.double().numpy(), expected) < 5e-4


def test_contents(folders):
    with open_checkpoint(folders[0]) as checkpoint:
        assert checkpoint.format == "deepseek-fp4"
        assert (checkpoint.codes, checkpoint.moe_layers, checkpoint.linears) == ("e2m1", [0, 1], [])
        assert {kind.group_size for kind in checkpoint.expert_kinds(1)} == {32}
        assert checkpoint.problems() == []
        assert checkpoint.scaled.kind("layers.1.attn.wkv") == "block"
        assert checkpoint.moe_layer(1, shared_expert=False).num_experts == 8
        with pytest.raises(UnsupportedError, match=r"ffn\.shared_experts\.w1 is not quantised; load the layer with"):
            checkpoint.moe_layer(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_dtype": "fp8"}, "expert_dtype 'fp8' of method 'fp8', supported: 'fp4'"),
        ({"quantization_config__fmt": "e5m2"}, "fmt: got 'e5m2', only 'e4m3' is supported"),
    ],
)
def test_configs_that_are_refused(folders, tmp_path, changes, message):
    (tmp_path / "config.json").write_text((folders[0] / "config.json").read_text())
    edit_json(tmp_path, "config.json", **changes)
    with pytest.raises(UnsupportedError, match=message):
        read_scheme(tmp_path, json.loads((tmp_path / "config.json").read_text()))


def test_experts_in_float8_are_refused(folders, tmp_path):
    tensors = load_file(folders[0] / "model.safetensors")
    changed = {
        name: tensor.to(torch.float8_e4m3fn) if tensor.dtype == torch.int8 else tensor
        for name, tensor in tensors.items()
    }
    save_tensors(tmp_path, changed)
    (tmp_path / "config.json").write_text((folders[0] / "config.json").read_text())
    with pytest.raises(UnsupportedError, match="no expert has 4-bit weights; models whose experts are in FP8 are not"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("w1.scale", lambda s: s.view(torch.uint8), r"w1\.scale': got U8 \(32, 2\), expected F8_E8M0 \(32, 2\)"),
        ("w1.weight", lambda w: w[:, ::2].clone(), r"w1\.weight': got I8 \(32, 16\), expected I8 \(32, 32\)"),
        ("w2.scale", lambda _: None, r"w2\.scale': missing"),
    ],
)
def test_tensors_that_contradict_the_config(folders, tmp_path, name, change, message):
    tensors = load_file(folders[0] / "model.safetensors")
    name = f"layers.1.ffn.experts.3.{name}"
    tensor = change(tensors.pop(name))
    save_tensors(tmp_path, tensors | ({} if tensor is None else {name: tensor}))
    (tmp_path / "config.json").write_text((folders[0] / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)
