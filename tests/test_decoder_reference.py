"""The reference of the decoder's operations, compared with PyTorch's own in float64."""

import numpy as np
import pytest

from marlin_cy.decoder.plan import DenseLinear, MlpPlan
from marlin_cy.decoder.reference import (
    attention,
    delta_gates,
    delta_rule,
    dense,
    gated_rms_norm,
    l2_normalize,
    mlp,
    rms_norm,
    short_conv,
)

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch.nn import functional as F  # noqa: E402

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def tensors(*arrays):
    return [torch.from_numpy(np.asarray(array)) for array in arrays]


def test_norms():
    x, gate, weight = (np.random.default_rng(0).standard_normal(shape) for shape in ((5, 7), (5, 7), 7))
    xt, gate_t, weight_t = tensors(x, gate, weight)
    expected = F.rms_norm(xt, (7,), weight_t, eps=1e-3)
    np.testing.assert_allclose(rms_norm(x, weight, 1e-3), expected, **CLOSE)
    np.testing.assert_allclose(rms_norm(x, None, 1e-3), F.rms_norm(xt, (7,), eps=1e-3), **CLOSE)
    np.testing.assert_allclose(gated_rms_norm(x, weight, gate, 1e-3), expected * F.silu(gate_t), **CLOSE)
    normal = l2_normalize(x, 0.5)
    np.testing.assert_allclose(normal, 0.5 * F.normalize(xt), rtol=1e-6)
    np.testing.assert_array_equal(l2_normalize(np.zeros(4)), np.zeros(4))


def random_attention(rng, queries=6, length=9, heads=4, kv_heads=2, head_dim=5, value_dim=3):
    q = rng.standard_normal((queries, heads, head_dim))
    keys, values = (rng.standard_normal((length, kv_heads, width)) for width in (head_dim, value_dim))
    return q, keys, values, np.arange(length - queries, length)


def torch_attention(q, keys, values, mask, scale):
    q, keys, values = (torch.from_numpy(array).transpose(0, 1)[None] for array in (q, keys, values))
    out = F.scaled_dot_product_attention(
        q, keys, values, attn_mask=torch.from_numpy(mask), scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1).numpy()


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_attention(window):
    q, keys, values, positions = random_attention(np.random.default_rng(1))
    distance = positions[:, None] - np.arange(len(keys))
    mask = (distance >= 0) & (distance < (window or 1000))
    expected = torch_attention(q, keys, values, mask, 0.3)
    np.testing.assert_allclose(attention(q, keys, values, positions, scale=0.3, window=window), expected, **CLOSE)


def test_attention_does_not_use_what_a_query_does_not_see():
    q, keys, values, positions = random_attention(np.random.default_rng(2))
    expected = attention(q, keys, values, positions, scale=1, window=2)
    for row in range(len(q)):
        hidden = np.ones(len(keys), bool)
        hidden[positions[row] - 1 : positions[row] + 1] = False
        damaged = [np.where(hidden[:, None, None], np.nan, array) for array in (keys, values)]
        alone = attention(q[row : row + 1], *damaged, positions[row : row + 1], scale=1, window=2)
        np.testing.assert_array_equal(alone[0], expected[row])


def test_a_sink_is_a_key_without_a_value():
    q, keys, values, positions = random_attention(np.random.default_rng(3), heads=2)
    sinks = np.array([0.5, -1.0])
    out = attention(q, keys, values, positions, scale=0.7, sinks=sinks)
    # One more value of each head carries the sink's logit, and one more position has that value alone.
    more_q = np.concatenate([q, np.broadcast_to(sinks[:, None] / 0.7, (len(q), 2, 1))], axis=2)
    more_keys = np.concatenate([keys, np.zeros((len(keys), 2, 1))], axis=2)
    sink_key = np.zeros((1, 2, more_keys.shape[2]))
    sink_key[..., -1] = 1
    more_keys = np.concatenate([sink_key, more_keys])
    more_values = np.concatenate([np.zeros((1, *values.shape[1:])), values])
    expected = attention(more_q, more_keys, more_values, positions + 1, scale=0.7)
    np.testing.assert_allclose(out, expected, **CLOSE)
    np.testing.assert_allclose(attention(q, keys, values, positions, scale=0.7, sinks=[1e4, 1e4]), 0, atol=1e-300)


def test_soft_cap():
    q, keys, values, positions = random_attention(np.random.default_rng(4), queries=1, heads=1, kv_heads=1)
    scores = 2 * np.tanh(0.9 * (keys[:, 0] @ q[0, 0]) / 2)
    weights = np.exp(scores) / np.exp(scores).sum()
    out = attention(q, keys, values, positions, scale=0.9, soft_cap=2.0)
    np.testing.assert_allclose(out[0, 0], weights @ values[:, 0], **CLOSE)


def test_short_conv():
    rng = np.random.default_rng(5)
    x, weight = rng.standard_normal((9, 4)), rng.standard_normal((4, 3))
    xt, weight_t = tensors(x, weight)
    expected = F.silu(F.conv1d(xt.T[None], weight_t[:, None], padding=2, groups=4)[0, :, :9].T).numpy()
    whole, state = short_conv(x, weight)
    np.testing.assert_allclose(whole, expected, **CLOSE)
    np.testing.assert_array_equal(state, x[-2:])
    first, between = short_conv(x[:1], weight)
    rest, end = short_conv(x[1:], weight, between)
    np.testing.assert_array_equal(np.concatenate([first, rest]), whole)
    np.testing.assert_array_equal(end, state)


def random_delta(rng, tokens=7):
    q, k = (l2_normalize(rng.standard_normal((tokens, 2, 5))) for _ in range(2))
    v = rng.standard_normal((tokens, 4, 3))
    decay, beta = delta_gates(*rng.standard_normal((2, tokens, 4)), *rng.standard_normal((2, 4)))
    return q, k, v, decay, beta


def test_delta_rule():
    """As transformers' token-by-token form, which is in float32."""
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, decay, beta = random_delta(np.random.default_rng(6))
    out, state = delta_rule(q * 5**-0.5, k, v, decay, beta)
    qt, kt = (torch.from_numpy(array).repeat_interleave(2, dim=1)[None] for array in (q, k))
    vt, log_decay, beta_t = (tensor[None] for tensor in tensors(v, np.log(decay), beta))
    expected, expected_state = modeling.torch_recurrent_gated_delta_rule(
        qt, kt, vt, log_decay, beta_t, initial_state=None, output_final_state=True
    )
    np.testing.assert_allclose(out, expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state, expected_state[0], rtol=1e-4, atol=1e-5)


def test_delta_rule_continues_from_a_state():
    problem = random_delta(np.random.default_rng(7))
    whole, state = delta_rule(*problem)
    first, between = delta_rule(*(array[:3] for array in problem))
    rest, end = delta_rule(*(array[3:] for array in problem), between)
    np.testing.assert_array_equal(np.concatenate([first, rest]), whole)
    np.testing.assert_array_equal(end, state)


def test_delta_gates():
    decay, beta = delta_gates([[-1e4, 0.0, 1e4]], [[-1e4, 0.0, 1e4]], np.zeros(3), np.zeros(3))
    np.testing.assert_allclose(decay, [[1, 0.5, 0]], **CLOSE)
    np.testing.assert_allclose(beta, [[0, 0.5, 1]], **CLOSE)


def test_dense_and_mlp():
    rng = np.random.default_rng(8)
    x, gate, up, down = (rng.standard_normal(shape) for shape in ((3, 6), (4, 6), (4, 6), (6, 4)))
    bias = rng.standard_normal(4)
    xt, gate_t, up_t, down_t, bias_t = tensors(x, gate, up, down, bias)
    np.testing.assert_allclose(dense(x, gate, bias), F.linear(xt, gate_t, bias_t), **CLOSE)
    plan = MlpPlan(DenseLinear(gate, bias), DenseLinear(up), DenseLinear(down), "silu")
    inner = F.silu(F.linear(xt, gate_t, bias_t)) * F.linear(xt, up_t)
    np.testing.assert_allclose(mlp(x, plan), F.linear(inner, down_t), **CLOSE)
