"""The CPU's entry points read and write host tensors of PyTorch in place, with the bits that arrays give."""

import numpy as np
import pytest
from problems import DTYPES, activations, random_problem

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from marlin_cy import MoeLayer, UnsupportedError  # noqa: E402
from marlin_cy.backends import get_backend  # noqa: E402
from marlin_cy.cpu._buffers import accept_tensors  # noqa: E402
from marlin_cy.integrations.modules import array_of, tensor_over  # noqa: E402

accept_tensors(torch.Tensor, {getattr(torch, name): name for name in DTYPES})

M, K, N = 5, 128, 64


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def cpu(request):
    backend = get_backend("cpu")
    return backend, backend.new_context(num_threads=request.param)


def same_bits(tensor, array):
    return array_of(tensor).tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_linear(cpu, rng, dtype):
    backend, ctx = cpu
    linear = random_problem(rng, 1, K, N, 32).linear(backend)
    x, out = activations(rng, M, K, dtype), np.empty((M, N), dtype)
    linear.forward(ctx, x, out, M)
    guarded = tensor_over(np.zeros((M + 2, N), dtype))
    linear.forward(ctx, tensor_over(x.reshape(1, M, K)), guarded[1:-1], M)
    assert same_bits(guarded[1:-1], out)
    assert not guarded[0].any() and not guarded[-1].any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_layer(cpu, rng, dtype):
    backend, ctx = cpu
    stacks = [random_problem(rng, 3, *sizes, 32).stack(backend) for sizes in ((K, 2 * N), (N, K))]
    layer = MoeLayer(*stacks, top_k=2)
    x, logits = activations(rng, M, K, dtype), activations(rng, M, 3, dtype)
    expected, out = layer(ctx, x, logits), torch.empty((M, K), dtype=tensor_over(x).dtype)
    assert layer(ctx, tensor_over(x), tensor_over(logits), out=out) is out
    assert same_bits(out, expected)


@pytest.mark.parametrize("given", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("wanted", DTYPES.values(), ids=DTYPES)
def test_dense(cpu, rng, given, wanted):
    """Rows are widened before the product, and results are rounded once after it; the same for arrays and tensors."""
    backend, ctx = cpu
    x, weight = activations(rng, M, K, given), activations(rng, N, K, DTYPES["bfloat16"])
    bias = activations(rng, 1, N)[0]
    wide = np.empty((M, N), np.float32)
    backend.dense(ctx, x.astype(np.float32), weight, bias, wide)
    arrays, tensors = np.empty((M, N), wanted), tensor_over(np.empty((M, N), wanted))
    backend.dense(ctx, x, weight, bias, arrays)
    backend.dense(ctx, tensor_over(x), weight, bias, tensors)
    assert arrays.tobytes() == wide.astype(wanted).tobytes()
    assert same_bits(tensors, arrays)


GOOD = torch.zeros(M, K)
BAD = {
    "dtype": (GOOD.double(), TypeError, "input: got dtype torch.float64, expected float32, float16 or bfloat16"),
    "width": (GOOD[:, :-1], ValueError, r"input: got shape \(5, 127\), expected \[..., 128\]"),
    "flat": (GOOD.view(-1), ValueError, r"input: got shape \(640,\), expected \[..., 128\]"),
    "no dimension": (torch.zeros(()), ValueError, r"input: got shape \(\), expected \[..., 128\]"),
    "strides": (torch.zeros(K, M).T, ValueError, r"input: got strides \(1, 5\) for shape \(5, 128\), expected contig"),
    "gradient": (
        GOOD.clone().requires_grad_(),
        UnsupportedError,
        "input: packed layers need host tensors",
    ),
    "device": (GOOD.to("meta"), UnsupportedError, "input: packed layers need host tensors without gradients"),
}


@pytest.mark.parametrize(("x", "error", "message"), BAD.values(), ids=BAD)
def test_bad_tensors(cpu, rng, x, error, message):
    backend, ctx = cpu
    linear = random_problem(rng, 1, K, N, 32).linear(backend)
    with pytest.raises(error, match=f"^{message}"):
        linear.forward(ctx, x, torch.empty(M, N), M)


def test_overlap(cpu, rng):
    backend, ctx = cpu
    linear = random_problem(rng, 1, K, K, 32).linear(backend)
    with pytest.raises(ValueError, match="out: shares memory with the input"):
        linear.forward(ctx, GOOD, GOOD, M)
