"""Whole models against transformers in float32 with the same weights dequantised: logits, greedy text, perplexity.

A router decides between experts, so an arbitrarily small error may change a choice, and then the token's logits. A
token at which float64's router would choose otherwise within the bound is left out. There are few such tokens. All
others count, also those that attend to a token that is left out.
"""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from asserts import relative_error

from marlin_cy.decoder.load import load_model
from marlin_cy.decoder.perplexity import perplexity
from marlin_cy.decoder.reference import reference_logits
from marlin_cy.moe.routing import Routing
from marlin_cy.reference import route

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

from language_models import CONFIGS, VOCABULARY, load_reference, write_model  # noqa: E402
from router_margins import decided  # noqa: E402

from marlin_cy.integrations.dequantized import dequantized_model  # noqa: E402

FOLDER = Path(str(files("marlin_cy") / "data" / "tiny-qwen3-moe-gptq-int4"))
BOUNDS = {"float32": 5e-4, "float16": 1e-3}
"""Of the relative error of logits with int16 products, by the cache's dtype."""
LEFT_OUT = 0.02
"""The largest share of tokens that may be left out."""
LENGTH = 300

WINDOW = 512
"""Tokens of a window of text whose perplexity is measured."""

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def text():
    return np.frombuffer((FOLDER / "validation.txt").read_bytes(), np.uint8).astype(np.int64)


@pytest.fixture(scope="module")
def reference():
    """The built-in model with dense weights, by transformers."""
    return dequantized_model(FOLDER)


def logits_of(model, tokens):
    """By transformers, float64 ``[tokens, vocabulary]``."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens)[None]).logits[0].double().numpy()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("model_type", CONFIGS)
def test_logits(tmp_path, model_type, rng):
    """Linear layers keep the norm of rows, about.

    With a gain of 2, attention's scores are some 4 times larger, and keys rounded to float16 alone change logits by
    more than the bound, in float64 too.
    """
    quantised, dense = write_model(tmp_path, model_type, gain=1.0, max_position_embeddings=LENGTH)
    texts = rng.integers(1, VOCABULARY, (2, LENGTH))
    reference = load_reference(dense)
    expected = np.concatenate([logits_of(reference, tokens) for tokens in texts])
    assert expected.std() > 0.1
    routers = None
    for cache_dtype, bound in BOUNDS.items():
        model = load_model(quantised, cache_dtype=cache_dtype, cache_tokens=2 * LENGTH, num_threads=1)
        routers = routers or [router_logits(model.plan, tokens) for tokens in texts]
        actual = [model.forward(tokens, sequence=model.new_sequence(), all_logits=True) for tokens in texts]
        counted = np.concatenate([counted_tokens(layers, bound) for layers in routers])
        error = relative_error(np.concatenate(actual)[counted], expected[counted])
        print(f"{model_type}, {cache_dtype} cache: error {error:.1e}, {(~counted).sum()} of {counted.size} left out")
        assert counted.mean() >= 1 - LEFT_OUT
        assert error < bound


def router_logits(plan, tokens):
    """``[(routing, logits)]`` of the MoE layers, by the reference, which does not depend on the cache's dtype."""
    layers = []
    reference_logits(plan, tokens, lambda *layer: layers.append(layer))
    return layers


def counted_tokens(layers, bound):
    """Whether the routers of all layers decide by more than the bound; bool ``[tokens]``."""
    return np.all([decided(routing, logits, bound) for routing, logits in layers], axis=0)


ROUTINGS = {
    "softmax": Routing(8, 2),
    "softmax_topk": Routing(8, 3, scoring="softmax_topk"),
    "max": Routing(8, 2, num_groups=4, topk_groups=2, group_score="max"),
    "top2_sum": Routing(
        8,
        2,
        scoring="sigmoid",
        correction_bias=np.linspace(-0.3, 0.3, 8),
        num_groups=4,
        topk_groups=2,
        group_score="top2_sum",
    ),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ROUTINGS)
def test_decided_tokens_keep_their_experts(name, rng):
    """Whatever the errors of the logits are, up to the largest; and other tokens may have others."""
    routing, relative = ROUTINGS[name], 0.05
    logits = rng.standard_normal((400, routing.num_experts))
    fixed = decided(routing, logits, relative)
    assert 40 < fixed.sum() < 380
    changed = np.full(len(logits), False)
    largest = relative * np.sqrt((logits**2).mean(axis=1, keepdims=True))
    experts = np.sort(route(logits, routing)[0])
    for _ in range(16):
        signs = rng.choice([-0.999, 0.999], logits.shape)
        changed |= (np.sort(route(logits + signs * largest, routing)[0]) != experts).any(axis=1)
    assert not (changed & fixed).any()
    assert changed.sum() > 0.5 * (~fixed).sum()


def test_a_margin_is_two_errors():
    logits = np.array([[1.0, -1.0], [1.0, -1.0]])
    routing = Routing(2, 1)
    assert decided(routing, logits, 0.999).all()
    assert not decided(routing, logits, 1.001).any()
    assert decided(Routing(2, 2), logits, 10.0).all()


def test_greedy_text(text, reference):
    """The text of the decoder is that of transformers: each token has the largest logit after those before it."""
    prompts = [text[begin : begin + 20 + begin // 100] for begin in range(0, 10_000, 1000)]
    texts = greedy_texts(load_model(FOLDER, cache_tokens=4096), prompts, 200)
    gaps = {}
    for number, (prompt, tokens) in enumerate(zip(prompts, texts, strict=True)):
        logits = logits_of(reference, np.concatenate([prompt, tokens[:-1]]))[len(prompt) - 1 :]
        largest = logits.argmax(axis=1)
        if different := np.flatnonzero(largest != tokens).tolist():
            row = logits[different[0]]
            gaps[f"prompt {number}, token {different[0]}"] = row.max() - row[tokens[different[0]]]
    assert gaps == {}


def greedy_texts(model, prompts, count):
    """The tokens after each prompt, int64 ``[prompts, count]``, whatever tokens they are."""
    sequences = [model.new_sequence() for _ in prompts]
    texts = np.empty((len(prompts), count), np.int64)
    parts = prompts
    for step in range(count):
        logits = model.forward_batch(zip(sequences, parts, strict=True))
        texts[:, step] = parts = np.argmax(logits, axis=1)
        parts = parts[:, None]
    return texts


@pytest.mark.parametrize("windows", [2, pytest.param(32, marks=pytest.mark.sweep)])
def test_perplexity(text, reference, windows):
    """With a cache of float16, the default; 32 windows are the whole text."""
    total = 0.0
    for begin in range(0, windows * WINDOW, WINDOW):
        tokens = text[begin : begin + WINDOW]
        logits = logits_of(reference, tokens)[:-1]
        total += (np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(WINDOW - 1), tokens[1:]]).sum()
    expected = np.exp(total / (windows * (WINDOW - 1)))
    for compute_dtype, bound in (("int16", 2e-4), ("int8", 5e-3)):
        model = load_model(FOLDER, num_threads=1, compute_dtype=compute_dtype)
        actual = perplexity(model, text.tolist(), WINDOW, windows)
        print(f"{compute_dtype}: {actual:.5f}, {100 * (actual / expected - 1):+.4f}% of {expected:.5f}")
        assert actual == pytest.approx(expected, rel=bound)
