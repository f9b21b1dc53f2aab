"""Damaged checkpoint folders: every kind of damage is refused by name, and random damage never does worse."""

import random
import shutil
import struct

import numpy as np
import pytest
from checkpoint_files import (
    edit_header,
    edit_json,
    edit_tensor,
    header_bytes,
    truncate,
    write_checkpoint,
    write_tensors,
)
from recording import DOWN, GATE, Q_PROJ, UP, open_recording
from safetensors.numpy import load_file

from marlin_cy.errors import CheckpointError, UnsupportedError


def config(**changes):
    return lambda folder: edit_json(folder, "config.json", **changes)


def quantization(**changes):
    """Make the same change to both files."""

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


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + 32 * b"ab" + b"\nsize 123456\n"
SHARD = "model-00002-of-00002.safetensors"
OPENING = [
    # Files.
    (shutil.rmtree, CheckpointError, r"config\.json: No such file"),
    (remove("config.json"), CheckpointError, r"config\.json: No such file"),
    (content("config.json", b""), CheckpointError, r"config\.json: is empty"),
    (content("config.json", b"{'a': 1}"), CheckpointError, r"config\.json: not JSON"),
    (content("config.json", b"\xff\xfe{}"), CheckpointError, r"config\.json: not JSON"),
    (content("config.json", b"[" * 100_000), CheckpointError, r"config\.json: not JSON"),
    (content("config.json", b"[1]"), CheckpointError, r"config\.json: got a JSON list, expected an object"),
    (remove("model.safetensors"), CheckpointError, r"got none, expected model\.safetensors, one"),
    (two_files, CheckpointError, r"got a\.safetensors, b\.safetensors, expected"),
    (folder_in_place_of_file, CheckpointError, r"model\.safetensors: "),
    (cut(0), CheckpointError, r"model\.safetensors: is empty, as after a failed download"),
    (
        content("model.safetensors", LFS_POINTER),
        CheckpointError,
        r"model\.safetensors: is a Git LFS pointer: .*git lfs",
    ),
    (content("model.safetensors", b"\n<!DOCTYPE html>"), CheckpointError, r"model\.safetensors: is a web page"),
    (content("config.json", LFS_POINTER), CheckpointError, r"config\.json: is a Git LFS pointer"),
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
    (
        config(num_local_experts=None),
        CheckpointError,
        "num_experts or num_local_experts or n_routed_experts or .*: missing",
    ),
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
    (quantization(bits=3), UnsupportedError, "bits: got 3, supported: 4, 8"),
    (quantization(bits=None), CheckpointError, "bits: missing"),
    (quantization(bits="4"), CheckpointError, "bits: got '4', expected int"),
    (quantization(group_size=16), UnsupportedError, "group_size: got 16, supported are 32"),
    (quantization(group_size=-7), CheckpointError, r"config\.json: group_size: got -7"),
    (quantization(group_size=None), CheckpointError, "group_size: missing"),
    (
        quantization(group_size=32),
        CheckpointError,
        r"gate_proj.scales': got F16 \(1, 96\), expected F16 or BF16 or F32 \(2, 96\)",
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
    (tensor(f"{GATE}.scales", lambda s: s.astype(np.float64)), CheckpointError, "got F64 .* expected F16"),
    (tensor(f"{GATE}.g_idx", lambda g: g[:-1]), CheckpointError, r"got I32 \(63,\), expected I32 \(64,\)"),
    (
        tensor(f"{GATE}.weight", lambda _: np.ones((96, 64), np.float16)),
        CheckpointError,
        rf"tensor '{GATE}.weight': layers of format 'gptq' with these settings have no such tensor",
    ),
    (tensor(f"{GATE}.weight_zero_point", lambda _: np.ones(3, np.int32)), CheckpointError, "zero_point': layers of"),
    (tensor(f"{GATE}.bias", lambda _: np.ones(95, np.float16)), CheckpointError, r"bias': got F16 \(95,\)"),
    (
        lambda folder: (quantization(desc_act=True)(folder), edit_tensor(folder, f"{GATE}.g_idx", lambda _: None)),
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


def test_zero_points_that_contradict_the_config(tmp_path):
    write_checkpoint(tmp_path)
    quantization(sym=True)(tmp_path)
    message = r"qzeros: got zero point [0-9]+ at \[0, [0-9]+\], expected 8, as the config says sym: true"
    with pytest.raises(CheckpointError, match=message):
        open_recording(tmp_path).moe_layer(0)


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


def try_to_load(folder):
    """Load everything. Only the exceptions of a damaged checkpoint may be raised; returns whether there was none."""
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
def test_random_damage(tmp_path, rng, name):
    rng = random.Random(int(rng.integers(2**32)))
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
