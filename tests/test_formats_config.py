"""Quantisation configs of tools: the settings of each module, and configs that are refused."""

import json
import re

import pytest

from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats import auto_round, awq, compressed_tensors, gptq, marlin, mxfp4
from marlin_cy.formats.awq import AwqScheme
from marlin_cy.formats.compressed_tensors import CompressedMxfp4Scheme, CompressedTensorsScheme
from marlin_cy.formats.gptq import GptqScheme
from marlin_cy.formats.marlin import MarlinScheme
from marlin_cy.formats.mxfp4 import Mxfp4Scheme
from marlin_cy.formats.registry import METHODS, read_scheme

FILE = "folder/config.json"
EXPERT = "model.layers.0.mlp.experts.7.down_proj"


def weights(**changes):
    return {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True} | changes


def group(*targets, **changes):
    return {"targets": list(targets) or ["Linear"], "weights": weights(**changes)}


VALID = {
    gptq: {"quant_method": "gptq", "bits": 4, "group_size": 128},
    awq: {"quant_method": "awq", "bits": 4, "group_size": 128},
    auto_round: {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "data_type": "int",
    },
    compressed_tensors: {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group()},
        "ignore": ["lm_head"],
    },
    mxfp4: {"quant_method": "mxfp4"},
    marlin: {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"},
}


def changed(module, changes):
    """The module's valid config, changed; None takes a key out."""
    return {key: value for key, value in (VALID[module] | changes).items() if value is not None}


def groups(**given):
    return {"config_groups": given}


READ = [
    (gptq, {}, GptqScheme(128)),
    (gptq, {"desc_act": True, "sym": False, "group_size": -1}, GptqScheme(-1, "gptq", True, False)),
    (gptq, {"checkpoint_format": "gptq_v2"}, GptqScheme(128, "gptq_v2")),
    (gptq, {"format": "gptq_v2", "checkpoint_format": "gptq_v2"}, GptqScheme(128, "gptq_v2")),
    (gptq, {"format": "GPTQ"}, GptqScheme(128)),
    (gptq, {"format": "gptq_p", "pack_dtype": "int32"}, GptqScheme(128, "gptq_v2")),
    (gptq, {"dynamic": {}, "rotation": None}, GptqScheme(128)),
    (awq, {}, AwqScheme(128)),
    (awq, {"bits": None, "w_bit": 4, "group_size": None, "q_group_size": 64, "version": "GEMM"}, AwqScheme(64)),
    (awq, {"zero_point": False, "modules_to_not_convert": []}, AwqScheme(128, False)),
    (awq, {"sym": True, "zero_point": False}, AwqScheme(128, False)),
    (awq, {"sym": True}, AwqScheme(128, False)),
    (auto_round, {}, GptqScheme(128, sym=True)),
    (auto_round, {"packing_format": "auto_round:gptq"}, GptqScheme(128, sym=True)),
    (auto_round, {"packing_format": "auto_round", "sym": False}, GptqScheme(128, "gptq_v2", sym=False)),
    (auto_round, {"packing_format": "auto_round:gptqmodel"}, GptqScheme(128, "gptq_v2", sym=True)),
    (auto_round, {"packing_format": "auto_round:auto_awq"}, AwqScheme(128, False)),
    (auto_round, {"packing_format": "auto_round:awq", "sym": False, "act_bits": 16}, AwqScheme(128, True)),
    # AutoRound's older configs, without packing_format.
    (auto_round, {"packing_format": None}, GptqScheme(128, sym=True)),
    (auto_round, {"packing_format": None, "backend": "auto"}, GptqScheme(128, sym=True)),
    (auto_round, {"packing_format": None, "backend": "auto_round:gptq:exllamav2"}, GptqScheme(128, sym=True)),
    (auto_round, {"packing_format": None, "backend": "auto_round:awq:gemm"}, AwqScheme(128, False)),
    (auto_round, {"packing_format": "auto_round", "backend": "auto_round:gptq"}, GptqScheme(128, "gptq_v2", sym=True)),
    (compressed_tensors, {}, CompressedTensorsScheme(32)),
    (compressed_tensors, groups(a=group(strategy="channel", group_size=None)), CompressedTensorsScheme(-1)),
    (compressed_tensors, groups(a=group(strategy="channel", group_size=-1)), CompressedTensorsScheme(-1)),
    (compressed_tensors, groups(a=group(strategy=None, group_size=-1)), CompressedTensorsScheme(-1)),
    (compressed_tensors, groups(a=group(strategy=None)), CompressedTensorsScheme(32)),
    (compressed_tensors, groups(a=group(symmetric=False)), CompressedTensorsScheme(32, False)),
    (compressed_tensors, groups(a=group(actorder="group")), CompressedTensorsScheme(32, True, True)),
    (compressed_tensors, groups(a=group(actorder="weight")), CompressedTensorsScheme(32, actorder=False)),
    (compressed_tensors, groups(a=group(actorder=False)), CompressedTensorsScheme(32, actorder=False)),
    (compressed_tensors, {"sparsity_config": {}, "transform_config": {}}, CompressedTensorsScheme(32)),
    (compressed_tensors, {"sparsity_config": {"format": "dense"}}, CompressedTensorsScheme(32)),
    (
        compressed_tensors,
        {"format": "mxfp4-pack-quantized"} | groups(a=group(type="float")),
        CompressedMxfp4Scheme(),
    ),
    (
        compressed_tensors,
        {"format": None} | groups(a=group() | {"format": "pack-quantized"}),
        CompressedTensorsScheme(32),
    ),
    (mxfp4, {}, Mxfp4Scheme()),
    (mxfp4, {"modules_to_not_convert": []}, Mxfp4Scheme()),
    (marlin, {}, MarlinScheme(128)),
    (marlin, {"group_size": -1, "sym": True, "desc_act": False}, MarlinScheme(-1)),
    (marlin, {"quant_method": "marlin"}, MarlinScheme(128)),
    (marlin, {"quant_method": "awq", "zero_point": False}, MarlinScheme(128, ".qweight", ".scales")),
]


@pytest.mark.parametrize(("module", "changes", "expected"), READ)
def test_read(module, changes, expected):
    assert module.parse(changed(module, changes), FILE).for_module(EXPERT) == expected


UNSUPPORTED = [
    (gptq, {"bits": 3}, "bits: got 3, supported: 4, 8"),
    (gptq, {"checkpoint_format": "bitblas"}, "checkpoint_format 'bitblas', supported: gptq, gptq_v2, gptq_p, marlin"),
    (gptq, {"pack_dtype": "int16"}, "pack_dtype: got 'int16', only 'int32' is supported"),
    (gptq, {"rotation": "hadamard"}, "rotation: got 'hadamard', activations that are rotated are not supported"),
    (awq, {"bits": 8}, "bits: got 8, supported: 4$"),
    (awq, {"version": "gemv"}, "version 'gemv' of AWQ, supported: gemm, marlin"),
    (awq, {"format": "gemv_fast", "version": "gemv_fast"}, "version 'gemv_fast' of AWQ, supported: gemm, marlin"),
    (awq, {"backend": "llm-awq"}, "version 'llm-awq' of AWQ"),
    (awq, {"rotation": "random"}, "rotation: got 'random'"),
    (auto_round, {"bits": 2}, "bits: got 2, supported: 4, 8"),
    (
        auto_round,
        {"packing_format": "auto_round:fp8"},
        "packing_format 'auto_round:fp8', supported: auto_round:auto_gptq,",
    ),
    (auto_round, {"data_type": "mx_fp"}, "data_type: got 'mx_fp', only integers are supported"),
    (auto_round, {"act_bits": 8}, "act_bits: got 8, quantised activations are not supported"),
    (auto_round, {"rotation_config": {"x": 1}}, "rotation_config: got {'x': 1}, activations that are rotated"),
    (compressed_tensors, {"format": "int-quantized"}, "format 'int-quantized', supported: pack-quantized, mxfp4-pack-"),
    (compressed_tensors, {"format": "marlin-24"}, "format 'marlin-24', supported"),
    (compressed_tensors, groups(a=group(num_bits=3)), "num_bits: got 3, supported: 4, 8"),
    (
        compressed_tensors,
        groups(a=group(strategy="tensor", group_size=None)),
        "strategy 'tensor', supported: group, ch",
    ),
    (
        compressed_tensors,
        groups(a=group(strategy=None, group_size=None)),
        "strategy 'tensor', supported: group, channel",
    ),
    (compressed_tensors, groups(a={"targets": ["Linear"], "weights": None}), "not quantised, its group has no weights"),
    (compressed_tensors, groups(), "config_groups: has no targets"),
    (compressed_tensors, {"transform_config": {"config_groups": {"u": {}}}}, "transform_config: got .*rotated"),
    (
        compressed_tensors,
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparsity_config: format 'sparse-24-bitm",
    ),
    (marlin, {"bits": 8}, "bits: got 8"),
    (marlin, {"group_size": 64}, "group_size: got 64, Marlin has 128 and -1 for one group"),
    (marlin, {"quant_method": "hqq"}, "Marlin's layout of method 'hqq', supported: gptq, marlin, awq"),
]
DAMAGED = [
    *((module, {"bits": None}, "bits: missing") for module in (gptq, awq, auto_round, marlin)),
    *((module, {"group_size": None}, "group_size: missing") for module in (gptq, awq, auto_round, marlin)),
    *((module, {"bits": "4"}, "bits: got '4', expected int") for module in (gptq, awq, auto_round, marlin)),
    *((module, {"bits": True}, "bits: got True, expected int") for module in (gptq, awq, auto_round, marlin)),
    *((module, {"group_size": 128.0}, "group_size: got 128.0, expected int") for module in (gptq, awq, auto_round)),
    *((module, {"sym": 1}, "sym: got 1, expected bool") for module in (gptq, awq, auto_round, marlin)),
    *((module, {"dynamic": []}, r"dynamic: got \[\], expected dict") for module in (gptq, awq)),
    *((module, {"dynamic": {"(": {}}}, r"dynamic: got '\(', expected a regular expression") for module in (gptq, awq)),
    *((module, {"dynamic": {"+:(": {}}}, r"dynamic: got '\('") for module in (gptq, awq)),
    *((module, {"dynamic": {"a": 3}}, "dynamic: got 3 for 'a', expected an object") for module in (gptq, awq)),
    *((module, {"dynamic": {"a": {"bits": "4"}}}, "bits: got '4'") for module in (gptq, awq)),
    *(
        (module, {"modules_to_not_convert": value}, message)
        for module in (awq, mxfp4)
        for value, message in (
            ("gate", "modules_to_not_convert: got 'gate', expected list"),
            ([3], "modules_to_not_convert: got 3, expected strings"),
            (["("], r"modules_to_not_convert: got '\(', expected a regular expression"),
        )
    ),
    (gptq, {"desc_act": "no"}, "desc_act: got 'no', expected bool"),
    (gptq, {"checkpoint_format": 2}, "checkpoint_format: got 2, expected str"),
    (gptq, {"format": "gptq", "checkpoint_format": "gptq_v2"}, "checkpoint_format 'gptq_v2' and format 'gptq', which"),
    (awq, {"w_bit": 8}, "got bits 4 and w_bit 8, which contradict each other"),
    (awq, {"q_group_size": 64}, "got group_size 128 and q_group_size 64, which contradict"),
    (awq, {"zero_point": True, "sym": True}, "got zero_point True and sym True, which contradict each other"),
    (awq, {"version": "gemm", "format": "gemv"}, "got version 'gemm' and format 'gemv', which contradict"),
    (auto_round, {"extra_config": {"a": None}}, "extra_config: got None for 'a', expected an object"),
    (auto_round, {"extra_config": {".*(": {}}}, r"extra_config: got '\.\*\(', expected a regular expression"),
    (auto_round, {"extra_config": {"a": {"act_bits": "8"}}}, "act_bits: got '8', expected int"),
    (compressed_tensors, {"config_groups": None}, "config_groups: missing"),
    (compressed_tensors, {"config_groups": ["Linear"]}, r"config_groups: got \['Linear'\], expected dict"),
    (compressed_tensors, groups(W4A16=["Linear"]), r"config_groups: got \['Linear'\] for 'W4A16', expected an object"),
    (compressed_tensors, {"format": None}, "format: missing"),
    (compressed_tensors, groups(a=group(num_bits=None)), "num_bits: missing"),
    (compressed_tensors, groups(a=group(type="float")), "type: got 'float', expected 'int' in format 'pack-quantized'"),
    (
        compressed_tensors,
        groups(a=group(group_size=None)),
        "got strategy 'group' and group_size None, which contradict",
    ),
    (
        compressed_tensors,
        groups(a=group(strategy="channel")),
        "got strategy 'channel' and group_size 32, which contrad",
    ),
    (compressed_tensors, groups(a=group("re:(")), r"targets: got '\(', expected a regular expression"),
    (compressed_tensors, groups(a={"targets": [3], "weights": weights()}), "targets: got 3, expected strings"),
    (compressed_tensors, {"ignore": ["re:["]}, r"ignore: got '\[', expected a regular expression"),
    (
        compressed_tensors,
        {"format": "mxfp4-pack-quantized"} | groups(a=group(type="float", group_size=16)),
        "got group_size 16 and symmetric True, expected 32 and True of MXFP4",
    ),
    (marlin, {"desc_act": True}, "desc_act: got True, which Marlin's layout cannot hold"),
    (marlin, {"sym": False}, "sym: got False, which Marlin's layout cannot hold"),
    (marlin, {"quant_method": "awq", "zero_point": True}, "zero_point: got True, which Marlin's layout cannot hold"),
]


@pytest.mark.parametrize(
    ("module", "changes", "exception", "message"),
    [
        *((module, changes, UnsupportedError, message) for module, changes, message in UNSUPPORTED),
        *((module, changes, CheckpointError, message) for module, changes, message in DAMAGED),
    ],
)
def test_refused(module, changes, exception, message):
    with pytest.raises(exception, match=f"^{FILE}: .*{message}"):
        module.parse(changed(module, changes), FILE)


def said_of(scheme, module):
    """The scheme of a module, or the exception that refuses it."""
    try:
        return scheme.for_module(module)
    except UnsupportedError as error:
        assert str(error).startswith(f"{module}: ")
        return str(error).removeprefix(f"{module}: ")


class TestDynamic:
    """GPTQModel's: the first expression that fits the beginning of a name decides."""

    RULES = {
        r"-:.*\.gate$": {},
        r"+:.*experts\.7\.": {"group_size": 64, "desc_act": True},
        r".*experts\.[78]\.": {"bits": 8},
        r"experts": {"bits": 2},
        r"lm_head": {"sym": False, "unknown": [1]},
    }
    BY_NAME = [
        ("model.layers.0.mlp.gate", r"not quantised, by '-:.*\\.gate$' of dynamic"),
        ("model.layers.0.mlp.gate_proj", GptqScheme(128)),
        (EXPERT, GptqScheme(64, desc_act=True)),
        (EXPERT.replace("7", "8"), GptqScheme(128, bits=8)),
        (EXPERT.replace("7", "9"), GptqScheme(128)),
        ("experts.9.up_proj", "bits: got 2, supported: 4, 8"),
        ("lm_head", GptqScheme(128, sym=False)),
    ]

    @pytest.mark.parametrize(("module", "expected"), BY_NAME)
    def test_of_gptq(self, module, expected):
        scheme = gptq.parse(changed(gptq, {"dynamic": self.RULES}), FILE)
        assert said_of(scheme, module) == expected
        assert scheme.group_size == 128

    def test_of_awq(self):
        rules = {"dynamic": {r".*experts\.7\.": {"group_size": 64, "sym": True}}, "modules_to_not_convert": ["gate"]}
        scheme = awq.parse(changed(awq, rules), FILE)
        assert said_of(scheme, EXPERT) == AwqScheme(64, False)
        assert said_of(scheme, "a.up_proj") == AwqScheme(128)
        assert said_of(scheme, "a.gate") == "not quantised, by 'gate' of modules_to_not_convert"


class TestExtraConfig:
    """AutoRound's: a name first, then the first expression found anywhere in it."""

    RULES = {
        r".*down_proj.*": {"group_size": 64},
        r"experts\.[0-9]": {"bits": 8},
        EXPERT: {"group_size": -1, "bits": 4},
        "model.layers.0.mlp.gate": {"bits": 16, "data_type": "fp"},
        "a.x": {"data_type": "mx_fp"},
        "a.y": {"act_bits": 8},
    }

    @pytest.mark.parametrize(
        ("module", "expected"),
        [
            (EXPERT, -1),
            (EXPERT.replace("7", "8"), 64),
            ("model.layers.0.mlp.gate", "not quantised, its bits are 16 in extra_config"),
            # The name of another module is not a regular expression, even if it could be read as one.
            ("model.layers.0.mlp.gate_proj", 128),
            ("aXx", 128),
            ("a.x", "data_type: got 'mx_fp', only integers are supported"),
            ("a.y", "act_bits: got 8, quantised activations are not supported"),
        ],
    )
    @pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round:auto_awq"])
    def test_by_name(self, packing, module, expected):
        changes = {"packing_format": packing, "extra_config": self.RULES}
        found = said_of(auto_round.parse(changed(auto_round, changes), FILE), module)
        assert (found if isinstance(found, str) else found.group_size) == expected


@pytest.mark.parametrize(
    ("name", "module", "converted"),
    [
        ("gate", "model.layers.0.mlp.gate", False),
        ("gate", "model.layers.0.mlp.gate_proj", True),
        ("model.layers.0", "model.layers.0.mlp.up_proj", False),
        ("model.layers.1", "model.layers.10.mlp.up_proj", True),
        ("model.layers.*.self_attn", "model.layers.3.self_attn.q_proj", False),
        ("model.layers.*.mlp.gate", "model.layers.3.mlp.gate_proj", True),
        ("mlp.gate|lm_head", "lm_head", False),
    ],
)
@pytest.mark.parametrize("format_module", [awq, mxfp4])
def test_modules_to_not_convert(format_module, name, module, converted):
    scheme = format_module.parse(changed(format_module, {"modules_to_not_convert": [name]}), FILE)
    expected = format_module.parse(changed(format_module, {}), FILE)
    assert said_of(scheme, module) == (
        expected if converted else f"not quantised, by {name!r} of modules_to_not_convert"
    )


class TestTargets:
    """compressed-tensors' order: a name, then the expression that sorts first, then "Linear"; and ignored modules."""

    CONFIG = {
        "config_groups": {
            "linear": group("Linear", group_size=128),
            "late": group(r"re:.*down_proj$", group_size=64),
            "early": group(r"re:.*7\.down_proj$", strategy="channel", group_size=None),
            "name": group(EXPERT.replace("7", "3"), symmetric=False),
            "eight": group(r"re:.*self_attn", num_bits=8),
            "floats": group(r"re:.*9\.up_proj$", type="float") | {"format": "mxfp4-pack-quantized"},
        },
        "ignore": ["lm_head", "re:.*mlp.gate$", "model.layers.0.x"],
    }

    @pytest.mark.parametrize(
        ("module", "expected"),
        [
            (EXPERT, CompressedTensorsScheme(-1)),
            (EXPERT.replace("7", "8"), CompressedTensorsScheme(64)),
            (EXPERT.replace("7", "3"), CompressedTensorsScheme(32, False)),
            (EXPERT.replace("7.down", "9.up"), CompressedMxfp4Scheme()),
            ("anything", CompressedTensorsScheme(128)),
            ("model.layers.0.self_attn.q_proj", CompressedTensorsScheme(32, bits=8)),
            ("lm_head", "not quantised, by 'lm_head' of ignore"),
            ("model.layers.0.mlp.gate", "not quantised, by 're:.*mlp.gate$' of ignore"),
            ("model.layers.0.mlp.gate_proj", CompressedTensorsScheme(128)),
            ("model.layers.0.xy", CompressedTensorsScheme(128)),
        ],
    )
    def test_by_name(self, module, expected):
        scheme = compressed_tensors.parse(changed(compressed_tensors, self.CONFIG), FILE)
        assert said_of(scheme, module) == expected

    def test_of_two_expressions_the_one_that_sorts_first(self):
        """As the tool has it, whatever their order: "re:.*7" is before "re:.*down"."""
        for order in (1, -1):
            given = [("a", group(r"re:.*down", group_size=64)), ("b", group(r"re:.*7", group_size=32))][::order]
            scheme = compressed_tensors.parse(changed(compressed_tensors, {"config_groups": dict(given)}), FILE)
            assert said_of(scheme, EXPERT) == CompressedTensorsScheme(32)

    def test_no_target(self):
        scheme = compressed_tensors.parse(changed(compressed_tensors, groups(a=group("re:.*down"))), FILE)
        assert said_of(scheme, "a.up") == "not quantised, no target of config_groups names it"

    def test_ignored_linears(self):
        scheme = compressed_tensors.parse(changed(compressed_tensors, {"ignore": ["Linear"]}), FILE)
        assert said_of(scheme, EXPERT) == "not quantised, by 'Linear' of ignore"


class TestRegistry:
    def read(self, folder, config=None, owner=None, **files):
        """``read_scheme`` of a folder with ``config`` as its ``quantization_config`` and further ``files``."""
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return read_scheme(folder, (owner or (lambda config: {"quantization_config": config}))(config))

    @pytest.mark.parametrize("module", [gptq, awq, auto_round, compressed_tensors, mxfp4, marlin])
    def test_every_method(self, tmp_path, module):
        config = VALID[module]
        assert self.read(tmp_path, config) == module.parse(config, FILE)
        assert self.read(tmp_path, config, lambda config: {"text_config": {"quantization_config": config}})
        for name in ("quantize_config", "quant_config", "quantization_config"):
            assert self.read(tmp_path, config, **{name: config}) == module.parse(config, FILE)
            assert self.read(tmp_path, None, **{name: config}) == module.parse(config, FILE)

    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({"bits": 4, "group_size": 64}, GptqScheme(64)),
            ({"bits": 4, "group_size": 64, "method": "gptq", "format": "gptq_v2"}, GptqScheme(64, "gptq_v2")),
            ({"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}, AwqScheme(64, True)),
            ({"bits": 4, "group_size": 64, "zero_point": False}, AwqScheme(64, False)),
            ({"bits": 4, "group_size": 64, "packing_format": "auto_round"}, GptqScheme(64, "gptq_v2")),
            (VALID[auto_round] | {"quant_method": "intel/auto-round"}, GptqScheme(128, sym=True)),
            ({"bits": 4, "group_size": 128, "is_marlin_format": True}, MarlinScheme(128)),
            ({"bits": 4, "group_size": 128, "is_marlin_format": False}, GptqScheme(128)),
            ({"bits": 4, "group_size": 128, "quant_method": "gptq", "format": "marlin"}, MarlinScheme(128)),
            ({"bits": 4, "group_size": -1, "quant_method": "marlin"}, MarlinScheme(-1)),
            (
                {"w_bit": 4, "q_group_size": 128, "quant_method": "awq", "version": "Marlin", "zero_point": False},
                MarlinScheme(128, ".qweight", ".scales"),
            ),
        ],
    )
    def test_what_tells_the_method(self, tmp_path, config, expected):
        assert self.read(tmp_path, config) == expected

    def test_two_files_complete_each_other(self, tmp_path):
        one = {"bits": 4, "group_size": 64, "sym": None, "damp_percent": 0.1, "meta": {"a": 1}}
        other = {"quant_method": "gptq", "bits": 4, "desc_act": True, "damp_percent": 0.2, "meta": {}}
        assert self.read(tmp_path, other, quantize_config=one) == GptqScheme(64, desc_act=True)

    def test_layouts_may_be_named_in_capitals(self, tmp_path):
        one = {"w_bit": 4, "q_group_size": 128, "version": "GEMM", "zero_point": True}
        other = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
        assert self.read(tmp_path, other, quant_config=one) == AwqScheme(128, True)

    @pytest.mark.parametrize(
        ("config", "file", "exception", "message"),
        [
            (
                {"quant_method": "fbgemm_fp8"},
                None,
                UnsupportedError,
                f"quantisation method 'fbgemm_fp8', supported: {', '.join(METHODS)}",
            ),
            ({"quant_method": 7}, None, CheckpointError, "quant_method: got 7, expected str"),
            ({"quant_method": "gptq", "method": "awq"}, None, CheckpointError, "quant_method 'gptq' and method 'awq'"),
            ([], None, CheckpointError, "quantization_config: got [], expected an object"),
            ({}, None, CheckpointError, "bits: missing"),
            ({"bits": 4, "group_size": 64, "is_marlin_format": 1}, None, CheckpointError, "is_marlin_format: got 1"),
            (
                {"bits": 4, "group_size": 64},
                {"bits": 4, "group_size": 32},
                CheckpointError,
                "group_size: got 64 in quantization_config, but quantize_config.json says 32",
            ),
            (
                {"bits": 4, "group_size": 64, "quant_method": "awq"},
                {"w_bit": 8, "q_group_size": 64},
                CheckpointError,
                "got bits 4 and w_bit 8, which contradict each other",
            ),
        ],
    )
    def test_refused(self, tmp_path, config, file, exception, message):
        files = {} if file is None else {"quantize_config": file}
        with pytest.raises(exception, match=f"^{re.escape(str(tmp_path / 'config.json'))}: .*{re.escape(message)}"):
            self.read(tmp_path, config, **files)

    def test_modelopt(self, tmp_path):
        """It is named with its number format, from ``config.json`` or from a file of its own."""
        message = re.escape(f"quantisation method 'modelopt' NVFP4, supported: {', '.join(METHODS)}")
        with pytest.raises(UnsupportedError, match=rf"config\.json: {message}"):
            self.read(tmp_path, {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16})
        own = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(own))
        with pytest.raises(UnsupportedError, match=rf"hf_quant_config\.json: {message}"):
            read_scheme(tmp_path, {})
        for other in ("{}", '{"quantization": 3}'):
            (tmp_path / "hf_quant_config.json").write_text(other)
            with pytest.raises(UnsupportedError, match="quantisation method 'modelopt', supported"):
                read_scheme(tmp_path, {})
        (tmp_path / "hf_quant_config.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"hf_quant_config\.json"):
            read_scheme(tmp_path, {})

    def test_none_at_all(self, tmp_path):
        for config in ({}, {"quantization_config": None}, {"text_config": None}, {"text_config": [3]}):
            with pytest.raises(
                CheckpointError, match=r"no quantize_config\.json and no quantization_config in config\.js"
            ):
                read_scheme(tmp_path, config)

    def test_a_file_that_is_no_object(self, tmp_path):
        (tmp_path / "quantize_config.json").write_text("4", encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"quantize_config\.json: got a JSON int"):
            read_scheme(tmp_path, {})
