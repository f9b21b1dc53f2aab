"""Linear layers in FP8 beside 4-bit experts: a scale of a tensor, of each output, of each block, powers of two."""

import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
from asserts import relative_error

from marlin_cy import open_checkpoint
from marlin_cy.checkpoints.packed_writer import write_packed
from marlin_cy.cli import main
from marlin_cy.decoder.load import load_model
from marlin_cy.decoder.loading import outputs_of
from marlin_cy.decoder.plan import DenseLinear
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats import scaled

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
SCALES = {"tensor": (1,), "scalar": (), "channel": (96, 1), "channels": (96,), "block": (3, 2)}
BLOCK = (32, 128)


def e4m3(rng, shape):
    return rng.standard_normal(shape).astype(np.float32).astype(E4M3)


def expanded(scale, shape, block):
    """A scale for each element, float64."""
    scale = np.asarray(scale, np.float64)
    if scale.ndim < 2:
        return np.broadcast_to(scale.reshape(-1, 1), shape)
    if scale.shape[1] == 1:
        return np.broadcast_to(scale, shape)
    return np.kron(scale, np.ones(block))[: shape[0], : shape[1]]


@pytest.mark.parametrize("kind", SCALES)
def test_matrix(rng, kind):
    """Every element is rounded once, also in blocks at the edge; so are those of rows and their scales."""
    codes, scale = e4m3(rng, (96, 160)), rng.uniform(0.001, 0.01, SCALES[kind]).astype(np.float32)
    assert scaled.kind_of(codes.shape, scale.shape, BLOCK) in kind.replace("scalar", "tensor")
    exact = codes.astype(np.float64) * expanded(scale, codes.shape, BLOCK)
    for dtype in (np.float32, np.float16):
        found = scaled.dequantize(codes, scale, BLOCK, dtype)
        np.testing.assert_array_equal(found, exact.astype(np.float32).astype(dtype))
    scales, scale_k = scaled.by_rows(scale, codes.shape, BLOCK)
    layer = DenseLinear(codes, None, scales, scale_k)
    assert scales.shape == (96, -(-160 // scale_k))
    np.testing.assert_array_equal(layer.matrix(), exact.astype(np.float32))
    np.testing.assert_array_equal(outputs_of(layer, np.array([7, 95, 3])).matrix(), layer.matrix()[[7, 95, 3]])


def test_scales_that_are_powers_of_two_are_exact(rng):
    codes, exponents = e4m3(rng, (96, 160)), rng.integers(115, 125, (3, 2)).astype(np.uint8)
    scale = scaled.scale_values(exponents)
    held = scaled.dequantize(codes, scale, BLOCK, np.float16)
    exact = codes.astype(np.float64) * np.kron(2.0 ** (exponents - 127.0), np.ones(BLOCK))[:, :160]
    np.testing.assert_array_equal(held, exact)
    assert scaled.scale_values(np.array(120, np.uint8)) == 2.0**-7  # of no dimensions: one scale of the tensor


def test_every_code(rng):
    codes = np.delete(np.arange(256, dtype=np.uint8), [127, 255]).view(E4M3)[None]
    held = scaled.dequantize(codes, np.ones(1, np.float32), BLOCK, np.float16)
    np.testing.assert_array_equal(held, codes.astype(np.float64))
    with pytest.raises(ValueError, match=r"got NaN at \[0, 1\]"):
        scaled.dequantize(np.array([[1, 255]], np.uint8).view(E4M3), np.ones(1, np.float32), BLOCK, np.float16)
    integers = np.arange(-128, 128, dtype=np.int8)[None]
    np.testing.assert_array_equal(scaled.dequantize(integers, np.ones(1, np.float32), BLOCK, np.float16), integers)
    for bad in (np.array([np.inf], np.float32), np.array([255], np.uint8)):
        with pytest.raises(ValueError, match="not finite"):
            scaled.scale_values(bad)
    with pytest.raises(ValueError, match=r"got a scale of 1\.7\d+e\+38, expected at most 6\.6"):
        scaled.scale_values(np.array([254], np.uint8))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (128, 128)),
        ({"weight_block_size": [64, 32]}, (64, 32)),
        ({"weight_block_size": "64"}, (128, 128)),
        ({"config_groups": {"a": {"weights": {"block_structure": [16, 32]}}, "b": 1}}, (16, 32)),
    ],
)
def test_sizes_of_blocks(config, expected):
    assert scaled.block_size(config) == expected


# ---------------------------------------------------------------------------------------------
# Whole models

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

from family_models import write_family  # noqa: E402
from float8_files import to_float8  # noqa: E402
from language_models import load_reference, save_tensors  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from marlin_cy.integrations.quantizer import MarlinCyConfig  # noqa: E402
from marlin_cy.integrations.transformers import load  # noqa: E402

TOKENS = np.random.default_rng(1).integers(1, 80, 12)
BOUND = 5e-4
"""Of logits: those of 4-bit experts with activations of 16 bits. FP8 layers have the weights of the reference."""

LAYERS = "model.layers"
KINDS = {"q_proj": "tensor", "k_proj": "channel", "v_proj": "block", "o_proj": "exponents"}
SUFFIXES = {"tensor": "weight_scale", "channel": "weight_scale", "block": "weight_scale_inv", "exponents": "scale"}

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``(quantised, dense)``: experts of 4 bits, attention in FP8, with scales of activations, which are ignored."""
    root = tmp_path_factory.mktemp("float8")
    quantised, dense = write_family(root, "qwen3_moe", method="compressed-tensors", kept=["self_attn"])
    tensors, rounded = load_file(quantised / "model.safetensors"), load_file(dense / "model.safetensors")
    for name in [name for name in tensors if re.search(r"self_attn\.\w_proj\.weight$", name)]:
        module = name.removesuffix(".weight")
        kind = KINDS[module.split(".")[-1]]
        tensors[name], scale, rounded[name] = to_float8(tensors[name], kind)
        tensors[f"{module}.{SUFFIXES[kind]}"] = scale
        tensors[f"{module}.input_scale"] = torch.ones(1)
    save_tensors(quantised, tensors)
    save_tensors(dense, rounded)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_1"] = {
        "targets": ["re:.*self_attn.*"],
        "format": "float-quantized",
        "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]},
        "input_activations": {"num_bits": 8, "type": "float", "dynamic": True},
    }
    (quantised / "config.json").write_text(json.dumps(config))
    return quantised, dense


@pytest.fixture(scope="module")
def expected(folders):
    with torch.no_grad():
        return load_reference(folders[1])(torch.from_numpy(TOKENS)[None]).logits[0].double().numpy()


def by_transformers(folder):
    return load(folder, num_threads=1)(torch.from_numpy(TOKENS)[None]).logits[0].double().numpy()


def by_from_pretrained(folder):
    config = MarlinCyConfig.for_folder(folder, num_threads=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    return model(torch.from_numpy(TOKENS)[None]).logits[0].double().numpy()


def by_the_decoder(folder):
    return load_model(folder, num_threads=1, cache_dtype="float32").forward(TOKENS, all_logits=True)


@pytest.mark.parametrize("way", [by_transformers, by_from_pretrained, by_the_decoder])
def test_whole_models(folders, expected, way):
    assert relative_error(way(folders[0]), expected) < BOUND


def test_packed_folder(folders, expected, tmp_path):
    with open_checkpoint(folders[0], num_threads=1) as checkpoint:
        write_packed(checkpoint, tmp_path / "packed")
    for way in (by_transformers, by_the_decoder):
        assert relative_error(way(tmp_path / "packed"), expected) < BOUND
    with open_checkpoint(tmp_path / "packed", verify=True) as checkpoint:
        assert sorted(checkpoint.scaled.scales) == [
            f"{LAYERS}.{i}.self_attn.{p}" for i in (0, 1) for p in sorted(KINDS)
        ]
        assert not checkpoint.problems()


def test_inspect(folders, capsys):
    assert main(["inspect", str(folders[0]), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["refused"] == []
    assert "8 linear layers in FP8: scales by block 4, channel 2, tensor 2" in report["unusual"]
    assert "scales of quantised activations in the files, ignored: 8" in report["unusual"]
    assert "activations are quantised by the config, which is ignored: dynamic" in report["unusual"]


def damaged(folders, tmp_path, name, change):
    folder = shutil.copytree(folders[0], tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensor = change(tensors.pop(name))
    if tensor is not None:
        tensors[name] = tensor
    save_tensors(folder, tensors)
    return folder


Q = f"{LAYERS}.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            f"{Q}.weight_scale",
            lambda _: None,
            "F8_E4M3 weights must have one scale, called weight_scale or weight",
        ),
        (f"{Q}.weight_scale", lambda s: s.repeat(3), r"got F32 \(3,\), expected F32, BF16, F16, F8_E8M0: one scale"),
        (f"{Q}.weight_scale", lambda s: s.double(), r"got F64 \(1,\), expected F32"),
        (f"{Q}.weight", lambda w: w[None].clone(), r"got shape \(1, 64, 64\), expected two dimensions"),
    ],
)
def test_damage_is_said_by_inspect(folders, tmp_path, name, change, message):
    folder = damaged(folders, tmp_path, name, change)
    with open_checkpoint(folder) as checkpoint:
        assert [str(problem) for problem in checkpoint.problems() if re.search(message, str(problem))]
    for way in (by_transformers, by_the_decoder):
        with pytest.raises(
            (CheckpointError, UnsupportedError), match=f"{message}|dtype F8_E4M3|expected F8_E4M3 .* by the config"
        ):
            way(folder)


def test_values_that_are_not_finite(folders, tmp_path):
    folder = damaged(folders, tmp_path, f"{Q}.weight_scale", lambda s: s * float("nan"))
    for way in (by_transformers, by_the_decoder):
        with pytest.raises(CheckpointError, match=rf"{re.escape(Q)}\.weight_scale': got a scale that is not finite"):
            way(folder)


def test_router_in_float8(folders, tmp_path):
    """A router is dequantised for single layers, and for the decoder."""
    name = "model.layers.0.mlp.gate"
    scale = np.float32(0.01)
    folder = damaged(folders, tmp_path, f"{name}.weight", lambda w: (w / float(scale)).to(torch.float8_e4m3fn))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{name}.weight_scale"] = torch.tensor([scale])
    save_tensors(folder, tensors)
    with open_checkpoint(folder) as checkpoint:
        weight = checkpoint.router_weight(0)
        np.testing.assert_array_equal(weight, (tensors[f"{name}.weight"].float().numpy() * scale))
        checkpoint.moe_layer(0)
