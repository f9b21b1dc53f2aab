"""``marlin_cy.decoder.sampling``: what is drawn, and that it is the same everywhere."""

import json
import math

import numpy as np
import pytest

from marlin_cy.decoder.draw import LARGEST_SCORE, TABLES, Factor, settings_of, weights_of
from marlin_cy.decoder.sampling import Sampler, SamplingParams, mixed, random_bits, read_sampling
from marlin_cy.errors import CheckpointError, MarlinError
from marlin_cy.serve.scores import LEAST_EXPONENT, exp

DRAWS = 4000


def picks(logits, count=200, prompt=(), **options):
    """The tokens at positions 0, 1, ... with the same logits each time."""
    sampler = Sampler(SamplingParams(**options), len(logits), prompt)
    return [sampler.pick(np.asarray(logits, np.float32), position) for position in range(count)]


def shares(logits, count=DRAWS, **options):
    return np.bincount(picks(logits, count, **options), minlength=len(logits)) / count


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return weights / weights.sum()


LOGITS = [0.5, 2.0, -1.0, 1.5, 2.0, -40.0]


def test_greedy_takes_the_first_of_equal_logits():
    for options in ({}, {"temperature": 0}, {"temperature": 1e-9, "top_k": 3}, {"presence_penalty": 0.0}):
        assert picks(LOGITS, 3, **options) == [1, 1, 1]
    assert picks([-np.inf, -np.inf, -3.0], 1) == [2]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_shares_are_those_of_softmax(temperature):
    expected = softmax(np.array(LOGITS) / temperature)
    bound = 5 * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-12
    assert (np.abs(shares(LOGITS, temperature=temperature) - expected) <= bound).all()


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 4}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_k": 0}, {0, 1, 2, 3, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 1e-6}, {1}),
        ({"top_p": 0.5}, {1, 4}),
        ({"top_p": 0.9}, {1, 3, 4}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"min_p": 1.0}, {1, 4}),
        ({"min_p": 0.5}, {1, 3, 4}),
        ({"min_p": 0.0}, {0, 1, 2, 3, 4}),
        ({"top_k": 3, "top_p": 0.4, "min_p": 0.1}, {1, 4}),
    ],
)
def test_kept_tokens(options, kept):
    found = shares(LOGITS, temperature=1.0, **options)
    assert set(np.flatnonzero(found)) == kept
    among = [LOGITS[token] if token in kept else -np.inf for token in range(len(LOGITS))]
    assert found == pytest.approx(softmax(among), abs=0.04)


def test_kept_tokens_of_large_vocabularies(rng):
    """Against a definition by sorting, with equal logits among them."""
    logits = np.round(rng.standard_normal(5000) * 3, 1).astype(np.float32)
    order = np.argsort(-logits.astype(np.float64), kind="stable")
    probabilities = softmax(logits)[order]
    for top_k in (1, 7, 100, 4999):
        assert set(picks(logits, 300, temperature=3.0, top_k=top_k)) <= set(order[:top_k].tolist())
    for top_p in (0.1, 0.5, 0.99):
        count = int(np.searchsorted(np.cumsum(probabilities), top_p)) + 1
        assert set(picks(logits, 300, temperature=1.0, top_p=top_p)) <= set(order[:count].tolist())


def test_repetition_penalty():
    """Of the prompt's tokens and the text's: positive logits are divided, negative ones multiplied."""
    assert picks([3.0, 2.0, -1.0], 4, repetition_penalty=2.0) == [0, 1, 0, 0]
    assert picks([3.0, 2.0, -1.0], 1, prompt=[0, 0], repetition_penalty=2.0) == [1]
    assert picks([-1.0, -1.5], 1, prompt=[0], repetition_penalty=2.0) == [1]
    assert picks([3.0, 2.0], 3, prompt=[0], repetition_penalty=1.0) == [0, 0, 0]


def test_presence_and_frequency_penalty():
    """Of the text's tokens only: once, or each time."""
    assert picks([3.0, 2.5], 4, prompt=[0], presence_penalty=1.0) == [0, 1, 0, 0]
    assert picks([3.0, 2.5], 4, frequency_penalty=0.4) == [0, 0, 1, 0]
    assert picks([3.0, 2.5], 3, presence_penalty=-1.0) == [0, 0, 0]


def test_the_same_on_every_machine():
    """Recorded once; an exact computation gives them again anywhere."""
    logits = (np.arange(1000) * 7919 % 1000 / 100).astype(np.float32)
    assert picks(logits, 8, temperature=1.0, seed=1) == RECORDED["temperature"]
    assert picks(logits, 8, temperature=0.7, top_k=40, top_p=0.9, seed=2) == RECORDED["top_k, top_p"]
    assert picks(logits, 8, temperature=0.9, min_p=0.2, repetition_penalty=1.2, seed=-3) == RECORDED["min_p"]


def test_it_is_what_its_definition_says(rng):
    """Against plain Python, one token at a time."""
    for case in range(200):
        logits = np.round(rng.standard_normal(40) * 3, 1).astype(np.float32)
        options = {
            "temperature": float(rng.choice([0.4, 1.0, 2.0])),
            "top_k": rng.choice([None, 1, 5, 30]),
            "top_p": rng.choice([None, 0.3, 0.8, 1.0]),
            "min_p": rng.choice([None, 0.02, 0.3]),
            "seed": case,
        }
        (token,) = picks(logits, 1, **options)
        assert token == drawn_by_definition(logits.tolist(), random_bits(mixed(case), 0) / 2**64, **options)


def drawn_by_definition(logits, number, *, temperature, top_k, top_p, min_p, seed):
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[: top_k or None]
    weights = {token: math.exp((logits[token] - logits[order[0]]) / temperature) for token in order}
    if top_p is not None and top_p < 1:
        total, kept = 0.0, []
        for token in order:
            kept.append(token)
            total += weights[token]
            if total >= top_p * sum(weights.values()):
                break
        order = kept
    order = sorted(token for token in order if weights[token] >= (min_p or 0))
    total, target = 0.0, number * sum(weights[token] for token in order)
    for token in order:
        total += weights[token]
        if total > target:
            return token
    raise AssertionError("no token")


def test_a_draw_depends_on_seed_and_position_alone():
    logits = np.asarray(LOGITS, np.float32)
    sampler = Sampler(SamplingParams(temperature=1.0, seed=4), len(logits), [])
    expected = [sampler.pick(logits, position) for position in range(50)]
    again = Sampler(SamplingParams(temperature=1.0, seed=4), len(logits), [1, 2])
    assert [again.pick(logits, position) for position in reversed(range(50))] == expected[::-1]
    assert picks(LOGITS, 50, temperature=1.0, seed=5) != expected
    assert picks(LOGITS, 50, temperature=1.0) == picks(LOGITS, 50, temperature=1.0, seed=0)


def test_random_numbers():
    """SplitMix64's own stream, by position: the first values from seed 1234567 are published with its source."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [random_bits(1234567, position) for position in range(3)] == published
    numbers = np.array([random_bits(99, position) / 2**64 for position in range(20000)])
    assert 0 <= numbers.min() < numbers.max() < 1
    assert np.histogram(numbers, 10, (0, 1))[0] == pytest.approx(np.full(10, 2000), abs=5 * math.sqrt(2000))


@pytest.mark.parametrize("temperature", [1e-6, 0.01, 0.7, 1.0, 3.0, 1e4, 1e38])
def test_weights(temperature, rng):
    """Powers of e to the bound that ``draw.py`` gives; never larger for a larger distance; 0 from the limit on."""
    settings = settings_of(temperature, None, None, 0.25)
    scale = min(LARGEST_SCORE, int(temperature * 40 * 2**24))
    distances = np.unique(rng.integers(0, scale + 2, 20_000))
    weights = weights_of(distances, settings.rate)
    expected = np.exp(-distances / 2**24 / temperature) * 2**40
    assert (np.abs(weights - expected) <= 2e-6 * expected + 1).all()
    assert (np.diff(weights) <= 0).all()
    assert weights_of(np.zeros(1, np.int64), settings.rate) == 2**40
    for limit, least in ((settings.limit, 1), (settings.min_limit, 2**38)):
        assert weights_of(np.array([limit - 1]), settings.rate) >= least
        assert limit > 2 * LARGEST_SCORE or weights_of(np.array([limit]), settings.rate) < least


def test_tables():
    """Correctly rounded, and each product of two neighbours is above the next one: so weights cannot grow."""
    exponents = -np.arange(256) / np.array([[256], [65536], [16777216]])
    assert np.abs(TABLES - np.exp2(exponents + 31)).max() <= 0.5 + 1e-6
    f = np.arange(1 << 24, (1 << 24) - 300_000, -1) - 1
    rate = Factor(1, 0)
    assert (np.diff(weights_of(f, rate)) > 0).all()


def test_factors():
    for value in (1.0, 1.3, 0.7, 2.0**24 - 1, 3e-9):
        factor = Factor.of(value)
        assert abs(math.ldexp(factor.mantissa, -factor.shift) / value - 1) <= 2.0**-24
        assert 2**23 <= factor.mantissa < 2**24
    assert Factor.of(math.inf) == Factor.of(1e30) == Factor(2**24 - 1, 0)
    assert Factor.of(1e-30) == Factor(0, 0)
    assert Factor.of(1 - 2.0**-53) == Factor.of(1.0)


def test_penalties_of_extreme_values():
    """No sum overflows, and what is not finite stays so."""
    logits = [1e30, -1e30, -math.inf, 5.0, 5.0]
    options = {"frequency_penalty": 1e38, "presence_penalty": 1.0, "repetition_penalty": 1e-38}
    assert picks(logits, 3, prompt=[2], **options) == [0, 3, 4]
    assert picks([1.0, 2.0], 2, prompt=[0], frequency_penalty=-1e38) == [1, 1]


def test_exp():
    x = -np.concatenate([np.arange(0, 37, 1e-3), np.arange(0, 37, 1 / 256), [37.0]])
    power = x.copy()
    exp(power)
    assert np.abs(power / np.exp(x) - 1).max() < 1e-10
    low = np.array([-38.0, -1e300, -np.inf])
    exp(low)
    assert (low <= 1.01 * math.exp(LEAST_EXPONENT)).all()
    assert (low >= 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite(value):
    logits = np.array([1.0, value, 2.0], np.float32)
    for options in ({}, {"temperature": 1.0}, {"repetition_penalty": 1.5}):
        with pytest.raises(MarlinError, match=rf"position 17: the model's logits have {value} for token 1"):
            Sampler(SamplingParams(**options), 3, []).pick(logits, 17)
    with pytest.raises(MarlinError, match="-inf"):
        Sampler(SamplingParams(), 2, []).pick(np.full(2, -np.inf, np.float32), 0)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *(("temperature", value, ValueError) for value in (-1, -1e-9, math.nan, math.inf)),
        *(("temperature", value, TypeError) for value in ("warm", True, [1.0])),
        *(("top_p", value, ValueError) for value in (0, -0.1, 1.01, math.nan)),
        *(("min_p", value, ValueError) for value in (-0.1, 1.01)),
        *(("repetition_penalty", value, ValueError) for value in (0, -1, math.inf)),
        ("presence_penalty", math.nan, ValueError),
        ("frequency_penalty", "much", TypeError),
        ("top_k", -1, ValueError),
        ("top_k", 1.5, TypeError),
        ("seed", 1 << 64, ValueError),
        ("seed", 0.5, TypeError),
        ("stop", "", ValueError),
        ("stop", ["end", ""], ValueError),
        ("stop", [1], TypeError),
        ("stop", b"end", TypeError),
        ("stop", 3, TypeError),
        ("stop_token_ids", 3, TypeError),
        ("stop_token_ids", "3", TypeError),
        ("stop_token_ids", [0.5], TypeError),
    ],
)
def test_invalid_values(name, value, error):
    with pytest.raises(error, match=f"^{name}: "):
        SamplingParams(**{name: value})


def test_generation_config(tmp_path):
    def read(config, **given):
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
        return read_sampling(tmp_path, **given)

    assert read_sampling(tmp_path) == SamplingParams()
    file = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05, "other": []}
    assert read(file) == SamplingParams(temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05)
    assert read(file, top_k=None, temperature=0.0) == SamplingParams(
        temperature=0.0, top_k=20, top_p=0.95, repetition_penalty=1.05
    )
    assert read({"do_sample": True}) == SamplingParams(temperature=1.0)
    assert read({"temperature": 0.6, "top_p": None}) == SamplingParams(temperature=0.6)
    assert read({"do_sample": False, "temperature": 0.6}) == SamplingParams()
    for config in ({"top_p": 7}, {"temperature": "hot"}, {"do_sample": 1}, {"top_k": -2}):
        with pytest.raises(CheckpointError, match=rf"generation_config.json: {list(config)[0]}: got"):
            read(config)
    with pytest.raises(ValueError, match="^top_p: ") as raised:
        read({}, top_p=2.0)
    assert not isinstance(raised.value, CheckpointError)


RECORDED = {
    "temperature": [754, 371, 445, 952, 210, 595, 458, 198],
    "top_k, top_p": [284, 926, 383, 778, 568, 926, 926, 605],
    "min_p": [162, 730, 852, 458, 99, 408, 605, 779],
}
