"""Attention in the plugin of vLLM, with a stand-in for vLLM."""

import types

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

import fake_vllm  # noqa: E402
import torch  # noqa: E402

from marlin_cy.errors import UnsupportedError  # noqa: E402

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
NAME = "model.layers.0.self_attn.attn"
BLOCK, HEADS, KV_HEADS, HEAD_DIM = 32, 4, 2, 16


@pytest.fixture
def plugin(monkeypatch):
    config = fake_vllm.install(monkeypatch)
    return types.SimpleNamespace(
        method=config.VllmConfig.from_config(GPTQ),
        vllm_config=config.get_current_vllm_config(),
    )


def seen(plugin, layer):
    """Let the plugin see a layer; its attention afterwards."""
    assert plugin.method.get_quant_method(layer, NAME) is None
    return layer.impl


def causal(queries, keys, values, scale, window):
    """One head in float64: the queries are the last positions."""
    scores = queries @ keys.T * scale
    first = len(keys) - len(queries)
    for row in range(len(queries)):
        scores[row, first + row + 1 :] = -np.inf
        if window:
            scores[row, : max(0, first + row + 1 - window)] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ values


def common(rows, lengths, table, causal=True):
    """What vLLM says of a step; more sequences than there are have no meaning."""
    return types.SimpleNamespace(
        query_start_loc=torch.tensor([0, *np.cumsum(rows), 0], dtype=torch.int32),
        seq_lens=torch.tensor([*lengths, 0], dtype=torch.int32),
        block_table_tensor=torch.tensor([*table, [-1, -1]], dtype=torch.int32),
        num_reqs=len(rows),
        causal=causal,
    )


def builder(layer):
    spec = types.SimpleNamespace(block_size=BLOCK, num_kv_heads=KV_HEADS)
    return layer.attn_backend.get_builder_cls()(spec, [NAME], None, torch.device("cpu"))


@pytest.mark.parametrize("window", [None, 9])
def test_two_steps(plugin, rng, window):
    """A prompt of 40 and one of 3, and a row of each: as in float64, within the rounding of sums in float32."""
    layer = fake_vllm.Attention(sliding_window=window)
    attention = seen(plugin, layer)
    attention.process_weights_after_loading(torch.float32)
    assert layer.attn_backend.get_impl_cls() is type(attention)
    table, cache = [[3, 0], [2, 1]], torch.zeros(4, KV_HEADS, BLOCK, 2 * HEAD_DIM)
    known = [np.zeros((2, 0, KV_HEADS, HEAD_DIM)) for _ in table]
    for rows, lengths in (([40, 3], [40, 3]), ([1, 1], [41, 4])):
        q, k, v = (
            torch.from_numpy(rng.standard_normal((sum(rows), heads, HEAD_DIM)).astype(np.float32))
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        out = torch.zeros_like(q)
        batch = builder(layer).build(0, common(rows, lengths, table))
        assert attention.forward(layer, q, k, v, cache, batch, output=out) is out
        start = 0
        for number, count in enumerate(rows):
            part = slice(start, start + count)
            start += count
            new = np.stack([k[part].double().numpy(), v[part].double().numpy()])
            keys, values = known[number] = np.concatenate([known[number], new], axis=1)
            for head in range(HEADS):
                kv = head // (HEADS // KV_HEADS)
                exact = causal(q[part, head].double().numpy(), keys[:, kv], values[:, kv], 0.25, window)
                # Errors of the scores and of both sums, relative to the largest value.
                bound = 8 * HEAD_DIM * np.finfo(np.float32).eps * np.abs(values).max()
                np.testing.assert_allclose(out[part, head].numpy(), exact, rtol=0, atol=bound)


def test_sinks_are_read_after_loading(plugin):
    """Rows of zeros see one position with weight e^0 of e^0 + e^1."""
    sinks = torch.zeros(HEADS, dtype=torch.bfloat16)
    layer = fake_vllm.Attention(impl=fake_vllm.CPUAttentionBackendImpl(sinks=sinks))
    attention = seen(plugin, layer)
    sinks.fill_(1)
    attention.process_weights_after_loading(torch.bfloat16)
    q, ones = torch.zeros(1, HEADS, HEAD_DIM), torch.ones(1, KV_HEADS, HEAD_DIM)
    batch = builder(layer).build(0, common([1], [1], [[0, 1]]))
    out = attention.forward(
        layer, q, ones, ones, torch.zeros(2, KV_HEADS, BLOCK, 2 * HEAD_DIM), batch, output=q.clone()
    )
    np.testing.assert_allclose(out.numpy(), 1 / (1 + np.e), rtol=4 * np.finfo(np.float32).eps)


def test_without_metadata_nothing_runs(plugin):
    """vLLM is warming up."""
    layer, rows = fake_vllm.Attention(), torch.ones(1, HEADS, HEAD_DIM)
    out = seen(plugin, layer).forward(layer, rows, rows, rows, torch.zeros(0), None, output=rows.clone())
    assert torch.equal(out, rows)


def test_seen_twice(plugin):
    """vLLM asks again after the weights are loaded."""
    layer = fake_vllm.Attention()
    attention = seen(plugin, layer)
    assert attention is not None
    assert seen(plugin, layer) is attention


def test_compiled_models_are_told_apart(plugin):
    """A compiled model without the operator that stores keys and values is of no use to vLLM's own attention."""
    assert plugin.vllm_config.additional_config == {}
    seen(plugin, ChunkedAttention())
    assert plugin.vllm_config.additional_config == {}
    layer = fake_vllm.Attention()
    seen(plugin, layer)
    assert layer.attn_backend.forward_includes_kv_cache_update
    assert plugin.vllm_config.additional_config == {"marlin_cy_attention": "BlockAttention"}


class ChunkedAttention(fake_vllm.Attention):
    """A layer of vLLM that makes its own metadata."""


LEFT = {
    "another class": ChunkedAttention,
    "another backend": lambda: fake_vllm.Attention(attn_backend=object),
    "ALiBi": lambda: fake_vllm.Attention(impl=fake_vllm.CPUAttentionBackendImpl(alibi_slopes=torch.ones(HEADS))),
    "an encoder": lambda: fake_vllm.Attention(attn_type="encoder"),
    "another layer's cache": lambda: fake_vllm.Attention(kv_sharing_target_layer_name="model.layers.0"),
    "other values": lambda: fake_vllm.Attention(head_size_v=32),
    "an FP8 cache": lambda: fake_vllm.Attention(kv_cache_torch_dtype=torch.uint8),
    "heads of 20": lambda: fake_vllm.Attention(head_size=20, head_size_v=20),
}


@pytest.mark.parametrize("case", LEFT)
def test_layers_that_are_left_to_vllm(plugin, case):
    layer = LEFT[case]()
    before = layer.impl, layer.attn_backend
    assert (seen(plugin, layer), layer.attn_backend) == before


MODELS = {
    "speculation": ("speculative_config", object()),
    "a cache that is sent": ("kv_transfer_config", object()),
    "options of another kind": ("additional_config", object()),
    "blocks of 24": ("cache_config", types.SimpleNamespace(block_size=24)),
    "recurrent layers": ("model_config", types.SimpleNamespace(is_hybrid=True, is_mm_prefix_lm=False)),
    "images seen as a whole": ("model_config", types.SimpleNamespace(is_hybrid=False, is_mm_prefix_lm=True)),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_that_are_left_to_vllm(plugin, case):
    name, value = MODELS[case]
    setattr(plugin.vllm_config, name, value)
    layer = fake_vllm.Attention()
    before = layer.impl
    assert seen(plugin, layer) is before


def test_vllm_keeps_its_own_fast_kernels(monkeypatch):
    config = fake_vllm.install(monkeypatch, has_own_kernels=True)
    layer = fake_vllm.Attention()
    before = layer.impl
    assert config.VllmConfig.from_config(GPTQ).get_quant_method(layer, NAME) is None
    assert layer.impl is before


def test_rows_that_see_later_positions_are_refused(plugin):
    layer = fake_vllm.Attention()
    seen(plugin, layer)
    with pytest.raises(UnsupportedError, match="attention: got causal=False"):
        builder(layer).build(0, common([1], [1], [[0, 1]], causal=False))
