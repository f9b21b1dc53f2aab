"""The peers of bench/peers: right results, stated accuracy, and refusal of weights that they cannot represent."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from problems import random_problem

from marlin_cy import reference
from marlin_cy.errors import UnsupportedError

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # bench is not installed

from bench import peers  # noqa: E402
from bench.peers.checks import relative_error  # noqa: E402
from bench.peers.numpy_dense import NumpyDense  # noqa: E402

LIBRARIES = ("torch", "onnx", "onnxruntime", "openvino", "ggml", "vllm", "kt_kernel")
GROUP = 128


@pytest.fixture(params=peers.PEERS, ids=lambda adapter: adapter.name)
def peer(request):
    """Every adapter that works here."""
    made = request.param(num_threads=2)
    if (reason := made.available()) is not None:
        pytest.skip(reason)
    return made


@pytest.fixture
def linear_peer(peer):
    """The peers that multiply by one weight."""
    if (reason := peer.available_projection()) is not None:
        pytest.skip(reason)
    return peer


@pytest.fixture
def layer_peer(peer):
    """The peers that have whole layers."""
    if (reason := peer.available_moe()) is not None:
        pytest.skip(reason)
    return peer


@pytest.fixture(params=["symmetric", "asymmetric"])
def symmetric(request):
    return request.param == "symmetric"


def weights_of(rng, num_experts, k, n, symmetric=False, **more):
    """Weights of zero points 0 to 15."""
    problem = random_problem(rng, num_experts, k, n, GROUP, sym=symmetric, checkpoint_format="gptq_v2", **more)
    return [problem.canonical(expert) for expert in range(num_experts)]


def skip_without_form(peer, load, *parts):
    """Some peers have symmetric weights alone, or some sizes, and must say so; others they may not refuse."""
    weights = [weight for part in parts for weight in part]
    try:
        load()
    except UnsupportedError as error:
        if any((weight.zero != 8).any() for weight in weights) and "zero points other than 8" in str(error):
            pytest.skip(f"{peer.name}: {error}")
        assert any(weight.k % 256 or weight.n % 32 for weight in weights)
        assert "expected a multiple of" in str(error) or "expected multiples of" in str(error)
        pytest.skip(f"{peer.name}: {error}")


def layer_of(rng, symmetric, intermediate=512, num_experts=5):
    """``(gate_up, down)``; with 384, groups are odd in number between the products, and even before and after."""
    gate_up = weights_of(rng, num_experts, 256, 2 * intermediate, symmetric)
    return gate_up, weights_of(rng, num_experts, intermediate, 256, symmetric)


def test_importing_the_package_imports_no_peer():
    program = f"import bench.peers, sys; print([name for name in {LIBRARIES} if name in sys.modules])"
    environment = {"PYTHONPATH": ":".join([str(ROOT), *filter(None, sys.path)])}
    finished = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert finished.stdout.strip() == "[]", finished.stderr


def test_names_are_unique_and_accuracies_known():
    names = [adapter.name for adapter in peers.PEERS]
    assert len(set(names)) == len(names)
    for adapter in peers.PEERS:
        assert 0 < peers.bound(adapter.accuracy, 4096) < 0.1


def test_requirements_pin_every_peer_and_say_what_for():
    files = (ROOT / "bench" / "peers").glob("requirements*.txt")
    lines = [line for file in files for line in file.read_text().splitlines() if not line.startswith("#")]
    pinned = dict(line.split("#")[0].strip().split("==") for line in lines)
    assert all(line.partition("#")[2].strip() for line in lines)
    assert {adapter.distribution for adapter in peers.PEERS} <= pinned.keys()


@pytest.mark.sampled(40)
@pytest.mark.parametrize("k, n", [(128, 16), (384, 48), (1024, 96)])
def test_products_are_as_accurate_as_the_peer_says(rng, linear_peer, symmetric, k, n):
    peer, weight = linear_peer, weights_of(rng, 1, k, n, symmetric)[0]
    skip_without_form(peer, lambda: peer.load(weight), [weight])
    error = peers.check(peer, weight, rng)
    if peer.accuracy != "float32":
        assert error > peers.bound("float32", k), "more accurate than it says"


def test_a_version_is_told(peer):
    assert peer.version


def test_a_projection_that_a_peer_has_not_is_refused_with_the_reason(rng, peer):
    if (reason := peer.available_projection()) is None:
        pytest.skip(f"{peer.name} has one")
    with pytest.raises(UnsupportedError) as raised:
        peer.load(weights_of(rng, 1, 256, 32, symmetric=True)[0])
    assert str(raised.value) == reason
    assert peer.available_moe() is None


def test_experts_without_a_form_are_refused(rng, layer_peer):
    gate_up, down = layer_of(rng, symmetric=True)
    permuted = weights_of(rng, 1, 512, 256, symmetric=True, g_idx="common")
    with pytest.raises(UnsupportedError, match="^weight: got a g_idx"):
        layer_peer.load_moe(gate_up, down[:-1] + permuted)


def test_a_layer_run_again_changes_nothing(rng, layer_peer):
    loaded = layer_peer.load_moe(*layer_of(rng, symmetric=True))
    x, ids, weights = rng.standard_normal((3, 256), np.float32), np.array([[4], [0], [2]]), np.ones((3, 1), np.float32)
    given = x.copy(), ids.copy(), weights.copy()
    prepared, other = loaded.prepare(x, ids, weights), loaded.prepare(2 * x, ids[::-1], weights)
    first = loaded.result(loaded.run(prepared)).copy()
    assert (loaded.result(loaded.run(other)) != first).any()
    np.testing.assert_array_equal(loaded.result(loaded.run(prepared)), first)
    for array, as_given in zip((x, ids, weights), given, strict=True):
        np.testing.assert_array_equal(array, as_given)


def test_running_again_changes_nothing(rng, linear_peer):
    loaded = linear_peer.load(weights_of(rng, 1, 256, 32, symmetric=True)[0])
    x = rng.standard_normal((3, 256), np.float32)
    given = x.copy()
    prepared = loaded.prepare(x)
    first = loaded.result(loaded.run(prepared)).copy()
    np.testing.assert_array_equal(loaded.result(loaded.run(prepared)), first)
    np.testing.assert_array_equal(x, given)


def test_weights_without_a_form_are_refused(rng, linear_peer):
    plain = weights_of(rng, 1, 256, 32, symmetric=True)[0]
    permuted = weights_of(rng, 1, 256, 32, g_idx="common")[0]
    floats = weights_of(rng, 1, 256, 32, codes="e2m1")[0]
    partial = weights_of(rng, 1, 192, 32)[0]
    for weight in (permuted, floats, partial):
        with pytest.raises(UnsupportedError, match="^weight: got"):
            linear_peer.load(weight)
    linear_peer.load(plain)


def test_a_zero_point_of_16_is_right_or_refused(rng, linear_peer):
    weight = weights_of(rng, 1, 256, 32, symmetric=True)[0]
    weight.zero[1, 3] = 16
    try:
        loaded = linear_peer.load(weight)
    except UnsupportedError as error:
        assert "zero point" in str(error)
        return
    x = np.zeros((1, 256), np.float32)
    x[0, 128:] = 1
    expected = (x.astype(np.float64) @ reference.dequantize_weight(weight))[0, 3]
    magnitude = np.abs(reference.dequantize_weight(weight)[128:, 3]).sum()
    off = peers.bound(linear_peer.accuracy, 256) + linear_peer.rounding(weight)
    assert abs(loaded.rows(x)[0, 3] - expected) <= off * magnitude


@pytest.mark.sampled(50)
@pytest.mark.parametrize("intermediate", [384, 512])
@pytest.mark.parametrize("top_k", [1, 3])
def test_layers_are_right_or_refused_with_the_reason(rng, peer, symmetric, top_k, intermediate):
    gate_up, down = layer_of(rng, symmetric, intermediate)
    reason = peer.available_moe()
    if reason is None:
        skip_without_form(peer, lambda: peer.load_moe(gate_up, down), gate_up, down)
        peers.check_moe(peer, gate_up, down, top_k, rng)
        return
    assert reason
    with pytest.raises(UnsupportedError) as raised:
        peer.load_moe(gate_up, down)
    assert str(raised.value) == reason


def test_a_token_is_the_same_wherever_it_stands(rng, layer_peer):
    loaded = layer_peer.load_moe(*layer_of(rng, symmetric=True))
    x, ids = rng.standard_normal((2, 256), np.float32), np.array([[4, 0], [2, 3]])
    weights = np.array([[0.5, 0.5], [0.25, 0.75]], np.float32)
    first, again = loaded.tokens(x, ids, weights), loaded.tokens(x[::-1], ids[::-1], weights[::-1])
    np.testing.assert_allclose(again, first[::-1], rtol=0, atol=1e-5 * np.abs(first).max())


class OffByOne(NumpyDense):
    """Zero points that are one too large, as if a checkpoint's convention had been misread."""

    def load(self, weight):
        return super().load(replace(weight, zero=weight.zero + 1))


class Altered(NumpyDense):
    """A result that is altered at the end."""

    def __init__(self, alter):
        super().__init__(num_threads=1)
        self._alter = alter

    def load(self, weight):
        loaded = super().load(weight)
        result = loaded.result
        loaded.result = lambda out: self._alter(result(out))
        return loaded


@pytest.mark.parametrize("accuracy", ["int8", "bf16", "float32"])
def test_check_refuses_wrong_zero_points(rng, symmetric, accuracy):
    peer = OffByOne(num_threads=1)
    peer.accuracy = accuracy
    with pytest.raises(peers.WrongResult, match="relative error"):
        peers.check(peer, weights_of(rng, 1, 256, 32, symmetric)[0], rng)


def with_a_nan(y):
    y[-1, -1] = np.nan
    return y


@pytest.mark.parametrize(
    "alter, message",
    [
        (with_a_nan, "relative error of nan"),
        (lambda y: y.astype(np.float64), "got float64"),
        (lambda y: y.T, "expected float32"),
        (np.ravel, "expected float32"),
    ],
)
def test_check_refuses_other_results(rng, alter, message):
    with pytest.raises(peers.WrongResult, match=message):
        peers.check(Altered(alter), weights_of(rng, 1, 256, 32)[0], rng)


class Rounded(NumpyDense):
    """Weights rounded to multiples of their greatest value's part; it says that they are, by so much at most."""

    parts, says = 16, 1 / 8

    def kept(self, weight):
        dense = reference.dequantize_weight(weight)
        step = np.abs(dense).max() / self.parts
        return np.rint(dense / step) * step

    def rounding(self, weight):
        return self.says

    def load(self, weight):
        loaded = super().load(weight)
        loaded._weight = self.kept(weight).astype(np.float32)
        return loaded


def test_check_takes_weights_of_a_peers_own_rounding_and_tells_the_whole_error(rng, symmetric):
    peer, weight = Rounded(num_threads=1), weights_of(rng, 1, 256, 32, symmetric)[0]
    off = relative_error(peer.kept(weight), reference.dequantize_weight(weight))
    assert 1e-2 < off < peer.says
    assert off / 2 < peers.check(peer, weight, rng) < 2 * off  # of few rows, so the norms' ratio has a spread


def test_check_refuses_weights_that_are_further_off_than_said(rng):
    peer, weight = Rounded(num_threads=1), weights_of(rng, 1, 256, 32)[0]
    peer.parts = 2
    with pytest.raises(peers.WrongResult, match="weights with a relative error"):
        peers.check(peer, weight, rng)


def test_check_refuses_products_of_other_weights_than_the_peer_keeps(rng):
    class Other(Rounded):
        def load(self, weight):
            return NumpyDense.load(self, weight)

    with pytest.raises(peers.WrongResult, match="relative error"):
        peers.check(Other(num_threads=1), weights_of(rng, 1, 256, 32)[0], rng)


@pytest.mark.parametrize("top_k", [1, 3])
def test_routed_products_are_right_or_refused_with_the_reason(rng, peer, top_k):
    weights = weights_of(rng, 5, 256, 64, symmetric=True)
    reason = peer.available_routed()
    if reason is None:
        peers.check_routed(peer, weights, top_k, rng, peer.load_routed(weights))
        return
    with pytest.raises(UnsupportedError) as raised:
        peer.load_routed(weights)
    assert str(raised.value) == reason


class ReferenceExperts(peers.Experts):
    def __init__(self, gate_up, down):
        self._dense = [[reference.dequantize_weight(weight) for weight in weights] for weights in (gate_up, down)]

    def prepare(self, x, topk_ids, topk_weights):
        return x, topk_ids, topk_weights

    def run(self, prepared):
        x, ids, weights = prepared
        return reference.moe_layer(x, *self._dense, ids, weights)

    def result(self, out):
        return out.astype(np.float32)


class ReferencePeer(NumpyDense):
    def load_moe(self, gate_up, down):
        return ReferenceExperts(gate_up, down)


class UpFirst(ReferencePeer):
    """Takes the gate's columns for the up projection's."""

    def load_moe(self, gate_up, down):
        half = down[0].k
        parts = ("words", "scale", "zero")
        swapped = [replace(w, **{name: np.roll(getattr(w, name), half, axis=1) for name in parts}) for w in gate_up]
        return super().load_moe(swapped, down)


def test_check_moe_tells_right_from_wrong(rng):
    gate_up, down = layer_of(rng, symmetric=False)
    assert peers.check_moe(ReferencePeer(1), gate_up, down, 2, rng) < 1e-7
    wrong = UpFirst(1)
    wrong.accuracy = "int8"
    with pytest.raises(peers.WrongResult, match="relative error"):
        peers.check_moe(wrong, gate_up, down, 2, rng)
