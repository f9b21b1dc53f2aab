"""``symmetric`` and ``act_order`` of every scheme and folder, and the key under which tuning results are kept."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import METHODS, edit_json, write_checkpoint, write_gpt_oss

from marlin_cy import open_checkpoint
from marlin_cy.checkpoints.packed_writer import write_packed
from marlin_cy.commands import tune
from marlin_cy.commands.inspect import unusual
from marlin_cy.formats import awq, compressed_tensors, deepseek_fp4, gptq, marlin, mxfp4
from marlin_cy.formats.compressed_tensors import pack_compressed
from marlin_cy.formats.registry import read_scheme

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32}


def compressed(**weights):
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


CONFIGS = {
    "gptq": ({**GPTQ, "sym": True, "desc_act": False}, gptq.GptqScheme, True, False),
    "gptq asymmetric": ({**GPTQ, "sym": False}, gptq.GptqScheme, False, False),
    "gptq desc_act": ({**GPTQ, "sym": True, "desc_act": True}, gptq.GptqScheme, True, True),
    "awq": ({**AWQ, "zero_point": True}, awq.AwqScheme, False, False),
    "awq symmetric": ({**AWQ, "zero_point": False}, awq.AwqScheme, True, False),
    "compressed": (compressed(symmetric=True), compressed_tensors.CompressedTensorsScheme, True, False),
    "compressed zeros": (compressed(symmetric=False), compressed_tensors.CompressedTensorsScheme, False, False),
    "compressed actorder": (compressed(actorder="group"), compressed_tensors.CompressedTensorsScheme, True, True),
    "compressed actorder weight": (
        compressed(actorder="weight"),
        compressed_tensors.CompressedTensorsScheme,
        True,
        False,
    ),
    "compressed mxfp4": (
        {**compressed(type="float"), "format": "mxfp4-pack-quantized"},
        compressed_tensors.CompressedMxfp4Scheme,
        True,
        False,
    ),
    "auto-round gptq": (
        {**AUTO_ROUND, "packing_format": "auto_round:auto_gptq", "sym": False, "desc_act": True},
        gptq.GptqScheme,
        False,
        True,
    ),
    "auto-round awq": (
        {**AUTO_ROUND, "packing_format": "auto_round:auto_awq", "sym": True},
        awq.AwqScheme,
        True,
        False,
    ),
    "marlin": ({**GPTQ, "group_size": 128, "checkpoint_format": "marlin"}, marlin.MarlinScheme, True, False),
    "deepseek fp4": ({"quant_method": "fp8", "fmt": "e4m3"}, deepseek_fp4.DeepSeekFp4Scheme, True, False),
    "mxfp4": ({"quant_method": "mxfp4"}, mxfp4.Mxfp4Scheme, True, False),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_scheme_has_them(tmp_path, name):
    config, kind, symmetric, act_order = CONFIGS[name]
    scheme = read_scheme(tmp_path, {"quantization_config": config})
    assert type(scheme) is kind
    assert (scheme.symmetric, scheme.act_order) == (symmetric, act_order)
    module = scheme.for_module("model.layers.0.mlp.experts.0.gate_proj")
    assert (module.symmetric, module.act_order) == (symmetric, act_order)


def symmetric_awq(group_size, **_):
    return {**AWQ, "group_size": group_size, "zero_point": False}


def symmetric_compressed_parts(q, scale, zero, g_idx, checkpoint_format):
    assert (zero == 8).all()
    packed, scales, _ = pack_compressed(q, scale.astype(ml_dtypes.bfloat16))
    return {"weight_packed": packed, "weight_scale": scales, "weight_shape": np.array(q.shape[::-1], np.int64)}


def symmetric_compressed(group_size, **_):
    return compressed(group_size=group_size, symmetric=True)


SYMMETRIC_METHODS = {
    "gptq": METHODS["gptq"],
    "awq": (METHODS["awq"][0], symmetric_awq),
    "compressed-tensors": (symmetric_compressed_parts, symmetric_compressed),
}

FOLDERS = {f"{method} {'sym' if sym else 'asym'}": (method, sym) for method in METHODS for sym in (True, False)}
FOLDERS |= {"gptq desc_act": ("gptq", False), "gpt-oss": ("mxfp4", True)}


@pytest.fixture(params=FOLDERS)
def folders(request, tmp_path, monkeypatch):
    """``(a quantiser's folder, the same packed, symmetric, act_order)``."""
    method, symmetric = FOLDERS[request.param]
    act_order = "desc_act" in request.param
    if method == "mxfp4":
        write_gpt_oss(tmp_path / "source")
    else:
        if symmetric:
            monkeypatch.setitem(METHODS, method, SYMMETRIC_METHODS[method])
        settings = {"sym": symmetric, "group_size": 32, "desc_act": act_order}
        zeros = "gptq" if method == "gptq" else "gptq_v2"  # 1 to 16, or 0 to 15
        write_checkpoint(tmp_path / "source", method=method, checkpoint_format=zeros, **settings)
    with open_checkpoint(tmp_path / "source") as checkpoint:
        write_packed(checkpoint, tmp_path / "packed")
    return tmp_path / "source", tmp_path / "packed", symmetric, act_order


def test_every_folder_has_them(folders):
    *paths, symmetric, act_order = folders
    for path in paths:
        with open_checkpoint(path) as checkpoint:
            for layer in checkpoint.moe_layers:
                assert checkpoint.expert_symmetry(layer) == (symmetric, symmetric)
            assert checkpoint.act_order == act_order
            assert any("desc_act" in sentence for sentence in unusual(checkpoint)) == act_order


def test_one_asymmetric_module_makes_its_stack_asymmetric(tmp_path):
    """Settings of single modules count: here of one expert's down."""
    write_checkpoint(tmp_path, sym=True, group_size=32)
    dynamic = {"dynamic": {r"model\.layers\.0\.mlp\.experts\.1\.down_proj": {"sym": False}}}
    edit_json(tmp_path, "quantize_config.json", **dynamic)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.expert_symmetry(0) == (True, False)
        assert checkpoint.expert_symmetry(1) == (True, True)


def test_results_are_found_again(folders, device_alone):
    """``tune`` measures products under the keys that the loaded layer's products look up."""
    from marlin_cy.opencl.tuning import Case, product_key, random_stack

    *paths, _, _ = folders
    rng = np.random.default_rng(0)
    for path in paths:
        shapes = list(tune._shapes(SimpleNamespace(checkpoint=path, shape=None), device_alone))
        with open_checkpoint(path, device_alone) as checkpoint:
            layer = checkpoint.moe_layer(checkpoint.moe_layers[0])
        for shape, stack in zip(shapes, (layer.gate_up, layer.down), strict=True):
            case = Case(device_alone, random_stack(device_alone, shape, rng), shape, 1, rng)
            assert (case.problem.k, case.problem.n) == (stack.store.k, stack.store.n)
            assert case.key == product_key(case.problem, stack.store.symmetric, stack.store.codes)
