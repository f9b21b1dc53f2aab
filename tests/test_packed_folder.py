"""Packed folders: their contents, equal results, and every way to damage one."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from asserts import assert_same_bits
from checkpoint_files import edit_header, edit_json, truncate, write_checkpoint, write_gpt_oss

import marlin_cy
from marlin_cy import get_backend, open_checkpoint
from marlin_cy.checkpoints import packed_writer
from marlin_cy.checkpoints.packed import FORMAT_VERSION
from marlin_cy.checkpoints.packed_writer import write_packed
from marlin_cy.checkpoints.safetensors import SafetensorsFolder
from marlin_cy.cli import main
from marlin_cy.errors import CheckpointError

VARIANTS = {
    "plain": {"group_size": 32},
    "one group, shards": {"group_size": -1, "shards": 2},
    "act-order": {"group_size": 32, "desc_act": True},
    "shared expert, biases": {"model_type": "qwen2_moe", "group_size": 32, "shared": 96, "expert_bias": True},
    "a dense layer": {"group_size": 32, "layers": 3, "dense_layers": (1,)},
    "correction bias": {"model_type": "deepseek_v3", "num_experts": 4, "group_size": 32, "shared": 96},
}


def pack(source, out):
    with open_checkpoint(source) as checkpoint:
        return write_packed(checkpoint, out)


@pytest.fixture
def packed(tmp_path):
    write_checkpoint(tmp_path / "source", group_size=32)
    pack(tmp_path / "source", tmp_path / "packed")
    return tmp_path / "packed"


def outputs(checkpoint, backend, rng):
    """Of every MoE layer and linear layer, for the same input each time."""
    ctx, found = backend.new_context(), {}
    for index in checkpoint.moe_layers:
        layer = checkpoint.moe_layer(index)
        x = np.random.default_rng(index).standard_normal((7, layer.hidden_size), np.float32)
        logits = x @ checkpoint.router_weight(index).astype(np.float32).T
        out = layer(ctx, backend.from_host(x), backend.from_host(logits))
        found[index] = backend.to_host(out)
    for name in checkpoint.linears:
        linear = checkpoint.linear(name)
        x = np.random.default_rng(0).standard_normal((3, linear.in_features), np.float32)
        out = backend.empty((3, linear.out_features), np.float32)
        linear.forward(ctx, backend.from_host(x), out, 3)
        found[name] = backend.to_host(out)
    return found


@pytest.mark.sampled(4)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gives_the_same_bits(tmp_path, backend, rng, variant):
    write_checkpoint(tmp_path / "source", **VARIANTS[variant])
    written = pack(tmp_path / "source", tmp_path / "packed")
    with (
        open_checkpoint(tmp_path / "source", backend=backend) as source,
        open_checkpoint(tmp_path / "packed", backend=backend, verify=True) as packed,
    ):
        assert packed.format == "packed"
        for attribute in ("moe_layers", "dense_moe_layers", "moe_spec", "family"):
            assert getattr(packed, attribute) == getattr(source, attribute)
        assert sorted(packed.linears) == sorted(source.linears)
        assert written["stacks"] == 2 * len(source.moe_layers) + len(source.linears)
        expected, actual = outputs(source, backend, rng), outputs(packed, backend, rng)
        assert expected.keys() == actual.keys()
        for name, out in expected.items():
            assert np.isfinite(out).all()
            assert_same_bits(actual[name], out)


def test_gpt_oss(tmp_path, backend, rng):
    write_gpt_oss(tmp_path / "source")
    pack(tmp_path / "source", tmp_path / "packed")
    with (
        open_checkpoint(tmp_path / "source", backend=backend) as source,
        open_checkpoint(tmp_path / "packed", backend=backend) as packed,
    ):
        assert_same_bits(outputs(packed, backend, rng)[0], outputs(source, backend, rng)[0])
        np.testing.assert_array_equal(packed.moe_layer(0).gate_up.bias, source.moe_layer(0).gate_up.bias)


def test_all_other_tensors_are_as_they_were(tmp_path):
    write_checkpoint(tmp_path / "source", layers=3, dense_layers=(1,), model_type="qwen2_moe", shared=96)
    (tmp_path / "source" / "tokenizer.json").write_text('{"a": "tokenizer"}')
    pack(tmp_path / "source", tmp_path / "packed")
    with open_checkpoint(tmp_path / "source") as source, open_checkpoint(tmp_path / "packed") as packed:
        own = set(source.tensor_names) - set(source.quantized_tensors)
        assert own == set(packed.tensor_names) - set(packed.quantized_tensors)
        for name in own:
            assert packed.tensor_info(name).dtype == source.tensor_info(name).dtype
            np.testing.assert_array_equal(packed.tensor(name), source.tensor(name))
        expected = dict(source.config)
        quantization = packed.config["quantization_config"]
        assert quantization["source"].items() >= expected.pop("quantization_config").items()
        assert {name: value for name, value in packed.config.items() if name != "quantization_config"} == expected
    assert (tmp_path / "packed" / "tokenizer.json").read_text() == '{"a": "tokenizer"}'
    assert not (tmp_path / "packed" / "quantize_config.json").exists()


def test_packed_tensors_are_aligned_and_mapped(packed):
    tensors = SafetensorsFolder(packed)
    names = [name for name in tensors.names if name.endswith(".packed")]
    assert len(names) == 6
    assert all(tensors.info(name).begin % 64 == 0 for name in names)
    with open_checkpoint(packed) as checkpoint:
        layer = checkpoint.moe_layer(0)
        data = layer.gate_up.store.data
        assert not data.flags.owndata
        assert not data.flags.writeable
        assert data.nbytes == layer.gate_up.store.nbytes
    x = np.ones((1, layer.hidden_size), np.float32)  # the file is closed, and stays mapped
    assert np.isfinite(layer(get_backend("cpu").new_context(), x, np.ones((1, 3), np.float32))).all()


def test_one_isa_reads_what_another_wrote(tmp_path, packed):
    """The file does not depend on the instruction set: the generic kernels write and read the same."""
    script = (
        "import sys; from pathlib import Path\n"
        "from marlin_cy import open_checkpoint\n"
        "from marlin_cy.checkpoints.packed_writer import write_packed\n"
        "with open_checkpoint(sys.argv[1]) as checkpoint: write_packed(checkpoint, sys.argv[2])\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "source", tmp_path / "again"],
        check=True,
        env=os.environ | {"MARLIN_CY_ISA": "generic"},
    )
    for path in packed.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def edit_description(folder, change, *, keep_sum=False):
    """Change packed.json, and with it the checksum in config.json."""
    file = folder / "packed.json"
    description = json.loads(file.read_text())
    change(description)
    file.write_text(json.dumps(description))
    if not keep_sum:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        edit_json(folder, "config.json", quantization_config__packed_sha256=digest)


STACK = "model.layers.0.mlp.experts.gate_up"
LINEAR = "model.layers.0.self_attn.q_proj"
FILE = "model-00002-of-00002.safetensors"


def in_stack(name=STACK, **changes):
    return lambda folder: edit_description(folder, lambda description: description["stacks"][name].update(changes))


def in_header(name, **changes):
    def change(entries):
        entries[name].update(changes)
        return entries

    return lambda folder: edit_header(folder / file_of(folder, name), change)


def file_of(folder, name):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


DAMAGES = {
    "newer version in config": (
        lambda folder: edit_json(folder, "config.json", quantization_config__format_version=FORMAT_VERSION + 1),
        rf"config\.json: format_version: got {FORMAT_VERSION + 1}, this version of marlin_cy reads up to",
    ),
    "newer version in description": (
        lambda folder: edit_description(folder, lambda d: d.update(format_version=99)),
        r"packed\.json: format_version: got 99, this version",
    ),
    "no version": (
        lambda folder: edit_json(folder, "config.json", quantization_config__format_version=None),
        "format_version: missing",
    ),
    "description changed": (
        lambda folder: edit_description(folder, lambda d: d["stacks"].clear(), keep_sum=True),
        r"packed\.json: got SHA-256 [0-9a-f]{64}, expected",
    ),
    "description missing": (lambda folder: (folder / "packed.json").unlink(), r"packed\.json: No such file"),
    "description no JSON": (lambda folder: (folder / "packed.json").write_text("{"), r"packed\.json: not JSON"),
    "stack is no object": (
        lambda folder: edit_description(folder, lambda d: d["stacks"].update({STACK: 3})),
        rf"{STACK}: got 3, expected an object",
    ),
    "other k": (in_stack(k=96), r"got experts, k, n \(3, 96, 192\), config\.json says \(3, 64, 192\)"),
    "other k of a linear": (in_stack(LINEAR, k=96), rf"{LINEAR}\.packed': data: got shape .*, expected contiguous"),
    "k off the step": (in_stack(LINEAR, k=72), rf"{LINEAR}\.packed': k: got 72, expected a positive multiple of 32"),
    "negative k": (in_stack(k=-64), "k: got -64, expected a positive number"),
    "other n": (in_stack(LINEAR, n=96), rf"{LINEAR}\.packed': data: got shape .*, expected contiguous"),
    "other experts": (in_stack(num_experts=4), r"got U8 \(3, \d+\), expected U8 \(4, bytes\)"),
    "experts as text": (in_stack(num_experts="3"), "num_experts: got '3', expected int"),
    "unknown codes": (in_stack(codes="uint3"), "codes: got 'uint3', expected one of uint4, e2m1"),
    "unknown scales": (in_stack(scale_dtype="float8"), "scale_dtype: got 'float8', expected one of float16"),
    "other group size": (in_stack(group_size=64), rf"{STACK}\.packed': data: got shape .*, expected contiguous"),
    "group size off": (in_stack(group_size=48), rf"{STACK}\.packed': group_size: got 48, supported are 32"),
    "tensor cut": (lambda folder: truncate(folder / FILE, -1), "not fully covered"),
    "file missing": (lambda folder: (folder / FILE).unlink(), "which is not in the folder"),
    "stack of a layer missing": (
        lambda folder: edit_description(folder, lambda d: d["stacks"].pop(STACK)),
        rf"packed\.json: {STACK}: missing",
    ),
    "other shape": (in_header(f"{STACK}.packed", shape=[1, 3]), "shape|offset|size|invalid"),
    "bias of another shape": (
        in_header(f"{LINEAR}.bias", shape=[4, 8]),
        rf"{LINEAR}\.bias': got F16 \(4, 8\), expected F16 \(32,\)",
    ),
    "config of another model": (
        lambda folder: edit_json(folder, "config.json", moe_intermediate_size=64),
        r"got experts, k, n \(3, 64, 192\), config\.json says \(3, 64, 128\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged(packed, damage):
    change, message = DAMAGES[damage]
    change(packed)
    with pytest.raises(CheckpointError, match=message), open_checkpoint(packed) as checkpoint:
        for layer in checkpoint.moe_layers:
            checkpoint.moe_layer(layer)
        for name in checkpoint.linears:
            checkpoint.linear(name)


def test_a_flipped_bit_is_found_by_its_checksum(packed, capsys):
    name = f"{STACK}.packed"
    path = packed / file_of(packed, name)
    begin = SafetensorsFolder(packed).info(name).begin
    content = bytearray(path.read_bytes())
    content[begin + 1000] ^= 4
    path.write_bytes(content)
    open_checkpoint(packed).close()
    with pytest.raises(CheckpointError, match=rf"tensor '{name}': got SHA-256 .*: the file was damaged"):
        open_checkpoint(packed, verify=True)
    assert main(["inspect", str(packed), "--verify"]) == 1
    assert "the file was damaged" in capsys.readouterr().err


def test_g_idx_out_of_range(tmp_path):
    write_checkpoint(tmp_path / "source", group_size=32, desc_act=True)
    pack(tmp_path / "source", tmp_path / "packed")
    name = f"{STACK}.g_idx"
    path = tmp_path / "packed" / file_of(tmp_path / "packed", name)
    begin = SafetensorsFolder(tmp_path / "packed").info(name).begin
    content = bytearray(path.read_bytes())
    content[begin : begin + 4] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    with (
        open_checkpoint(tmp_path / "packed") as checkpoint,
        pytest.raises(CheckpointError, match=rf"{name}': got 0 to 2147483647, expected 0 to 1"),
    ):
        checkpoint.moe_layer(0)


class TestWriting:
    def test_where_something_is(self, packed, tmp_path):
        before = sorted(packed.iterdir())
        with open_checkpoint(tmp_path / "source") as checkpoint, pytest.raises(FileExistsError, match="exists already"):
            write_packed(checkpoint, packed)
        assert sorted(packed.iterdir()) == before

    def test_packed_again(self, packed, tmp_path):
        with open_checkpoint(packed) as checkpoint, pytest.raises(CheckpointError, match="packed already"):
            write_packed(checkpoint, tmp_path / "twice")
        assert not (tmp_path / "twice").exists()

    def test_into_an_empty_folder(self, tmp_path):
        write_checkpoint(tmp_path / "source")
        (tmp_path / "out").mkdir()
        pack(tmp_path / "source", tmp_path / "out")
        open_checkpoint(tmp_path / "out").close()

    def test_an_empty_folder_is_filled_in_place(self, tmp_path):
        """The folder stays the same one: a shell, or a mount, may be in it."""
        write_checkpoint(tmp_path / "source")
        (tmp_path / "out").mkdir()
        before = (tmp_path / "out").stat().st_ino
        pack(tmp_path / "source", tmp_path / "out")
        assert (tmp_path / "out").stat().st_ino == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]

    def test_through_a_link(self, tmp_path):
        write_checkpoint(tmp_path / "source")
        (tmp_path / "out").mkdir()
        (tmp_path / "link").symlink_to("out", target_is_directory=True)
        pack(tmp_path / "source", tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        open_checkpoint(tmp_path / "out").close()

    @pytest.mark.parametrize("existed", [False, True])
    @pytest.mark.parametrize("at", ["a tensor", "a JSON file"])
    def test_nothing_is_left_of_what_failed(self, tmp_path, monkeypatch, at, existed):
        write_checkpoint(tmp_path / "source")
        if existed:
            (tmp_path / "out").mkdir()

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        if at == "a tensor":
            monkeypatch.setattr("marlin_cy.checkpoints.packed_writer.sha256_of", full)
        else:
            monkeypatch.setattr(packed_writer.PackedFolderWriter, "_config", full)
        with open_checkpoint(tmp_path / "source") as checkpoint, pytest.raises(OSError, match="No space left"):
            write_packed(checkpoint, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"] * existed + ["source"]
        assert not existed or not any((tmp_path / "out").iterdir())

    def test_files_of_others_stay(self, tmp_path):
        """A file that appears meanwhile is not overwritten, and not removed."""
        write_checkpoint(tmp_path / "source")
        (tmp_path / "source" / "tokenizer.json").write_text("{}")

        def progress(*_):
            (tmp_path / "out" / "tokenizer.json").write_text("mine")

        with open_checkpoint(tmp_path / "source") as checkpoint, pytest.raises(FileExistsError, match="tokenizer"):
            write_packed(checkpoint, tmp_path / "out", progress)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["tokenizer.json"]
        assert (tmp_path / "out" / "tokenizer.json").read_text() == "mine"

    def test_the_description_comes_last(self, tmp_path, monkeypatch):
        """A writer that is killed at any time leaves no folder that opens."""
        write_checkpoint(tmp_path / "source", layers=1)
        created, create = [], packed_writer.PackedFolderWriter._create

        def recording(self, name):
            with pytest.raises(CheckpointError):
                open_checkpoint(tmp_path / "out")
            created.append(name)
            return create(self, name)

        monkeypatch.setattr(packed_writer.PackedFolderWriter, "_create", recording)
        pack(tmp_path / "source", tmp_path / "out")
        assert created[-2:] == ["packed.json", "config.json"]
        open_checkpoint(tmp_path / "out").close()


class TestCommands:
    def test_pack_and_inspect(self, tmp_path, capsys):
        write_checkpoint(tmp_path / "source", model_type="qwen2_moe", shared=96, layers=3, dense_layers=(1,))
        assert main(["pack", str(tmp_path / "source"), str(tmp_path / "out"), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report.keys() == {
            "version",
            "source",
            "packed",
            "source_bytes",
            "packed_bytes",
            "stacks",
            "files",
            "seconds",
        }
        reports = []
        for folder in ("source", "out"):
            assert main(["inspect", str(tmp_path / folder), "--verify", "--json"]) == 0
            reports.append(json.loads(capsys.readouterr().out))
        for key in ("family", "moe", "layers", "moe_layers", "dense_moe_layers", "quantized_linears", "unusual"):
            assert reports[0][key] == reports[1][key]
        assert [report["format"] for report in reports] == ["gptq", "packed"]
        assert [report["verified"] for report in reports] == [False, True]
        size = reports[0]["bytes"]
        assert size["total"] == size["experts"] + size["linears"] + size["others"]
        assert reports[0]["unusual"] == ["MoE layers whose experts are not quantised, and not loaded: 1"]
        assert main(["inspect", str(tmp_path / "out")]) == 0
        text = capsys.readouterr().out
        assert "Qwen2-MoE" in text
        assert "experts quantised in 0, 2" in text

    def test_pack_into_the_current_folder(self, tmp_path):
        """``marlin-cy pack IN .`` in an empty folder: afterwards the shell's folder is the packed folder."""
        write_checkpoint(tmp_path / "source")
        (tmp_path / "out").mkdir()
        command = [sys.executable, "-m", "marlin_cy", "pack", "../source", ".", "--json"]
        inside = f"""
import os, subprocess, sys
subprocess.run({command!r}, check=True)
assert "config.json" in os.listdir(".")
"""
        environment = os.environ | {"PYTHONPATH": str(Path(marlin_cy.__file__).parents[1])}
        subprocess.run([sys.executable, "-c", inside], cwd=tmp_path / "out", env=environment, check=True)
        with open_checkpoint(tmp_path / "out", verify=True) as checkpoint:
            assert checkpoint.format == "packed"

    def test_run_on_a_packed_folder(self, packed, capsys, quick_bandwidth):
        assert main(["run", str(packed), "--tokens", "2", "--repeat", "1", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["ok"]

    def test_what_cannot_be_packed(self, tmp_path, capsys):
        assert main(["pack", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 1
        assert "config.json" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
