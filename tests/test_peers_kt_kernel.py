"""kt-kernel's experts, of weights that it keeps and of weights that it rounds."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from marlin_cy import reference
from marlin_cy.errors import UnsupportedError
from marlin_cy.weights.canonical import CanonicalWeight, pack_words

sys.path.append(str(Path(__file__).parents[1]))  # bench is not installed

from bench.peers import kt_kernel_moe  # noqa: E402
from bench.peers.checks import check_moe, relative_error  # noqa: E402

ADAPTERS = (
    kt_kernel_moe.KtRawInt4,
    kt_kernel_moe.KtGptqAvx2,
    kt_kernel_moe.KtGptqAvxVnni,
    kt_kernel_moe.KtAmxInt4,
)


@pytest.fixture(params=ADAPTERS, ids=lambda adapter: adapter.name)
def peer(request):
    made = request.param(2)
    if (reason := made.available()) is not None:
        pytest.skip(reason)
    return made


def symmetric(rng, k, n, group_size=128):
    scale = rng.uniform(0.01, 0.03, (k // group_size, n)).astype(np.float16)
    codes = rng.integers(0, 16, (k, n))
    return CanonicalWeight(pack_words(codes), scale, np.full(scale.shape, 8, np.uint8), group_size)


def layer(rng, num_experts=3, group_size=128):
    gate_up = [symmetric(rng, 256, 256, group_size) for _ in range(num_experts)]
    return gate_up, [symmetric(rng, 128, 256, group_size) for _ in range(num_experts)]


def test_without_the_package_it_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    kt_kernel_moe._extension.cache_clear()
    for adapter in ADAPTERS:
        assert "pip install --no-deps kt-kernel" in adapter(2).available()


def test_an_operator_that_this_cpu_has_not_is_said(monkeypatch, peer):
    monkeypatch.setattr(type(peer), "cpu_flag", "no_such_flag")
    assert "needs a CPU with no_such_flag" in peer.available()
    monkeypatch.setattr(type(peer), "operator", "NoSuch_MOE")
    assert "has no NoSuch_MOE for this CPU" in peer.available()


@pytest.mark.parametrize("num_experts", [1, 3, 8])
@pytest.mark.parametrize("group_size", [32, 128])
def test_experts(rng, peer, num_experts, group_size):
    error = check_moe(peer, *layer(rng, num_experts, group_size), 1, rng)
    assert error > 1e-3, "activations and outputs are bfloat16 at best"


def test_what_amxint4_rounds_has_16_levels_a_column_at_most(rng):
    peer, weight = kt_kernel_moe.KtAmxInt4(2), symmetric(rng, 256, 32)
    kept, dense = peer.kept(weight), reference.dequantize_weight(weight)
    assert max(len(np.unique(column)) for column in kept.T) <= 15
    assert 0.05 < relative_error(kept, dense) <= peer.rounding(weight) < 0.25
    zero = CanonicalWeight(weight.words, weight.scale * np.float16(0), weight.zero, 128)
    assert not peer.kept(zero).any()


def test_it_writes_nothing(rng, peer, capfd):
    peer.load_moe(*layer(rng)).tokens(np.ones((2, 256), np.float32), np.zeros((2, 1), int), np.ones((2, 1), np.float32))
    peer.pool.sync()
    del peer
    assert capfd.readouterr() == ("", ""), "a benchmark would write this for every layer"


def test_bad_input(rng, peer):
    gate_up, down = layer(rng)
    with pytest.raises(ValueError, match=r"down: got 2 weights \[128, 256\], expected 3 weights \[128, 256\]"):
        peer.load_moe(gate_up, down[1:])
    with pytest.raises(UnsupportedError, match="N 272, expected"):
        peer.load_moe([symmetric(rng, 256, 272)], [symmetric(rng, 136, 256, 8)])
    experts = peer.load_moe(gate_up, down)
    x, ids, weights = np.zeros((2, 256), np.float32), np.zeros((2, 1), int), np.ones((2, 1), np.float32)
    with pytest.raises(ValueError, match="x: got shape"):
        experts.prepare(x[:, :128], ids, weights)
    tokens = kt_kernel_moe.MAX_TOKENS + 1
    with pytest.raises(ValueError, match="at most 1024 tokens"):
        experts.prepare(*(np.repeat(array[:1], tokens, axis=0) for array in (x, ids, weights)))
    with pytest.raises(ValueError, match="topk_ids: got shape"):
        experts.prepare(x, ids[:1], weights)
    with pytest.raises(IndexError, match="topk_ids: got 0 to 3, expected 0 to 2"):
        experts.prepare(x, np.array([[0], [3]]), weights)


def test_zero_points_are_refused_where_there_are_none(rng):
    gate_up, down = layer(rng)
    gate_up[0].zero[0, 0] = 7
    for adapter in (kt_kernel_moe.KtRawInt4, kt_kernel_moe.KtGptqAvx2, kt_kernel_moe.KtGptqAvxVnni):
        with pytest.raises(UnsupportedError, match="zero points other than 8"):
            adapter(2).load_moe(gate_up, down)
    with pytest.raises(UnsupportedError, match="group_size 16"):
        kt_kernel_moe.KtRawInt4(2).load_moe(*layer(rng, group_size=16))
