"""Whole models on the CPU: logits against the reference, sequences that share a cache, and invalid calls."""

import threading
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from asserts import relative_error

from marlin_cy import ContextInUse, UnsupportedError
from marlin_cy.cpu.backend import CpuBackend
from marlin_cy.decoder.appending import cut_into_steps
from marlin_cy.decoder.cache import CacheFull
from marlin_cy.decoder.load import load_model
from marlin_cy.decoder.reference import reference_logits
from marlin_cy.interface import Backend

FOLDER = Path(str(files("marlin_cy") / "data" / "tiny-qwen3-moe-gptq-int4"))
TEXT = np.frombuffer((FOLDER / "validation.txt").read_bytes()[:300], np.uint8).astype(np.int32)
# The bounds of docs/numerics.md: a layer's int16 products are within 5e-5, and a float16 rounds to 5e-4.
BOUNDS = {"float32": 5e-4, "float16": 1e-3, "bfloat16": 8e-3}


@pytest.fixture(scope="module")
def model():
    return load_model(FOLDER, cache_dtype="float32", cache_tokens=2048, num_threads=2)


@pytest.fixture(scope="module")
def logits(model):
    return model.forward(TEXT, sequence=model.new_sequence(), all_logits=True)


@pytest.fixture
def sequence(model):
    sequence = model.new_sequence()
    yield sequence
    if not sequence.freed:
        model.free(sequence)


class TestLogits:
    @pytest.mark.sampled(2)
    @pytest.mark.parametrize("cache_dtype", BOUNDS)
    def test_near_the_reference(self, cache_dtype):
        model = load_model(FOLDER, cache_dtype=cache_dtype, context_length=512)
        logits = model.forward(TEXT, all_logits=True)
        assert (logits.shape, logits.dtype) == ((len(TEXT), model.vocab_size), np.float32)
        assert relative_error(logits, reference_logits(model.plan, TEXT)) < BOUNDS[cache_dtype]

    def test_compute_dtype(self):
        model = load_model(FOLDER, compute_dtype="int8", context_length=512)
        error = relative_error(model.forward(TEXT, all_logits=True), reference_logits(model.plan, TEXT))
        assert 1e-3 < error < 5e-2

    def test_last_logits(self, model, sequence, logits):
        last = model.forward(TEXT, sequence=sequence)
        assert last.shape == (model.vocab_size,)
        np.testing.assert_array_equal(last, logits[-1])

    def test_own_sequence(self, logits):
        model = load_model(FOLDER, cache_dtype="float32", context_length=512)
        np.testing.assert_array_equal(model.forward(TEXT[:9]), logits[8])
        np.testing.assert_array_equal(model.forward(list(map(int, TEXT[9:12]))), logits[11])

    def test_returned_arrays_are_new(self, model, sequence):
        first = model.forward(TEXT[:3], sequence=sequence)
        kept = first.copy()
        model.forward(TEXT[3:6], sequence=sequence)
        np.testing.assert_array_equal(first, kept)

    def test_prompts_longer_than_a_step(self, model, sequence, logits, monkeypatch):
        monkeypatch.setattr("marlin_cy.decoder.model.MAX_ROWS", 64)
        np.testing.assert_array_equal(model.forward(TEXT, sequence=sequence, all_logits=True), logits)

    def test_cut_into_steps(self):
        steps = list(cut_into_steps([5, 1, 7], 4))
        assert steps == [[(0, 0, 4)], [(0, 4, 5), (1, 0, 1), (2, 0, 2)], [(2, 2, 6)], [(2, 6, 7)]]


class TestSequences:
    def test_fork(self, model, sequence, logits):
        model.forward(TEXT[:40], sequence=sequence)
        fork = model.fork(sequence)
        fork_of_fork = model.fork(fork)
        other = model.forward([7, 8, 9], sequence=fork)
        for grown in (sequence, fork_of_fork):
            np.testing.assert_array_equal(model.forward(TEXT[40:60], sequence=grown), logits[59])
        model.free(sequence)
        assert not np.array_equal(other, logits[42])
        np.testing.assert_array_equal(model.forward(TEXT[60:80], sequence=fork_of_fork), logits[79])
        model.free(fork)
        model.free(fork_of_fork)

    def test_truncate(self, model, sequence, logits):
        model.forward(TEXT[:100], sequence=sequence)
        for length in (99, 64, 33, 1, 0):
            model.truncate(sequence, length)
            assert sequence.length == length
            np.testing.assert_array_equal(model.forward(TEXT[length:110], sequence=sequence), logits[109])
            model.truncate(sequence, length)

    def test_truncating_one_of_two_that_share(self, model, sequence, logits):
        model.forward(TEXT[:40], sequence=sequence)
        fork = model.fork(sequence)
        model.truncate(fork, 35)
        model.forward([1, 2, 3, 4, 5], sequence=fork)
        np.testing.assert_array_equal(model.forward(TEXT[40:50], sequence=sequence), logits[49])
        model.free(fork)

    def test_all_pages_come_back(self):
        model = load_model(FOLDER, context_length=256, cache_tokens=512)
        free = model.free_tokens
        for _ in range(3):
            sequence = model.new_sequence()
            model.forward(TEXT[:200], sequence=sequence)
            fork = model.fork(sequence)
            model.forward(TEXT[:20], sequence=fork)
            model.truncate(sequence, 5)
            model.free(fork)
            model.free(sequence)
            assert model.free_tokens == free


class TestBadInput:
    @pytest.mark.parametrize(
        ("tokens", "exception", "words"),
        [
            ([], ValueError, "tokens: got none"),
            ([264], IndexError, "tokens: got id 264, expected 0 to 263"),
            ([3, -1], IndexError, "tokens: got id -1"),
            ([2**40], IndexError, "tokens: got id 1099511627776"),
            ([1.5], TypeError, "tokens: got shape .* of float64"),
            ([True], TypeError, "tokens"),
            (np.zeros((2, 2), int), TypeError, "tokens: got shape \\(2, 2\\)"),
            ("text", TypeError, "tokens"),
            (None, TypeError, "tokens: got NoneType, expected a row of integers"),
            (7, TypeError, "tokens: got int, expected a row of integers"),
            ([[1], [2, 3]], TypeError, "tokens: got list, expected a row of integers"),
            ([1, None], TypeError, "tokens: got shape .* of object"),
            ([2**70], TypeError, "tokens: got shape .* of object"),
            (np.zeros(1025, int), ValueError, "tokens: got 1025, expected at most 1024"),
        ],
    )
    def test_tokens(self, model, sequence, tokens, exception, words):
        with pytest.raises(exception, match=words):
            model.forward(tokens, sequence=sequence)
        assert sequence.length == 0

    def test_one_token_beyond_the_context(self, model, sequence):
        model.forward(np.zeros(1024, int), sequence=sequence)
        with pytest.raises(ValueError, match="expected at most 0: the context has 1024 positions"):
            model.forward([1], sequence=sequence)
        assert sequence.length == 1024

    def test_freed_and_foreign_sequences(self, model, sequence):
        model.free(sequence)
        other = load_model(FOLDER, context_length=64)
        for use in (
            lambda s: model.forward([1], sequence=s),
            model.fork,
            model.free,
            lambda s: model.truncate(s, 0),
        ):
            with pytest.raises(ValueError, match="was freed"):
                use(sequence)
            with pytest.raises(ValueError, match="belongs to another model"):
                use(other.new_sequence())
            with pytest.raises(TypeError, match="got int, expected a Sequence"):
                use(3)

    def test_pairs(self, model, sequence):
        for wrong in (sequence, None, (sequence,), (sequence, [1], [2]), [sequence, [1]]):
            with pytest.raises(TypeError, match=r"pairs\[1\]: got .*, expected a tuple \(sequence, tokens\)"):
                model.forward_batch([(sequence, [1]), wrong])
        assert sequence.length == 0
        assert model.forward_batch([]) == []

    def test_all_logits(self, model, sequence):
        with pytest.raises(TypeError, match="all_logits: got 1, expected a bool"):
            model.forward([1], sequence=sequence, all_logits=1)
        assert sequence.length == 0

    def test_a_sequence_twice(self, model, sequence):
        with pytest.raises(ValueError, match=r"pairs\[1\]: got a sequence a second time"):
            model.forward_batch([(sequence, [1]), (sequence, [2])])
        assert sequence.length == 0

    @pytest.mark.parametrize("length", [-1, 4, 2.0, None])
    def test_truncate_to(self, model, sequence, length):
        model.forward([1, 2, 3], sequence=sequence)
        with pytest.raises((ValueError, TypeError), match="length: got"):
            model.truncate(sequence, length)
        assert sequence.length == 3

    def test_more_sequences_than_cache(self, logits):
        model = load_model(FOLDER, cache_dtype="float32", context_length=64, cache_tokens=100)
        first, second = model.new_sequence(), model.new_sequence()
        model.forward(TEXT[:60], sequence=first)
        with pytest.raises(CacheFull, match="cache: got 4 pages of 16 tokens to add, 3 are free"):
            model.forward_batch([(second, TEXT[:60])])
        assert (first.length, second.length) == (60, 0)
        np.testing.assert_array_equal(model.forward(TEXT[:40], sequence=second), logits[39])

    def test_one_invalid_pair_changes_none(self, model, sequence):
        other = model.new_sequence()
        with pytest.raises(IndexError):
            model.forward_batch([(sequence, [1]), (other, [-1])])
        assert (sequence.length, other.length) == (0, 0)
        model.free(other)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"cache_dtype": "int8"}, "cache_dtype: got 'int8', expected one of float16, bfloat16, float32"),
            ({"cache_dtype": None}, "cache_dtype: got None"),
            ({"cache_tokens": 0}, "cache_tokens: got 0"),
            ({"context_length": 0, "cache_tokens": 64}, "context_length: got 0"),
            ({"context_length": "8"}, "context_length: got '8'"),
            ({"num_threads": 0}, "num_threads: got 0"),
        ],
    )
    def test_options(self, options, words):
        with pytest.raises((ValueError, TypeError), match=words):
            load_model(FOLDER, **options)

    def test_a_cache_that_does_not_fit(self):
        with pytest.raises(MemoryError, match=r"tokens need .* bytes .* enough for [0-9]+ tokens"):
            load_model(FOLDER, cache_tokens=2**44)

    def test_backend_without_a_decoder(self, opencl_backend_without_decoder):
        with pytest.raises(UnsupportedError, match="has no decoder"):
            load_model(FOLDER, opencl_backend_without_decoder)


@pytest.fixture
def opencl_backend_without_decoder():
    class Plain(CpuBackend):
        new_decoder = Backend.new_decoder

    return Plain()


def test_nan_in_one_sequence_stays_there(model, logits, monkeypatch):
    """A NaN in one sequence's keys makes that sequence's logits NaN, and no other's."""
    damaged, healthy = model.new_sequence(), model.new_sequence()
    model.forward(TEXT[:20], sequence=damaged)
    pool = model._program._pools[0]
    page = damaged.page_table[0]
    kept = pool.values[:, page].copy()
    pool.values[:, page] = 0xFF
    results = model.forward_batch([(damaged, TEXT[20:30]), (healthy, TEXT[:30])], all_logits=True)
    pool.values[:, page] = kept
    assert np.isnan(results[0]).all()
    np.testing.assert_array_equal(results[1], logits[:30])
    model.free(damaged)
    model.free(healthy)


def test_two_threads(model):
    """The second of two threads in one model is refused."""
    entered, leave = threading.Event(), threading.Event()
    sequence = model.new_sequence()
    step = model._program.step

    def slow_step(batch):
        entered.set()
        assert leave.wait(30)
        return step(batch)

    model._program.step = slow_step
    thread = threading.Thread(target=lambda: model.forward([1, 2], sequence=sequence))
    thread.start()
    try:
        assert entered.wait(30)
        with pytest.raises(ContextInUse, match="model: in use by another thread"):
            model.new_sequence()
    finally:
        leave.set()
        thread.join()
        del model._program.step
    assert sequence.length == 2
    model.free(sequence)


def test_interrupted_prompt(model, sequence, logits, monkeypatch):
    """Ctrl-C between the steps of a prompt leaves the sequence as it was before the call."""
    monkeypatch.setattr("marlin_cy.decoder.model.MAX_ROWS", 16)
    model.forward(TEXT[:10], sequence=sequence)
    steps, step = [], model._program.step

    def interrupted(batch):
        steps.append(batch)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(batch)

    model._program.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        model.forward(TEXT[10:100], sequence=sequence)
    del model._program.step
    assert sequence.length == 10
    np.testing.assert_array_equal(model.forward(TEXT[10:50], sequence=sequence), logits[49])
