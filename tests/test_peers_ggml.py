"""ggml's products, of Q4_0 weights that stand for the same numbers."""

import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from marlin_cy import reference
from marlin_cy.errors import UnsupportedError
from marlin_cy.weights.canonical import CanonicalWeight, pack_words

sys.path.append(str(Path(__file__).parents[1]))  # bench is not installed

from bench.peers import ggml_moe  # noqa: E402
from bench.peers.checks import check, check_moe, relative_error  # noqa: E402

PEER, Q4_K = ggml_moe.GgmlMoe(2), ggml_moe.GgmlQ4K(2)
needs_ggml = pytest.mark.skipif(PEER.available() is not None, reason=str(PEER.available()))


def symmetric(rng, k, n, group_size=128, scale_dtype=np.float16):
    scale = rng.uniform(0.01, 0.03, (k // group_size, n)).astype(scale_dtype)
    codes = rng.integers(0, 16, (k, n))
    return CanonicalWeight(pack_words(codes), scale, np.full(scale.shape, 8, np.uint8), group_size)


@pytest.mark.parametrize("scale_dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_q4_0_stands_for_the_same_numbers(rng, group_size, scale_dtype):
    weight = symmetric(rng, 256, 3, group_size, scale_dtype)
    packed = ggml_moe.pack_q4_0(weight)
    assert packed.dtype.itemsize == 18
    dense = np.empty((256, 3))
    for n in range(3):
        for k in range(256):
            block, at = packed[n, k // 32], k % 32
            code = block["qs"][at] & 15 if at < 16 else block["qs"][at - 16] >> 4
            dense[k, n] = float(block["d"]) * (int(code) - 8)
    np.testing.assert_array_equal(dense, reference.dequantize_weight(weight))


def test_what_q4_0_cannot_hold_is_an_error(rng):
    weight = symmetric(rng, 64, 4, 32)
    zero = weight.zero.copy()
    zero[1, 2] = 7
    with pytest.raises(UnsupportedError, match="zero points other than 8"):
        ggml_moe.pack_q4_0(replace(weight, zero=zero))
    with pytest.raises(UnsupportedError, match="group_size 16"):
        ggml_moe.pack_q4_0(symmetric(rng, 64, 4, 16))
    with pytest.raises(UnsupportedError, match="bfloat16 scales"):
        ggml_moe.pack_q4_0(replace(weight, scale=np.full(weight.scale.shape, 2.0**20, ml_dtypes.bfloat16)))


def test_a_folder_without_ggml_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv(ggml_moe.LIBRARY_VARIABLE, str(tmp_path))
    assert "no usable ggml" in PEER.available()
    assert PEER.version is None


@needs_ggml
@pytest.mark.parametrize("k, n", [(128, 8), (256, 31), (1024, 96), (384, 64)])
def test_products(rng, k, n):
    assert check(PEER, symmetric(rng, k, n), rng) > 1e-4, "activations are not int8"


@needs_ggml
@pytest.mark.parametrize("k, n", [(256, 8), (1024, 31), (512, 96)])
def test_q4_k_is_ggmls_own_rounding_of_any_zero_points(rng, k, n):
    weight = symmetric(rng, k, n)
    weight = replace(weight, zero=rng.integers(0, 17, weight.zero.shape).astype(np.uint8))
    dense = reference.dequantize_weight(weight)
    off = relative_error(Q4_K.kept(weight), dense)
    assert 1e-3 < off <= Q4_K.rounding(weight) < relative_error(dense * 1.25, dense)
    assert check(Q4_K, weight, rng) > off / 2


@needs_ggml
def test_q4_k_of_experts(rng):
    gate_up = [symmetric(rng, 256, 1024) for _ in range(3)]
    down = [symmetric(rng, 512, 256) for _ in range(3)]
    assert check_moe(Q4_K, gate_up, down, 2, rng) > check_moe(PEER, gate_up, down, 2, rng), "Q4_0 keeps the weights"


@needs_ggml
def test_q4_k_has_blocks_of_256(rng):
    assert ggml_moe.SUPER_BLOCK_DTYPE.itemsize == 144
    with pytest.raises(UnsupportedError, match="K 384, expected a multiple of 256"):
        Q4_K.load(symmetric(rng, 384, 8))


@needs_ggml
def test_weights_are_rearranged_where_their_width_allows(rng, capfd):
    assert PEER.load(symmetric(rng, 128, 31)).weights.buffer_type == "CPU"
    if len(PEER.backend.buffer_types) == 1:
        pytest.skip("this ggml has no buffer type that rearranges weights")
    assert PEER.load(symmetric(rng, 128, 32)).weights.buffer_type != "CPU"
    assert capfd.readouterr().err == "", "a benchmark would write this for every weight"


@needs_ggml
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_experts(rng, top_k):
    gate_up = [symmetric(rng, 256, 256) for _ in range(5)]
    down = [symmetric(rng, 128, 256) for _ in range(5)]
    assert check_moe(PEER, gate_up, down, top_k, rng) > 1e-4, "activations are not int8"


@needs_ggml
def test_runs_again_and_keeps_inputs_apart(rng):
    loaded = PEER.load(symmetric(rng, 128, 16))
    first, second = (loaded.prepare(rng.standard_normal((3, 128), np.float32)) for _ in range(2))
    before = loaded.result(loaded.run(first))
    assert (loaded.result(loaded.run(second)) != before).any()
    np.testing.assert_array_equal(loaded.result(loaded.run(first)), before)


@needs_ggml
def test_wrong_shapes(rng):
    linear = PEER.load(symmetric(rng, 128, 16))
    with pytest.raises(ValueError, match="x: got shape"):
        linear.prepare(np.zeros((2, 64), np.float32))
    gate_up, down = [symmetric(rng, 128, 256)], [symmetric(rng, 128, 128)]
    with pytest.raises(ValueError, match=r"down: got 1 weights \[128, 256\], expected 1 weights \[128, 128\]"):
        PEER.load_moe(gate_up, [symmetric(rng, 128, 256)])
    experts = PEER.load_moe(gate_up, down)
    with pytest.raises(ValueError, match="topk_ids"):
        experts.prepare(np.zeros((2, 128), np.float32), np.zeros((3, 1), int), np.ones((3, 1), np.float32))
    with pytest.raises(IndexError, match="topk_ids: got 0 to 1, expected 0 to 0"):
        experts.prepare(np.zeros((2, 128), np.float32), np.array([[0], [1]]), np.ones((2, 1), np.float32))
    with pytest.raises(ValueError, match=r"down: got 2 weights \[128, 128\], expected 1 weights"):
        PEER.load_moe(gate_up, 2 * down)
