"""Damaged checkpoint folders of every format: a CheckpointError or an UnsupportedError, or they load; nothing else.

``MARLIN_CY_FUZZ_EXAMPLES=10000 python -m pytest tests/test_fuzz.py`` tries as many of each format.
"""

import json
import os
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import write_checkpoint, write_deepseek_fp4, write_float8, write_gpt_oss, write_widths
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from marlin_cy import open_checkpoint
from marlin_cy.checkpoints.argument_errors import as_checkpoint_error
from marlin_cy.checkpoints.families import FAMILIES
from marlin_cy.checkpoints.packed_writer import write_packed
from marlin_cy.checkpoints.quantised import QuantizedSource
from marlin_cy.checkpoints.safetensors import SafetensorsFolder
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats.json_fields import read_json
from marlin_cy.formats.registry import read_scheme

EXAMPLES = int(os.environ.get("MARLIN_CY_FUZZ_EXAMPLES", "30"))
SOURCES = (
    "gptq",
    "gptq desc_act",
    "mixtral shards",
    "deepseek_v3",
    "awq",
    "compressed-tensors",
    "gpt_oss",
    "float8",
    "widths",
    "compressed-tensors widths",
    "deepseek_fp4",
    "packed",
    "packed desc_act",
)


TOOLS = Path(__file__).parent / "fixtures"
TOOLS_FOLDERS = sorted(path.name for path in TOOLS.iterdir() if (path / "model.safetensors").exists())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    sizes = {"layers": 1, "num_experts": 2, "hidden": 64, "inter": 32, "group_size": 32}
    write_checkpoint(root / "gptq", **sizes)
    write_checkpoint(root / "gptq desc_act", desc_act=True, **sizes)
    write_checkpoint(root / "mixtral shards", model_type="mixtral", shards=2, **sizes)
    write_checkpoint(root / "deepseek_v3", model_type="deepseek_v3", shared=32, **sizes | {"num_experts": 4})
    for method in ("awq", "compressed-tensors"):
        write_checkpoint(root / method, method=method, checkpoint_format="gptq_v2", **sizes)
    write_gpt_oss(root / "gpt_oss", num_experts=2, hidden=64, inter=32)
    write_float8(root / "float8", **sizes)
    write_widths(root / "widths", "gptq", **sizes)
    write_widths(root / "compressed-tensors widths", "compressed-tensors", checkpoint_format="gptq_v2", **sizes)
    write_deepseek_fp4(root / "deepseek_fp4")
    for name in ("gptq", "gptq desc_act"):
        with open_checkpoint(root / name) as checkpoint:
            write_packed(checkpoint, root / name.replace("gptq", "packed"))
    return root


numbers = st.one_of(
    st.integers(-2, 10),
    st.sampled_from([16, 31, 32, 33, 64, 128, 2**31 - 1, 2**31, 2**32, 2**63, 10**30, -(2**63)]),
    st.floats(allow_nan=False, allow_infinity=False),
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=4,
)


def paths_in(value, at=()):
    """The place of every value in a JSON document."""
    yield at
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from paths_in(child, (*at, key))


def mutate_json(data, document):
    """A JSON document with one value replaced, removed, renamed or swapped with another."""
    places = sorted((path for path in paths_in(document) if path), key=str)
    if not places:
        return data.draw(json_values)
    path = data.draw(st.sampled_from(places))
    *outer, key = path
    target = document
    for step in outer:
        target = target[step]
    action = data.draw(st.sampled_from(["replace", "nudge", "remove", "rename", "swap"]))
    note(f"{action} {path}")
    if action == "remove":
        del target[key]
    elif action == "rename" and isinstance(target, dict):
        target[data.draw(st.text(max_size=6))] = target.pop(key)
    elif action == "swap":
        other = data.draw(st.sampled_from(places))
        value = document
        for step in other:
            value = value[step]
        target[key] = json.loads(json.dumps(value))
    elif action == "nudge" and isinstance(target[key], int):
        target[key] += data.draw(st.sampled_from([-1, 1, 8, -8, 32]))
    else:
        target[key] = data.draw(json_values)
    return document


def mutate_text(data, content):
    """Bytes with some of them changed, cut out, or put in."""
    begin = data.draw(st.integers(0, max(len(content) - 1, 0)))
    end = min(len(content), begin + data.draw(st.integers(0, 16)))
    note(f"bytes {begin} to {end}")
    return content[:begin] + data.draw(st.binary(max_size=16)) + content[end:]


def mutate_tensors(data, content):
    """A safetensors file with another header, cut, or with other bytes."""
    (length,) = struct.unpack_from("<Q", content)
    action = data.draw(st.sampled_from(["header", "header", "header text", "cut", "values"]))
    note(action)
    if action == "header":
        text = json.dumps(mutate_json(data, json.loads(content[8 : 8 + length]))).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]
    if action == "header text":
        text = mutate_text(data, content[8 : 8 + length])
        return struct.pack("<Q", len(text)) + text + content[8 + length :]
    if action == "cut":
        return content[: data.draw(st.integers(0, len(content)))]
    values = np.frombuffer(content, np.uint8).copy()
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    if len(values) <= 8 + length:
        return content[:-1]
    places = rng.integers(8 + length, len(values), data.draw(st.integers(1, 200)))
    values[places] = rng.choice([0, 0x7F, 0xFF, 0xFC, 0x80], len(places))
    return values.tobytes()


def mutate(data, folder):
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return
    file = data.draw(st.sampled_from(names))
    path = folder / file
    note(file)
    content = path.read_bytes()
    if data.draw(st.integers(0, 30)) == 0:
        path.unlink()
        return
    try:
        if file.endswith(".safetensors"):
            content = mutate_tensors(data, content)
        elif data.draw(st.integers(0, 4)) == 0:
            content = mutate_text(data, content)
        else:
            content = json.dumps(mutate_json(data, json.loads(content))).encode()
    except (ValueError, struct.error):  # damaged before, so that it is no JSON or no such file any more
        content = mutate_text(data, content)
    path.write_bytes(content)


def use(folder, verify):
    """Load everything there is."""
    with open_checkpoint(folder, num_threads=1, verify=verify) as checkpoint:
        for layer in checkpoint.moe_layers:
            checkpoint.router_weight(layer)
            checkpoint.router_bias(layer)
            checkpoint.expert_bytes(layer)
            checkpoint.moe_layer(layer, shared_expert=False)
            if checkpoint.moe_spec.shared_intermediate_size:
                checkpoint.moe_layer(layer)
        for name in checkpoint.linears:
            checkpoint.linear(name)
        for name in checkpoint.scaled.weights:
            checkpoint.scaled.floats(name)
        for name in checkpoint.tensor_names:
            checkpoint.raw_tensor(name)
        checkpoint.problems(layers=True)


@pytest.mark.parametrize("source", SOURCES)
def test_any_damage_is_said(folders, source):
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.data())
    def check(data):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            shutil.copytree(folders / source, folder)
            for _ in range(data.draw(st.integers(1, 3))):
                mutate(data, folder)
            verify = data.draw(st.booleans())
            try:
                use(folder, verify)
            except (CheckpointError, UnsupportedError) as error:
                assert str(error)

    check()


def test_what_is_not_damaged_loads(folders):
    for source in SOURCES:
        use(folders / source, True)


def use_layers(folder):
    """Bring every linear layer of a folder that has no model around it to canonical form."""
    config = read_json(folder / "config.json")
    scheme, tensors = read_scheme(folder, config), SafetensorsFolder(folder)
    source = QuantizedSource(tensors, scheme, FAMILIES["qwen3_moe"], None, folder / "config.json", None)
    modules = [name.removesuffix(scheme.marker) for name in tensors.names if name.endswith(scheme.marker)]
    if scheme.marker == "_blocks":  # one tensor for all experts, which the source knows from a model's configuration
        for module in modules:
            with as_checkpoint_error(folder, module):
                arrays = {suffix: tensors.tensor(f"{module}{suffix}") for suffix in scheme.tensors(32, 8)}
                k, n = scheme.sizes(arrays[scheme.marker].shape[1:])
                scheme.to_canonical({suffix: array[0] for suffix, array in arrays.items() if array.ndim}, k, n)
        return len(modules)
    loaded = 0
    for module in modules:
        try:
            source.weight(module)
        except UnsupportedError as error:  # of mixed widths
            assert "bits" in str(error) or "not quantised" in str(error) or "supported" in str(error)
        else:
            loaded += 1
        source.bias(module)
    return loaded


def tools_folder(name, target):
    """A tool's output, without the expected weights."""
    shutil.copytree(TOOLS / name, target, ignore=shutil.ignore_patterns("expected.safetensors"))


@pytest.mark.parametrize("name", TOOLS_FOLDERS)
def test_any_damage_of_a_tools_files_is_said(name):
    @settings(max_examples=max(EXAMPLES // 4, 1), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            tools_folder(name, folder)
            for _ in range(data.draw(st.integers(1, 3))):
                mutate(data, folder)
            try:
                use_layers(folder)
            except (CheckpointError, UnsupportedError) as error:
                assert str(error)

    check()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        tools_folder(name, folder)
        assert use_layers(folder) > 0
