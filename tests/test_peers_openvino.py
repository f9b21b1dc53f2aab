"""OpenVINO's products of compressed 4-bit weights."""

import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from marlin_cy.errors import UnsupportedError
from marlin_cy.weights.canonical import CanonicalWeight, pack_words

sys.path.append(str(Path(__file__).parents[1]))  # bench is not installed

from bench.peers import openvino_int4  # noqa: E402
from bench.peers.checks import check, check_moe  # noqa: E402

FLOAT32, BF16, INT8 = (
    peer(2) for peer in (openvino_int4.OpenVinoFloat32, openvino_int4.OpenVinoBf16, openvino_int4.OpenVinoInt8)
)
PEERS = [
    pytest.param(
        peer, id=peer.name, marks=pytest.mark.skipif(peer.available() is not None, reason=str(peer.available()))
    )
    for peer in (FLOAT32, BF16, INT8)
]
needs_openvino = pytest.mark.skipif(FLOAT32.available() is not None, reason=str(FLOAT32.available()))


def random_weight(rng, k, n, group_size=128, scale_dtype=np.float16):
    scale = rng.uniform(0.01, 0.03, (k // group_size, n)).astype(scale_dtype)
    zero = rng.integers(0, 16, scale.shape).astype(np.uint8)
    return CanonicalWeight(pack_words(rng.integers(0, 16, (k, n))), scale, zero, group_size)


def test_nibbles_are_packed_low_half_first():
    codes = np.array([[1, 2, 3], [4, 5, 15]], np.uint8)
    assert openvino_int4.pack_nibbles(codes).tolist() == [0x21, 0x43, 0xF5]
    assert openvino_int4.pack_nibbles(codes[:, :1].T.copy()).tolist() == [0x41]
    assert openvino_int4.pack_nibbles(codes[:1]).tolist() == [0x21, 0x03]


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("scale_dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("k, n, group_size", [(512, 96, 128), (384, 7, 128), (256, 33, 32), (256, 64, 256)])
def test_products(rng, peer, k, n, group_size, scale_dtype):
    error = check(peer, random_weight(rng, k, n, group_size, scale_dtype), rng)
    least = {"float32": 0, "bf16": 1e-4, "int8": 1e-4}[peer.accuracy]
    assert error > least, f"activations are not {peer.accuracy}"


@pytest.mark.parametrize("peer", PEERS[:2])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_experts(rng, peer, top_k):
    gate_up = [random_weight(rng, 256, 256) for _ in range(5)]
    down = [random_weight(rng, 128, 256) for _ in range(5)]
    check_moe(peer, gate_up, down, top_k, rng)


@needs_openvino
def test_experts_with_quantised_activations_are_refused(rng):
    assert "quantises no activations" in INT8.available_moe()
    with pytest.raises(UnsupportedError, match="quantises no activations"):
        INT8.load_moe([random_weight(rng, 128, 256)], [random_weight(rng, 128, 128)])


@pytest.mark.parametrize("peer", PEERS)
def test_runs_again_and_keeps_inputs_apart(rng, peer):
    loaded = peer.load(random_weight(rng, 256, 16))
    first, second = (loaded.prepare(rng.standard_normal((rows, 256), np.float32)) for rows in (3, 9))
    before = loaded.result(loaded.run(first))
    assert loaded.result(loaded.run(second)).shape == (9, 16)
    np.testing.assert_array_equal(loaded.result(loaded.run(first)), before)


@needs_openvino
def test_experts_that_are_not_found_are_refused(rng):
    with pytest.raises(UnsupportedError, match="got GatherMatmul of"):  # a single one needs no gathering
        FLOAT32.load_moe([random_weight(rng, 128, 256)], [random_weight(rng, 128, 128)])


@needs_openvino
def test_a_weight_that_is_expanded_beforehand_is_an_error(rng):
    import openvino
    from openvino import opset13

    x = opset13.parameter([-1, 64], np.float32)
    dense = opset13.constant(rng.standard_normal((32, 64), np.float32))
    model = openvino.Model([opset13.matmul(x, dense, False, True)], [x], "dense")
    with pytest.raises(UnsupportedError, match="expands weights: got FullyConnected of"):
        openvino_int4._require_fused(FLOAT32.core.compile_model(model, "CPU"), "FullyConnected", 1)


@needs_openvino
def test_bad_input(rng):
    weight = random_weight(rng, 256, 16)
    zero = weight.zero.copy()
    zero[1, 3] = 16
    with pytest.raises(UnsupportedError, match="zero point of 16"):
        FLOAT32.load(replace(weight, zero=zero))
    with pytest.raises(UnsupportedError, match="group_size 16"):
        INT8.load(random_weight(rng, 256, 16, 16))
    with pytest.raises(ValueError, match="x: got shape"):
        FLOAT32.load(weight).prepare(np.zeros((2, 128), np.float32))
    gate_up, down = 2 * [random_weight(rng, 128, 256)], 2 * [random_weight(rng, 128, 128)]
    with pytest.raises(ValueError, match=r"down: got 1 weights \[128, 128\], expected 2 weights \[128, 128\]"):
        FLOAT32.load_moe(gate_up, down[1:])
    experts = FLOAT32.load_moe(gate_up, down)
    x, weights = np.zeros((2, 128), np.float32), np.ones((2, 1), np.float32)
    with pytest.raises(ValueError, match="topk_ids: got shape"):
        experts.prepare(x, np.zeros((3, 1), int), weights)
    with pytest.raises(IndexError, match="topk_ids: got 0 to 2, expected 0 to 1"):
        experts.prepare(x, np.array([[0], [2]]), weights)
