"""Experts of a stack that differ: the stack holds all of them exactly, or rounded to 8 bits if they are float."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from asserts import relative_error
from checkpoint_files import edit_tensor, write_checkpoint
from problems import random_problem, with_value
from safetensors.numpy import load_file, save_file

from marlin_cy import open_checkpoint, reference
from marlin_cy.cli import main
from marlin_cy.errors import CheckpointError
from marlin_cy.reference import dequantize_weight
from marlin_cy.weights.widening import ROUNDED, StackKind, joined, rounded, widened

K, N = 192, 16
ROUNDING = 1 / 254
"""The largest error of a rounded weight, relative to the largest magnitude of its group."""


def random_weight(rng, kind):
    return random_problem(rng, 1, K, N, kind.group_size, codes=kind.codes, scales=kind.scales).canonical(0)


KINDS = [
    StackKind(64, "uint4", "float16"),
    StackKind(128, "uint4", "bfloat16"),
    StackKind(K, "uint8", "float16"),
    StackKind(32, "e2m1", "bfloat16"),
    ROUNDED,
]


@pytest.mark.parametrize("first", KINDS, ids=str)
@pytest.mark.parametrize("second", KINDS, ids=str)
def test_a_kind_that_holds_both(rng, first, second):
    common = joined([first, second])
    for kind in (first, second):
        weight = random_weight(rng, kind)
        wide = widened(weight, common)
        assert (wide.group_size, wide.codes, wide.scales) == common
        np.testing.assert_array_equal(dequantize_weight(wide), dequantize_weight(weight))
        if kind == common:
            assert wide is weight


@pytest.mark.parametrize(
    ("sizes", "expected"), [((96, 64), 32), ((192, 128), 64), ((768, 256), 256), ((96, 96), 96), ((480, 96), 32)]
)
def test_groups_in_common(sizes, expected):
    assert joined(StackKind(size, "uint4", "float16") for size in sizes).group_size == expected


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("group_size", [32, 128])
def test_rounding(rng, group_size, permuted):
    weight = rng.standard_normal((N, K)).astype(np.float32)
    weight[3, :group_size] = 0
    group = np.arange(K) // group_size
    g_idx = rng.permutation(group).astype(np.int32) if permuted else None
    group = group if g_idx is None else g_idx
    result = rounded(weight.astype(ml_dtypes.bfloat16), group_size, g_idx)
    exact = weight.astype(ml_dtypes.bfloat16).astype(np.float64).T
    largest = np.stack([np.abs(exact[group == g]).max(0) for g in range(group.max() + 1)])
    error = np.abs(dequantize_weight(result) - exact)
    assert (error <= (ROUNDING + 2.0**-22) * largest[group]).all()
    assert relative_error(dequantize_weight(result), exact) < 8e-3


def test_weights_that_are_not_finite():
    weight = np.ones((N, K), np.float32)
    weight[2, 5] = np.inf
    with pytest.raises(ValueError, match=r"got inf at \[2, 5\], expected finite values"):
        rounded(weight, 32)


# ---------------------------------------------------------------------------------------------
# Checkpoints

SIZES = {"layers": 1, "num_experts": 3, "hidden": 64, "inter": 96, "group_size": 32, "checkpoint_format": "gptq_v2"}
BLOCK = "model.layers.0.mlp"


def left_dense(folder, weights, parts, dtype=np.float16):
    """Store some linear layers without quantisation. ``weights``, which are dense, become what is stored."""
    tensors = load_file(folder / "model.safetensors")
    for module in [module for module in weights if re.search(parts, module)]:
        for name in [name for name in tensors if name.startswith(f"{module}.")]:
            del tensors[name]
        # As with weights of a model, few of which a 16-bit float represents exactly.
        stored = np.ascontiguousarray((1.01 * weights[module]).T).astype(dtype)
        tensors[f"{module}.weight"] = stored
        weights[module] = stored.astype(np.float64).T
    save_file(tensors, folder / "model.safetensors")


def layer_output(folder, x, ids, weights):
    with open_checkpoint(folder, num_threads=1) as checkpoint:
        layer = checkpoint.experts(0)
        return layer.forward_routed(checkpoint.backend.new_context(num_threads=1), x, ids, weights), layer


PARTS = {
    "one expert": r"experts\.1\.",
    "one matrix": r"experts\.2\.up_proj",
    "all of down": r"experts\.\d\.down_proj",
    "gate, and down of one": r"experts\.\d\.gate_proj|experts\.0\.down",
}


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("parts", PARTS)
def test_parts_left_in_16_bits(tmp_path, rng, parts, desc_act):
    weights = write_checkpoint(tmp_path, desc_act=desc_act, **SIZES)
    left_dense(tmp_path, weights, PARTS[parts])
    x = rng.standard_normal((7, 64)).astype(np.float32)
    ids = np.tile(np.arange(3, dtype=np.int32), (7, 1))
    routing = rng.random((7, 3)).astype(np.float32)
    found, layer = layer_output(tmp_path, x, ids, routing)
    gate_up = [np.concatenate([weights[f"{BLOCK}.experts.{e}.{p}_proj"] for p in ("gate", "up")], 1) for e in range(3)]
    down = [weights[f"{BLOCK}.experts.{e}.down_proj"] for e in range(3)]
    expected = reference.moe_layer(x, np.stack(gate_up), np.stack(down), ids, routing)
    # Of a random matrix, 5e-3 of its norm changes; the result has two products.
    assert relative_error(found, expected) < 1.5e-2
    bits = {"one matrix": (8, 4), "all of down": (4, 8)}.get(parts, (8, 8))
    assert (layer.gate_up.metadata.bits, layer.down.metadata.bits) == bits


def test_what_inspect_says(tmp_path, capsys):
    weights = write_checkpoint(tmp_path, **SIZES)
    left_dense(tmp_path, weights, PARTS["one expert"])
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["refused"] == []
    form = "uint8 in groups of 32 with float32 scales; the others keep their values in this form"
    for part, number in (("gate and up: 2 of 6", 0), ("down: 1 of 3", 1)):
        expected = f"layers 0: {part} matrices of experts are not quantised in the files, and are rounded to {form}"
        assert report["unusual"][number] == expected


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((96, 32), np.float16, r"got F16 \(96, 32\), expected F16 or .*\(96, 64\)|got F16 \(96, 32\), expected"),
        ((96, 64), np.int8, r"got I8 \(96, 64\), expected F32 or F16 or BF16 \(96, 64\)"),
    ],
)
def test_dense_parts_that_contradict_the_config(tmp_path, shape, dtype, message):
    weights = write_checkpoint(tmp_path, **SIZES)
    left_dense(tmp_path, weights, PARTS["one matrix"])
    edit_tensor(tmp_path, f"{BLOCK}.experts.2.up_proj.weight", lambda _: np.ones(shape, dtype))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_dense_parts_with_further_tensors(tmp_path):
    weights = write_checkpoint(tmp_path, **SIZES)
    left_dense(tmp_path, weights, PARTS["one matrix"])
    edit_tensor(tmp_path, f"{BLOCK}.experts.2.up_proj.scales", lambda _: np.ones((2, 96), np.float16))
    with pytest.raises(CheckpointError, match=r"up_proj\.scales': .*up_proj is not quantised, and has no such tensor"):
        open_checkpoint(tmp_path)


def test_dense_parts_that_are_not_finite(tmp_path):
    weights = write_checkpoint(tmp_path, **SIZES)
    left_dense(tmp_path, weights, PARTS["one matrix"])
    edit_tensor(tmp_path, f"{BLOCK}.experts.2.up_proj.weight", lambda w: with_value(w, (3, 4), np.nan))
    message = r"up_proj\.weight': got nan at \[3, 4\], expected finite values"
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=message):
        checkpoint.experts(0)
