"""Checkpoints that the tools wrote give the tools' own dequantised weights, to the last bit.

``tests/fixtures`` holds layers that each tool quantised and saved, and the weights that it dequantised them to;
``make_*.py`` there says which versions, and how to run them again. There are two exceptions. Marlin has no
dequantisation outside CUDA kernels: its ``expected`` are the weights that the tool packed, which 4 bits hold exactly.
The codes and exponents of gpt-oss's MXFP4 are random, because its quantiser needs a GPU.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from asserts import assert_same_bits

from marlin_cy import reference
from marlin_cy.checkpoints.safetensors import SafetensorsFile
from marlin_cy.errors import UnsupportedError
from marlin_cy.formats.awq import AwqScheme
from marlin_cy.formats.compressed_tensors import CompressedMxfp4Scheme, CompressedTensorsScheme
from marlin_cy.formats.gptq import GptqScheme
from marlin_cy.formats.marlin import MarlinScheme
from marlin_cy.formats.mxfp4 import Mxfp4Scheme
from marlin_cy.formats.registry import read_scheme
from marlin_cy.weights.canonical import unpack_words
from marlin_cy.weights.code_types import CODE_TYPES

FIXTURES = Path(__file__).parent / "fixtures"
EXPERT = "model.layers.0.mlp.experts.1"
# The expected gate_proj of each fixture, and other modules of EXPERT if they differ.
SCHEMES = {
    "auto-round-asym": GptqScheme(32, "gptq_v2", sym=False),
    "auto-round-awq": AwqScheme(32, True),
    "auto-round-gptqmodel": GptqScheme(32, "gptq_v2", sym=False),
    "auto-round-sym": GptqScheme(32, sym=True),
    "auto-round-to-gptq": GptqScheme(32, desc_act=False, sym=True),
    "awq-autoawq": AwqScheme(64, True),
    "awq-gptqmodel-asym": AwqScheme(32, True),
    "awq-gptqmodel-sym": AwqScheme(32, zero_point=False),
    "ct-actorder-bf16": CompressedTensorsScheme(32, actorder=True),
    "ct-asym-channel-bf16": CompressedTensorsScheme(-1, symmetric=False),
    "ct-asym-g32-f16": CompressedTensorsScheme(32, symmetric=False),
    "ct-channel-bf16": CompressedTensorsScheme(-1),
    "ct-mixed": CompressedMxfp4Scheme(),
    "ct-sym-g32-bf16": CompressedTensorsScheme(32),
    "gptq-asym-g32": GptqScheme(32, desc_act=False, sym=False),
    "gptq-channel": GptqScheme(-1, desc_act=False, sym=True),
    "gptq-dynamic": GptqScheme(32, desc_act=False, sym=True),
    "gptq-sym-g32": GptqScheme(32, desc_act=False, sym=True),
    "gptq-v2-asym-desc-act": GptqScheme(32, "gptq_v2", desc_act=True, sym=False),
    "marlin-autoawq-g128": MarlinScheme(128, ".qweight", ".scales"),
    "marlin-autogptq-channel": MarlinScheme(-1),
    "marlin-autogptq-g128": MarlinScheme(128),
    "mxfp4-gpt-oss": Mxfp4Scheme(),
}
OTHERS = {
    ("ct-mixed", "down_proj"): CompressedTensorsScheme(32),
    ("gptq-dynamic", "down_proj"): GptqScheme(-1, desc_act=False, sym=True),
}
# Modules that the tool did not quantise, and the message about each.
REFUSED = [
    ("auto-round-sym", "model.layers.0.mlp.gate", "not quantised, its bits are 16 in extra_config"),
    ("auto-round-sym", "model.layers.7.self_attn.q_proj", "not quantised, its bits are 16 in extra_config"),
    ("auto-round-awq", "model.layers.0.self_attn.o_proj", "not quantised, its bits are 16"),
    ("auto-round-to-gptq", "model.layers.0.mlp.gate", r"not quantised, by '-:\.\*model.* of dynamic"),
    ("awq-autoawq", "model.layers.0.block_sparse_moe.gate", "not quantised, by 'gate' of modules_to_not_convert"),
    ("ct-mixed", "model.layers.0.mlp.gate", "not quantised, by 'model.layers.0.mlp.gate' of ignore"),
    ("ct-mixed", "model.layers.0.mlp.shared_expert.up_proj", "no target of config_groups names it"),
    ("gptq-dynamic", "model.layers.0.self_attn.q_proj", r"not quantised, by '-:\.\*.* of dynamic"),
    ("mxfp4-gpt-oss", "model.layers.3.mlp.router", "not quantised, by 'model.layers.*.mlp.router'"),
    ("mxfp4-gpt-oss", "lm_head", "not quantised, by 'lm_head'"),
]


def test_every_fixture_is_tested():
    assert {path.name for path in FIXTURES.iterdir() if (path / "config.json").exists()} == set(SCHEMES)


def scheme_of(name):
    folder = FIXTURES / name
    return read_scheme(folder, json.loads((folder / "config.json").read_text(encoding="utf-8")))


def dequantised(weight):
    """float64 ``[N, K]``."""
    q = unpack_words(weight.words)
    if weight.codes == "uint4":
        return reference.dequantize(q, weight.scale, weight.zero, weight.group_size, weight.g_idx).T
    scale = weight.scale.astype(np.float64)[np.arange(weight.k) // weight.group_size]
    return (CODE_TYPES["e2m1"].decode_table.astype(np.float64)[q] * scale).T


@pytest.mark.parametrize("name", SCHEMES)
def test_means_what_its_tool_makes_of_it(name):
    stored, expected = (SafetensorsFile(FIXTURES / name / f"{kind}.safetensors") for kind in ("model", "expected"))
    checkpoint = scheme_of(name)
    for tensor in expected.names:
        module = tensor.removesuffix(".weight")
        scheme = checkpoint.for_module(module)
        assert scheme == OTHERS.get((name, module.rsplit(".", 1)[1]), SCHEMES[name])
        shape = stored.info(module + scheme.marker).shape
        experts = shape[:1] if isinstance(scheme, Mxfp4Scheme) and scheme.format == "mxfp4" else ()
        k, n = scheme.sizes(shape[len(experts) :])
        arrays = {}
        for suffix, spec in scheme.tensors(k, n).items():
            if module + suffix in stored.names:
                info = stored.info(module + suffix)
                assert info.shape == experts + spec.shape
                assert info.dtype in spec.dtypes
                arrays[suffix] = stored.tensor(module + suffix)
            else:
                assert not spec.required
        wanted = expected.tensor(tensor)
        for expert in np.ndindex(experts):
            weight = scheme.to_canonical({suffix: array[expert] for suffix, array in arrays.items()}, k, n)
            assert (weight.k, weight.n, weight.codes) == (k, n, scheme.codes)
            assert weight.scale.dtype == scheme.scale_dtype(arrays[scheme.scales].dtype)
            assert weight.group_size == scheme.checked_group_size(k, n)
            assert_same_bits(dequantised(weight).astype(wanted.dtype), wanted[expert])
            if scheme.order in arrays:
                np.testing.assert_array_equal(scheme.g_idx(arrays[scheme.order], k, n), weight.g_idx)


@pytest.mark.parametrize("name", ["ct-actorder-bf16", "gptq-v2-asym-desc-act"])
def test_the_orders_are_orders(name):
    """Otherwise these fixtures would test nothing."""
    stored, scheme = SafetensorsFile(FIXTURES / name / "model.safetensors"), scheme_of(name)
    assert (np.diff(stored.tensor(f"{EXPERT}.gate_proj{scheme.order}")) < 0).any()


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("auto-round-sym", f"{EXPERT}.up_proj"),
        ("auto-round-to-gptq", f"{EXPERT}.up_proj"),
        ("ct-mixed", "model.layers.0.self_attn.q_proj"),
        ("gptq-dynamic", f"{EXPERT}.up_proj"),
    ],
)
def test_modules_of_8_bits(name, module):
    scheme = scheme_of(name).for_module(module)
    assert (scheme.bits, scheme.codes) == (8, "uint8")


@pytest.mark.parametrize(("name", "module", "message"), REFUSED)
def test_modules_that_are_not_quantised(name, module, message):
    with pytest.raises(UnsupportedError, match=f"^{module}: .*{message}"):
        scheme_of(name).for_module(module)
