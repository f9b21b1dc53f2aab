"""Checkpoint folders: what they load to, in what order, in how much memory, and every way to damage one."""

import json
import mmap
import random
import re
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import (
    edit_header,
    edit_json,
    edit_tensor,
    truncate,
    write_checkpoint,
    write_tensors,
)
from safetensors.numpy import load_file, save_file

from marlin_cy import reference
from marlin_cy.backends import get_backend
from marlin_cy.checkpoints.checkpoint import open_checkpoint
from marlin_cy.checkpoints.families import FAMILIES, MoeSpec
from marlin_cy.checkpoints.safetensors import SafetensorsFile
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.interface import Backend, StackBuilder

SHIPPED = Path(__file__).parents[1] / "marlin_cy" / "data" / "tiny-qwen3-moe-gptq-int4"
GATE = "model.layers.1.mlp.experts.2.gate_proj"
UP = "model.layers.1.mlp.experts.2.up_proj"
DOWN = "model.layers.0.mlp.experts.1.down_proj"
Q_PROJ = "model.layers.0.self_attn.q_proj"


class RecordingBuilder(StackBuilder):
    """Dequantises what it is given, and counts it."""

    def __init__(self, num_experts, k, n_per_expert, *, group_size, g_idx=None, codes="uint4", scale_dtype=np.float16):
        self.num_experts, self.k, self.n_per_expert = num_experts, k, n_per_expert
        self.codes, self.scale_dtype = codes, np.dtype(scale_dtype)
        self.weights = np.full((num_experts, k, n_per_expert), np.nan)
        self.group_size = group_size
        self.g_idx = g_idx
        self.adds = []

    def add(self, expert, column_offset, weight):
        expected = self.g_idx[expert] if isinstance(self.g_idx, list) else self.g_idx
        np.testing.assert_array_equal(weight.g_idx, expected)
        assert (weight.group_size, weight.codes, weight.scale.dtype) == (self.group_size, self.codes, self.scale_dtype)
        self.weights[expert, :, column_offset : column_offset + weight.n] = reference.dequantize_weight(weight)
        self.adds.append((expert, column_offset, weight.n))

    def finish(self, bias=None):
        assert not np.isnan(self.weights).any()
        self.bias = bias
        return self


class RecordingBackend(Backend):
    """Builds stacks that only remember: what is asked of a backend, without one."""

    name = "recording"

    def new_stack_builder(self, *args, **kwargs):
        return RecordingBuilder(*args, **kwargs)

    def _linear(self, stack, bias):
        return SimpleNamespace(weight=stack.weights[0], bias=bias)

    def new_context(self, **options):
        raise NotImplementedError

    from_host = to_host = empty = _route = _topk = _moe_forward = new_context


def open_recording(folder, **options):
    return open_checkpoint(folder, RecordingBackend(), **options)


def test_a_stack_names_the_expert_that_is_wrong():
    qweight, scales, qzeros = np.zeros((4, 8), np.int32), np.ones((1, 8), np.float16), np.zeros((1, 1), np.int32)
    stacked = {"scales": [scales, scales], "qzeros": [qzeros, qzeros], "bits": 4, "group_size": 32, "k": 32}
    load = RecordingBackend().load_gptq_stacked
    assert load([qweight, qweight], n_per_expert=8, **stacked).weights.shape == (2, 32, 8)
    with pytest.raises(TypeError, match="qweight of expert 1: got dtype int64"):
        load([qweight, qweight.astype(np.int64)], n_per_expert=8, **stacked)
    with pytest.raises(IndexError, match="g_idx of expert 1: got 1 at row 0, expected 0 to 0"):
        load([qweight, qweight], g_idx=[None, np.ones(32, np.int32)], n_per_expert=8, **stacked)


VARIANTS = [
    {},
    {"model_type": "mixtral"},
    {"model_type": "qwen2_moe", "sym": True},
    {"checkpoint_format": "gptq_v2"},
    {"shards": 3},
    {"desc_act": True, "group_size": 32, "inter": 128},
    {"desc_act": True, "model_type": "mixtral", "checkpoint_format": "gptq_v2", "shards": 2, "sym": True},
    {"group_size": -1},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_loads_what_was_written(tmp_path, variant):
    weights = write_checkpoint(tmp_path, seed=7, **variant)
    family = FAMILIES[variant.get("model_type", "qwen3_moe")]
    with open_recording(tmp_path) as checkpoint:
        assert checkpoint.family is family
        assert checkpoint.moe_layers == [0, 1]
        assert checkpoint.moe_spec == MoeSpec(3, 2, 64, variant.get("inter", 96))
        layer = checkpoint.moe_layer(1)
        for expert in range(3):
            gate, up, down = (
                weights[f"{checkpoint.moe_block(1)}.experts.{expert}.{projection}"]
                for projection in (family.gate, family.up, family.down)
            )
            np.testing.assert_array_equal(layer.gate_up.weights[expert], np.concatenate([gate, up], axis=1))
            np.testing.assert_array_equal(layer.down.weights[expert], down)
        assert (layer.top_k, layer.activation, layer.norm_topk_prob) == (2, "silu", True)
        assert checkpoint.linears == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
        linear = checkpoint.linear(Q_PROJ)
        np.testing.assert_array_equal(linear.weight, weights[Q_PROJ])
        np.testing.assert_array_equal(linear.bias, checkpoint.tensor(f"{Q_PROJ}.bias").astype(np.float32))
        assert checkpoint.router_weight(0).shape == (3, 64)


def test_every_column_is_added_once_and_progress_is_reported(tmp_path):
    write_checkpoint(tmp_path, num_experts=5)
    calls, threads = [], set()

    def progress(*call):
        calls.append(call)
        threads.add(threading.get_ident())

    layer = open_recording(tmp_path, progress=progress, num_threads=3).moe_layer(0)
    assert sorted(layer.gate_up.adds) == [(expert, offset, 96) for expert in range(5) for offset in (0, 96)]
    assert sorted(layer.down.adds) == [(expert, 0, 64) for expert in range(5)]
    assert calls == [(done, 5, "layer 0") for done in range(1, 6)]
    assert threads == {threading.get_ident()}


def test_an_exception_in_progress_ends_the_load(tmp_path):
    write_checkpoint(tmp_path)

    def stop(*_):
        raise KeyboardInterrupt

    checkpoint = open_recording(tmp_path, progress=stop)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.moe_layer(0)


def test_the_shipped_checkpoint():
    with open_recording(SHIPPED) as checkpoint:
        assert (checkpoint.format, checkpoint.scheme.group_size, checkpoint.scheme.sym) == ("gptq", 128, True)
        assert checkpoint.moe_spec == MoeSpec(8, 2, 256, 256)
        assert checkpoint.moe_layers == [0, 1, 2, 3]
        assert len(checkpoint.linears) == 16
        # Codes, scales, zero points and g_idx of 24 matrices of 256 by 256, group 128.
        assert checkpoint.expert_bytes(0) == 24 * (256 * 256 // 2 + 2 * 256 * 2 + 2 * 256 // 2 + 256 * 4)
        layer = checkpoint.moe_layer(3)
        assert layer.gate_up.weights.shape == (8, 256, 512)
        assert checkpoint.router_weight(0).dtype == ml_dtypes.bfloat16


def test_the_shipped_weights_mean_what_was_recorded():
    """The MoE block in float64 on the weights as read gives the recorded outputs, which are float32."""
    recorded = load_file(SHIPPED / "activations.safetensors")
    with open_recording(SHIPPED) as checkpoint:
        for index in checkpoint.moe_layers:
            hidden, logits, expected = (
                recorded[f"layers.{index}.{name}"].astype(np.float64)
                for name in ("hidden_states", "router_logits", "moe_output")
            )
            router = checkpoint.router_weight(index).astype(np.float64)
            np.testing.assert_allclose(hidden @ router.T, logits, atol=1e-4)
            layer = checkpoint.moe_layer(index)
            output = np.zeros_like(expected)
            chosen = np.argsort(-logits, axis=1, kind="stable")[:, :2]
            share = np.exp(np.take_along_axis(logits, chosen, axis=1))
            share /= share.sum(axis=1, keepdims=True)
            for token, rank in np.ndindex(chosen.shape):
                expert = chosen[token, rank]
                gate, up = np.split(hidden[token] @ layer.gate_up.weights[expert], 2)
                inner = gate / (1 + np.exp(-gate)) * up
                output[token] += share[token, rank] * (inner @ layer.down.weights[expert])
            assert np.linalg.norm(output - expected) <= 1e-6 * np.linalg.norm(expected), f"layer {index}"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"decoder_sparse_step": 2}, [1, 3]),
        ({"mlp_only_layers": [0, 3]}, [1, 2]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [3]),
    ],
)
def test_which_layers_are_moe(tmp_path, keys, expected):
    write_checkpoint(tmp_path, layers=4)
    edit_json(tmp_path, "config.json", **keys)
    checkpoint = open_recording(tmp_path)
    assert checkpoint.moe_layers == expected
    for call in (checkpoint.moe_layer, checkpoint.router_weight, checkpoint.expert_bytes):
        with pytest.raises(IndexError, match=re.escape(f"layer: got 4, expected one of the MoE layers: {expected}")):
            call(4)


def quantize_config_only(folder):
    edit_json(folder, "config.json", quantization_config=None)


def quantization_config_only(folder):
    (folder / "quantize_config.json").unlink()


def autogptq_keys(folder):
    quantize_config_only(folder)
    edit_json(folder, "quantize_config.json", quant_method=None, checkpoint_format=None, sym=None)


def gptqmodel_keys(folder):
    edit_json(folder, "quantize_config.json", method="gptq", format="gptq", checkpoint_format=None)


def expert_count_under_both_names(folder):
    edit_json(folder, "config.json", num_experts=3)


def another_file_name(folder):
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-64g.safetensors")


def zero_biases(folder):
    edit_tensor(folder, f"{GATE}.bias", lambda _: np.zeros(96, np.float16))


def no_g_idx(folder):
    edit_tensor(folder, f"{GATE}.g_idx", lambda _: None)


def bystanders(folder):
    save_file({"x": np.zeros(3)}, folder / "activations.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        quantize_config_only,
        quantization_config_only,
        autogptq_keys,
        gptqmodel_keys,
        expert_count_under_both_names,
        another_file_name,
        zero_biases,
        no_g_idx,
        bystanders,
    ],
)
def test_other_ways_to_say_the_same(tmp_path, change):
    weights = write_checkpoint(tmp_path)
    change(tmp_path)
    checkpoint = open_recording(tmp_path)
    np.testing.assert_array_equal(checkpoint.moe_layer(1).gate_up.weights[2, :, :96], weights[GATE])


def test_norm_topk_prob(tmp_path):
    """Qwen's config says, and false is transformers' default; Mixtral's has no such key."""
    write_checkpoint(tmp_path)
    edit_json(tmp_path, "config.json", norm_topk_prob=None)
    assert open_recording(tmp_path).moe_spec.norm_topk_prob is False
    write_checkpoint(tmp_path / "mixtral", model_type="mixtral")
    assert open_recording(tmp_path / "mixtral").moe_spec.norm_topk_prob is True


def config(**changes):
    return lambda folder: edit_json(folder, "config.json", **changes)


def quantization(**changes):
    """Change both files alike."""

    def change(folder):
        edit_json(folder, "quantize_config.json", **changes)
        edit_json(folder, "config.json", **{f"quantization_config__{key}": value for key, value in changes.items()})

    return change


def tensor(name, change):
    return lambda folder: edit_tensor(folder, name, change)


def cut(size):
    return lambda folder: truncate(folder / "model.safetensors", size)


def content(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def remove(name):
    return lambda folder: (folder / name).unlink()


def header(change):
    return lambda folder: edit_header(folder / "model.safetensors", change)


def header_bytes(text, data=b""):
    return content("model.safetensors", struct.pack("<Q", len(text)) + text + data)


def with_value(index, value):
    def change(array):
        array[index] = value
        return array

    return change


def wrong_end(entries):
    entries[f"{GATE}.qweight"]["data_offsets"][1] += 4
    return entries


def beyond_the_file(entries):
    last = max((name for name in entries if name != "__metadata__"), key=lambda name: entries[name]["data_offsets"])
    entries[last]["shape"][0] *= 1000
    begin, end = entries[last]["data_offsets"]
    entries[last]["data_offsets"] = [begin, begin + 1000 * (end - begin)]
    return entries


def sharded(change=None, remove_shard=None, **index):
    """Make it two shards, then change ``weight_map`` or take a shard away."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        write_tensors(folder, tensors, shards=2)
        if remove_shard:
            (folder / remove_shard).unlink()
        edit_json(folder, "model.safetensors.index.json", **index)

    return damage


def shuffled_g_idx(name):
    return tensor(name, lambda g_idx: g_idx[::-1].copy())


def folder_in_place_of_file(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def two_files(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


SHARD = "model-00002-of-00002.safetensors"
OPENING = [
    # Files.
    (shutil.rmtree, CheckpointError, r"config\.json: No such file"),
    (remove("config.json"), CheckpointError, r"config\.json: No such file"),
    (content("config.json", b""), CheckpointError, r"config\.json: not JSON"),
    (content("config.json", b"{'a': 1}"), CheckpointError, r"config\.json: not JSON"),
    (content("config.json", b"\xff\xfe{}"), CheckpointError, r"config\.json: not JSON"),
    (content("config.json", b"[" * 100_000), CheckpointError, r"config\.json: not JSON"),
    (content("config.json", b"[1]"), CheckpointError, r"config\.json: got a JSON list, expected an object"),
    (remove("model.safetensors"), CheckpointError, r"got none, expected model\.safetensors, one"),
    (two_files, CheckpointError, r"got a\.safetensors, b\.safetensors, expected"),
    (folder_in_place_of_file, CheckpointError, r"model\.safetensors: "),
    (cut(0), CheckpointError, r"model\.safetensors: .*header too small"),
    (cut(5), CheckpointError, r"model\.safetensors: .*header too small"),
    (cut(8), CheckpointError, r"model\.safetensors: .*header"),
    (cut(100), CheckpointError, r"model\.safetensors: .*header"),
    (cut(-1000), CheckpointError, r"model\.safetensors: .*not fully covered"),
    (cut(-1), CheckpointError, r"model\.safetensors: .*not fully covered"),
    (content("model.safetensors", b"\xff" * 100), CheckpointError, "header too large"),
    (header_bytes(b"not json"), CheckpointError, "invalid JSON in header"),
    (header_bytes(b"[]"), CheckpointError, "invalid JSON in header"),
    (header_bytes(b"{}", b"left over"), CheckpointError, "not fully covered"),
    (header(wrong_end), CheckpointError, r"model\.safetensors: .*(offset|shape|size)"),
    (header(beyond_the_file), CheckpointError, r"model\.safetensors: .*not fully covered"),
    # Shards.
    (sharded(remove_shard=SHARD), CheckpointError, rf"index\.json: the index names shard '{SHARD}', which is not"),
    (sharded(weight_map={"x": "../model.safetensors"}), CheckpointError, "names shard '../model.safetensors'"),
    (sharded(weight_map={"x": "a\0b"}), CheckpointError, "names shard"),
    (sharded(weight_map={"x": "y" * 1000}), CheckpointError, "names shard"),
    (sharded(weight_map={"x": SHARD}), CheckpointError, rf"{SHARD}, tensor 'x': missing"),
    (sharded(weight_map={"x": 3}), CheckpointError, r"index\.json: weight_map: expected an object"),
    (sharded(weight_map=None), CheckpointError, r"index\.json: weight_map: expected an object"),
    (sharded(weight_map={}), CheckpointError, "num_hidden_layers: got 2, but there are 0 tensors"),
    # The model's configuration.
    (
        config(model_type="llama"),
        UnsupportedError,
        r"model_type 'llama', supported: qwen2_moe, .*gpt_oss; they have tensors named model\.layers\.N\.mlp",
    ),
    (config(model_type=None), UnsupportedError, "model_type None"),
    (config(model_type=[]), UnsupportedError, r"model_type \[\]"),
    (config(hidden_size=None), CheckpointError, r"config\.json: hidden_size: missing"),
    (config(hidden_size="64"), CheckpointError, "hidden_size: got '64', expected int"),
    (config(hidden_size=64.0), CheckpointError, "hidden_size: got 64.0, expected int"),
    (config(hidden_size=True), CheckpointError, "hidden_size: got True, expected int"),
    (config(hidden_size=-64), CheckpointError, "hidden_size: got -64, expected a positive number"),
    (config(hidden_size=72), CheckpointError, r"config\.json: k: got 72, expected a positive multiple of 32"),
    (config(hidden_size=128), CheckpointError, r"gate_proj.qweight': got I32 \(8, 96\), expected I32 \(16, 96\)"),
    (
        config(moe_intermediate_size=64),
        CheckpointError,
        r"gate_proj.qweight': got I32 \(8, 96\), expected I32 \(8, 64\)",
    ),
    (config(num_local_experts=None), CheckpointError, "num_experts or num_local_experts or n_routed_experts: missing"),
    (config(num_experts=4), CheckpointError, "num_experts 4 and num_local_experts 3, which contradict each other"),
    (
        config(num_local_experts=4),
        CheckpointError,
        r"tensor 'model\.layers\.0\.mlp\.experts\.3\.gate_proj.qweight': missing",
    ),
    (config(num_local_experts=10**12), CheckpointError, r"experts\.3\.gate_proj.qweight': missing"),
    (config(num_experts_per_tok=4), CheckpointError, "num_experts_per_tok: got 4, expected at most .* 3"),
    (config(num_experts_per_tok=0), CheckpointError, "num_experts_per_tok: got 0"),
    (config(num_hidden_layers=3), CheckpointError, r"model\.safetensors, tensor 'model\.layers\.2\..*': missing"),
    (config(num_hidden_layers=10**12), CheckpointError, "num_hidden_layers: got 1000000000000, but there are"),
    (config(hidden_act="relu"), UnsupportedError, "hidden_act 'relu', supported: silu"),
    (config(norm_topk_prob="yes"), CheckpointError, "norm_topk_prob: got 'yes', expected bool"),
    (config(mlp_only_layers=3), CheckpointError, "mlp_only_layers: got 3, expected list"),
    (config(decoder_sparse_step=0), CheckpointError, "decoder_sparse_step: got 0, expected a positive number"),
    # The quantisation's.
    (quantization(bits=3), UnsupportedError, "bits: got 3, only 4 is supported"),
    (quantization(bits=None), CheckpointError, "bits: missing"),
    (quantization(bits="4"), CheckpointError, "bits: got '4', expected int"),
    (quantization(group_size=16), UnsupportedError, "group_size: got 16, supported are 32"),
    (quantization(group_size=-7), CheckpointError, r"config\.json: group_size: got -7"),
    (quantization(group_size=None), CheckpointError, "group_size: missing"),
    (
        quantization(group_size=32),
        CheckpointError,
        r"gate_proj.scales': got F16 \(1, 96\), expected F16 or BF16 \(2, 96\)",
    ),
    (
        quantization(quant_method="aqlm"),
        UnsupportedError,
        "quantisation method 'aqlm', supported: gptq, awq, auto-round",
    ),
    (quantization(quant_method="awq"), UnsupportedError, "version 'gptq' of AWQ, supported: gemm, marlin"),
    (quantization(quant_method=7), CheckpointError, "quant_method: got 7, expected str"),
    (quantization(method="awq"), CheckpointError, "quant_method 'gptq' and method 'awq', which contradict"),
    (
        quantization(checkpoint_format="marlin"),
        UnsupportedError,
        "group_size: got 64, Marlin has 128 and -1 for one group",
    ),
    (
        quantization(format="gptq_v2"),
        CheckpointError,
        "checkpoint_format 'gptq' and format 'gptq_v2', which contradict",
    ),
    (
        config(quantization_config=[]),
        CheckpointError,
        r"config\.json: quantization_config: got \[\], expected an object",
    ),
    (content("quantize_config.json", b"4"), CheckpointError, r"quantize_config\.json: got a JSON int"),
    (
        config(quantization_config__group_size=32),
        CheckpointError,
        "group_size: got 32 in quantization_config, but .* 64",
    ),
    (config(quantization_config__desc_act=True), CheckpointError, "desc_act: got True"),
    (config(quantization_config__sym=True), CheckpointError, "sym: got True"),
    (config(quantization_config__checkpoint_format="gptq_v2"), CheckpointError, "checkpoint_format: got 'gptq_v2'"),
    (
        lambda folder: (remove("quantize_config.json")(folder), config(quantization_config=None)(folder)),
        CheckpointError,
        r"no quantize_config\.json and no quantization_config in config\.json",
    ),
    # Tensors.
    (
        tensor(f"{DOWN}.qweight", lambda _: None),
        CheckpointError,
        rf"model\.safetensors, tensor '{DOWN}.qweight': missing",
    ),
    (tensor(f"{GATE}.scales", lambda _: None), CheckpointError, rf"tensor '{GATE}.scales': missing"),
    (tensor(f"{UP}.qzeros", lambda _: None), CheckpointError, rf"tensor '{UP}.qzeros': missing"),
    (tensor(f"{GATE}.qweight", lambda q: q[:-1]), CheckpointError, r"got I32 \(7, 96\), expected I32 \(8, 96\)"),
    (tensor(f"{GATE}.qweight", lambda q: q.astype(np.int64)), CheckpointError, "got I64 .* expected I32"),
    (tensor(f"{GATE}.qweight", lambda q: q.ravel()), CheckpointError, r"got I32 \(768,\), expected I32 \(8, 96\)"),
    (tensor(f"{GATE}.scales", lambda s: s.astype(np.float32)), CheckpointError, "got F32 .* expected F16"),
    (tensor(f"{GATE}.g_idx", lambda g: g[:-1]), CheckpointError, r"got I32 \(63,\), expected I32 \(64,\)"),
    (tensor(f"{GATE}.bias", lambda _: np.ones(95, np.float16)), CheckpointError, r"bias': got F16 \(95,\)"),
    (
        lambda folder: (quantization(desc_act=True)(folder), no_g_idx(folder)),
        CheckpointError,
        rf"tensor '{GATE}.g_idx': missing",
    ),
]
LOADING = [
    (
        tensor(f"{GATE}.scales", with_value((0, 5), np.nan)),
        CheckpointError,
        rf"{GATE}.scales': scales: got nan at \[0, 5\]",
    ),
    (
        tensor(f"{UP}.scales", with_value((0, 0), np.inf)),
        CheckpointError,
        rf"{UP}.scales': scales: got inf at \[0, 0\]",
    ),
    (
        tensor(f"{GATE}.g_idx", with_value(9, 1)),
        CheckpointError,
        rf"{GATE}.g_idx': g_idx: got 1 at row 9, expected 0 to 0",
    ),
    (tensor(f"{GATE}.g_idx", with_value(0, -1)), CheckpointError, rf"{GATE}.g_idx': g_idx: got -1 at row 0"),
]


def case_ids(cases):
    return [f"{number}-{message[:40]}" for number, (_, _, message) in enumerate(cases)]


@pytest.mark.parametrize(("damage", "exception", "message"), OPENING, ids=case_ids(OPENING))
def test_refused_when_opening(tmp_path, damage, exception, message):
    write_checkpoint(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(exception, match=message):
        open_recording(tmp_path / "model")


@pytest.mark.parametrize(("damage", "exception", "message"), LOADING, ids=case_ids(LOADING))
def test_refused_when_loading(tmp_path, damage, exception, message):
    write_checkpoint(tmp_path)
    damage(tmp_path)
    checkpoint = open_recording(tmp_path)
    with pytest.raises(exception, match=message):
        checkpoint.moe_layer(1)
    checkpoint.moe_layer(0)


def test_gate_and_up_in_different_orders(tmp_path):
    write_checkpoint(tmp_path, desc_act=True, group_size=32)
    shuffled_g_idx(f"{UP}.g_idx")(tmp_path)
    checkpoint = open_recording(tmp_path)
    with pytest.raises(UnsupportedError, match=rf"{GATE} and {UP} order K differently \(desc_act\)"):
        checkpoint.moe_layer(1)
    assert checkpoint.linear(UP).weight.shape == (64, 96)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.norm", None, r"model\.safetensors, tensor 'model\.norm\.qweight': missing"),
        (Q_PROJ, tensor(f"{Q_PROJ}.qweight", lambda q: q.ravel()), r"q_proj\.qweight': got shape \(256,\)"),
        (Q_PROJ, tensor(f"{Q_PROJ}.qweight", lambda q: q[:1]), "k: got 8, expected a positive multiple of 32"),
        (Q_PROJ, tensor(f"{Q_PROJ}.qzeros", lambda z: z[:, :1]), r"q_proj\.qzeros': got I32 \(1, 1\)"),
        (Q_PROJ, tensor(f"{Q_PROJ}.bias", lambda b: b[:1]), r"q_proj\.bias': got F16 \(1,\)"),
        (
            Q_PROJ,
            tensor(f"{Q_PROJ}.scales", with_value((0, 3), np.nan)),
            r"q_proj\.scales': scales: got nan at \[0, 3\]",
        ),
        (Q_PROJ, tensor(f"{Q_PROJ}.g_idx", with_value(1, 5)), r"q_proj\.g_idx': g_idx: got 5 at row 1"),
    ],
)
def test_linear_refused(tmp_path, name, change, message):
    write_checkpoint(tmp_path)
    if change:
        change(tmp_path)
    checkpoint = open_recording(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.linear(name)


def test_router_refused(tmp_path):
    write_checkpoint(tmp_path)
    tensor("model.layers.0.mlp.gate.weight", lambda weight: weight[:2])(tmp_path)
    tensor("model.layers.1.mlp.gate.weight", lambda _: None)(tmp_path)
    checkpoint = open_recording(tmp_path)
    with pytest.raises(CheckpointError, match=r"gate\.weight': got F32 \(2, 64\), expected F32 \(3, 64\)"):
        checkpoint.router_weight(0)
    with pytest.raises(CheckpointError, match=r"gate\.weight': missing"):
        checkpoint.router_weight(1)


@pytest.mark.parametrize(
    ("options", "exception", "message"),
    [
        ({"backend": 3}, TypeError, "backend: got int, expected a name or a Backend"),
        ({"backend": "abacus"}, ValueError, "'abacus'"),
        ({"progress": 3}, TypeError, "progress: got int, expected a callable or None"),
        ({"num_threads": 0}, ValueError, "num_threads: got 0, expected 1 to 4096"),
        ({"num_threads": 1.5}, TypeError, "num_threads: got 1.5, expected an int"),
        ({"num_threads": True}, TypeError, "num_threads: got True, expected an int"),
    ],
)
def test_options_refused(options, exception, message):
    with pytest.raises(exception, match=message):
        open_checkpoint(SHIPPED, **({"backend": RecordingBackend()} | options))


def test_views(tmp_path):
    """Every dtype reads as what was written; views outlive the file, and survive a release."""
    rng = np.random.default_rng(0)
    dtypes = [np.float16, np.float32, np.float64, np.int8, np.uint8, np.int32, np.int64, np.bool_, ml_dtypes.bfloat16]
    tensors = {np.dtype(dtype).name: rng.integers(0, 2, (5, 3)).astype(dtype) for dtype in dtypes}
    tensors |= {"scalar": np.array(7.0), "empty": np.zeros((0, 4), np.int32)}
    save_file(tensors, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file.names) == set(tensors)
    views = {}
    for name, expected in tensors.items():
        views[name] = file.tensor(name)
        file.release(name)
        assert file.info(name).shape == expected.shape
        assert file.info(name).nbytes == expected.nbytes
    file.close()
    for name, expected in tensors.items():
        np.testing.assert_array_equal(views[name], expected)
        assert views[name].dtype == expected.dtype
        assert not views[name].flags.writeable
    with pytest.raises(ValueError, match="was closed"):
        file.tensor("float16")
    with pytest.raises(CheckpointError, match="tensor 'y': missing"):
        file.tensor("y")


def test_unaligned_tensors(tmp_path):
    """The format allows any offset; arrays are aligned all the same."""
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "I32", "shape": [2], "data_offsets": [1, 9]},
        "c": {"dtype": "F4", "shape": [2], "data_offsets": [9, 10]},
    }
    header_bytes(json.dumps(header).encode(), b"\x05" + np.array([1, -2], "<i4").tobytes() + b"\0")(tmp_path)
    file = SafetensorsFile(tmp_path / "model.safetensors")
    assert file.tensor("b").tolist() == [1, -2]
    assert file.tensor("b").flags.aligned
    with pytest.raises(UnsupportedError, match="tensor 'c': dtype F4 has no NumPy equivalent"):
        file.tensor("c")


def test_duplicate_names_in_the_header(tmp_path):
    """Whichever entry is believed, no view may reach beyond the file."""
    entry = b'"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}'
    for sizes in ((2, 2000), (2000, 2)):
        header_bytes(b"{%b,%b}" % tuple(entry % (size, size) for size in sizes), b"zz")(tmp_path)
        try:
            assert SafetensorsFile(tmp_path / "model.safetensors").tensor("a").tobytes() == b"zz"
        except CheckpointError:
            continue


def try_to_load(folder):
    """Load all there is; only the exceptions of a bad checkpoint may come out."""
    try:
        with open_recording(folder, num_threads=1) as checkpoint:
            for name in checkpoint.tensor_names:
                checkpoint.tensor(name).sum()
            for layer in checkpoint.moe_layers:
                checkpoint.moe_layer(layer)
                checkpoint.router_weight(layer)
            for name in checkpoint.linears:
                checkpoint.linear(name)
    except (CheckpointError, UnsupportedError):
        return False
    return True


def mutated(rng, data):
    """``data`` with a few bytes changed, a piece cut out, or the end cut off."""
    data = bytearray(data)
    kind = rng.random()
    if kind < 0.6:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind < 0.8:
        data = data[: rng.randrange(len(data))]
    else:
        begin = rng.randrange(len(data))
        data[begin : begin + rng.randint(1, 20)] = bytes(
            rng.choices(b'0123456789-"{}[],:eE.nullx\\\0\xff', k=rng.randint(0, 5))
        )
    return bytes(data)


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json", "model.safetensors", "index"])
def test_random_damage(tmp_path, name):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    write_checkpoint(tmp_path, layers=1, num_experts=2, hidden=32, inter=32, shards=2 if name == "index" else 1)
    path = tmp_path / ("model.safetensors.index.json" if name == "index" else name)
    original = path.read_bytes()
    damaged_part = 8 + struct.unpack_from("<Q", original)[0] if name == "model.safetensors" else len(original)
    loaded = 0
    for _ in range(150):
        path.write_bytes(mutated(rng, original[:damaged_part]) + original[damaged_part:])
        loaded += try_to_load(tmp_path)
    assert loaded < 150
    path.write_bytes(original)
    assert try_to_load(tmp_path)


PEAK_PROGRAM = """
import sys
from pathlib import Path
from marlin_cy.checkpoints.checkpoint import open_checkpoint

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

warm = open_checkpoint(sys.argv[1], "cpu", num_threads=2).moe_layer(0)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
layer = open_checkpoint(sys.argv[2], "cpu", num_threads=2).moe_layer(0)
packed = layer.gate_up.metadata.packed_bytes + layer.down.metadata.packed_bytes
print((status("VmHWM") - before) / packed)
"""


class TestOnTheCpu:
    """With a real backend."""

    @pytest.mark.parametrize("variant", VARIANTS, ids=str)
    def test_experts_compute_what_was_written(self, tmp_path, variant):
        weights = write_checkpoint(tmp_path, seed=11, **variant)
        backend = get_backend("cpu")
        context = backend.new_context()
        checkpoint = open_checkpoint(tmp_path, backend)
        family, layer = checkpoint.family, checkpoint.moe_layer(1)
        for expert in range(3):
            gate, up, down = (
                weights[f"{checkpoint.moe_block(1)}.experts.{expert}.{projection}"]
                for projection in (family.gate, family.up, family.down)
            )
            for stack, weight in ((layer.gate_up, np.concatenate([gate, up], axis=1)), (layer.down, down)):
                rows = np.random.default_rng(expert).standard_normal((3, stack.k)).astype(np.float32)
                output = np.zeros((3, stack.n_per_expert), np.float32)
                stack.gemm_phase_batched(context, rows, [(expert, 0, 0, 3)], output, stack.k)
                expected = rows.astype(np.float64) @ weight
                assert np.linalg.norm(output - expected) <= 1e-4 * np.linalg.norm(expected)

    def test_recorded_activations(self):
        """Each layer of the shipped checkpoint gives what was recorded when it was made."""
        backend = get_backend("cpu")
        recorded = load_file(SHIPPED / "activations.safetensors")
        context = backend.new_context()
        with open_checkpoint(SHIPPED, backend) as checkpoint:
            for index in checkpoint.moe_layers:
                layer = checkpoint.moe_layer(index)
                of_layer = {name: recorded[f"layers.{index}.{name}"] for name in ("hidden_states", "router_logits")}
                output = layer(context, **of_layer)
                expected = recorded[f"layers.{index}.moe_output"].astype(np.float64)
                error = np.linalg.norm(output - expected) / np.linalg.norm(expected)
                assert error <= 2e-4, f"layer {index}"

    @pytest.mark.skipif(
        not hasattr(mmap, "MADV_DONTNEED") or sys.platform != "linux", reason="Linux's /proc and madvise"
    )
    def test_peak_memory(self, tmp_path):
        """Loading 100 MB takes less than 1.25 times the packed size."""
        write_checkpoint(
            tmp_path, layers=1, num_experts=32, hidden=2048, inter=1024, group_size=128, with_weights=False
        )
        command = [sys.executable, "-c", PEAK_PROGRAM, SHIPPED, tmp_path]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert float(result.stdout) < 1.25
