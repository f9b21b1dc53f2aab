"""Unquantised layers in the plugin of vLLM, with a stand-in for vLLM."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

import fake_vllm  # noqa: E402
import torch  # noqa: E402

K, N = 72, 40


@pytest.fixture
def method(monkeypatch):
    config = fake_vllm.install(monkeypatch)
    found = config.VllmConfig.from_config({"quant_method": "gptq", "bits": 4, "group_size": 32})
    return found.get_quant_method(fake_vllm.LinearBase(), "mlp.gate")


def small_integers(rng, *shape, dtype=torch.bfloat16):
    """Numbers whose products and sums are exact in float32."""
    return torch.from_numpy(rng.integers(-8, 9, shape).astype(np.float32)).to(dtype)


def layer_of(weight):
    return fake_vllm.LinearBase(weight=torch.nn.Parameter(weight, requires_grad=False))


def never(*args):
    raise AssertionError("PyTorch multiplies")


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (5,), (0,), (2, 3)])
def test_products(method, rng, monkeypatch, shape, with_bias):
    """Rounded once: the sum and the bias are exact before."""
    layer = layer_of(small_integers(rng, N, K))
    x, bias = small_integers(rng, *shape, K), small_integers(rng, N) / 4 if with_bias else None
    exact = x.double() @ layer.weight.double().T + (bias.double() if with_bias else 0)
    method.process_weights_after_loading(layer)
    monkeypatch.setattr(fake_vllm.UnquantizedLinearMethod, "apply", never)
    found = method.apply(layer, x, bias)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, exact.to(torch.bfloat16))


def test_rows_that_are_not_contiguous(method, rng):
    layer = layer_of(small_integers(rng, N, K))
    method.process_weights_after_loading(layer)
    x = small_integers(rng, K, 6)
    assert torch.equal(method.apply(layer, x.T), method.apply(layer, x.T.contiguous()))


def test_compiled(method, rng):
    """``torch.compile`` takes the product for one operator."""
    layer = layer_of(small_integers(rng, N, K))
    method.process_weights_after_loading(layer)
    x, bias = small_integers(rng, 3, K), small_integers(rng, N)
    compiled = torch.compile(method.apply, backend="eager", fullgraph=True)
    assert torch.equal(compiled(layer, x, bias), method.apply(layer, x, bias))


def test_shape_on_the_meta_device(method):
    found = torch.ops.marlin_cy_vllm.linear(torch.empty((3, K), dtype=torch.bfloat16, device="meta"), None, "gate", N)
    assert (found.shape, found.dtype) == ((3, N), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_left_to_vllm(method, rng, monkeypatch, dtype):
    layer, x = layer_of(small_integers(rng, N, K, dtype=dtype)), small_integers(rng, 2, K, dtype=dtype)
    method.process_weights_after_loading(layer)
    monkeypatch.setattr(method, "compute", never)
    assert torch.equal(method.apply(layer, x), torch.nn.functional.linear(x, layer.weight))
