"""Sequences of a model with recurrent state: forks, truncation, and calls that are interrupted."""

import numpy as np
import pytest

from marlin_cy.decoder.cache import CacheFull
from marlin_cy.decoder.load import load_model
from marlin_cy.decoder.model import DEFAULT_STATES
from marlin_cy.errors import UnsupportedError

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

from language_models import VOCABULARY, write_model  # noqa: E402

TOKENS = np.random.default_rng(2).integers(1, VOCABULARY, 100)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("qwen3_next"), "qwen3_next")[0]
    return load_model(folder, cache_tokens=1024, cache_dtype="float32", num_threads=2)


@pytest.fixture(scope="module")
def logits(model):
    """Those after each of the tokens."""
    sequence = model.new_sequence()
    result = model.forward(TOKENS, sequence=sequence, all_logits=True)
    model.free(sequence)
    return result


@pytest.fixture
def sequence(model):
    """Of 40 tokens. All memory comes back in the end."""
    free_states, free_tokens = len(model._free_states), model.free_tokens
    sequence = model.new_sequence()
    model.forward(TOKENS[:40], sequence=sequence)
    yield sequence
    model.free(sequence)
    assert (len(model._free_states), model.free_tokens) == (free_states, free_tokens)


def assert_continues(model, sequence, logits, length, count=10):
    """The sequence has a length, and its next tokens have the right logits."""
    assert sequence.length == length
    end = length + count
    np.testing.assert_array_equal(
        model.forward(TOKENS[length:end], sequence=sequence, all_logits=True), logits[length:end]
    )


def interrupt(monkeypatch, model, when, number=1):
    """Raise KeyboardInterrupt at a step: "before" it, or "after" it and before its logits are returned."""
    step, calls = model._program.step, []

    def interrupted(batch):
        calls.append(batch)
        result = None if len(calls) == number and when == "before" else step(batch)
        if len(calls) == number:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(model._program, "step", interrupted, raising=False)


class TestSequences:
    def test_forks_of_forks(self, model, sequence, logits):
        fork = model.fork(sequence)
        fork_of_fork = model.fork(fork)
        model.forward([5, 6, 7], sequence=fork)
        model.free(fork)
        assert_continues(model, fork_of_fork, logits, 40)
        assert_continues(model, sequence, logits, 40, 30)
        assert_continues(model, fork_of_fork, logits, 50)
        model.free(fork_of_fork)

    def test_a_slot_is_cleared_before_it_is_used_again(self, model, logits):
        slots = []
        for _ in range(2):
            sequence = model.new_sequence()
            slots.append(sequence.state)
            assert_continues(model, sequence, logits, 0)
            model.free(sequence)
        assert slots[0] == slots[1]

    def test_truncate(self, model, sequence, logits):
        for length in (1, 39):
            with pytest.raises(
                UnsupportedError, match=f"qwen3_next has recurrent state, .* go back to {length} tokens"
            ):
                model.truncate(sequence, length)
        model.truncate(sequence, 40)
        assert_continues(model, sequence, logits, 40)
        model.truncate(sequence, 0)
        assert_continues(model, sequence, logits, 0)

    def test_all_slots_in_use(self, model, sequence, logits):
        others = [model.fork(sequence) for _ in range(DEFAULT_STATES - 1)]
        for more in (model.new_sequence, lambda: model.fork(sequence)):
            with pytest.raises(CacheFull, match="all slots of recurrent state are in use; free sequences"):
                more()
        model.free(others.pop())
        others.append(model.fork(sequence))
        assert_continues(model, others[-1], logits, 40)
        for other in others:
            model.free(other)

    def test_nan_stays_in_its_sequence(self, model, sequence, logits):
        damaged = model.fork(sequence)
        model._program._states()[0].state[damaged.state] = np.nan
        results = model.forward_batch([(damaged, TOKENS[40:50]), (sequence, TOKENS[40:50])], all_logits=True)
        assert np.isnan(results[0]).all()
        np.testing.assert_array_equal(results[1], logits[40:50])
        model.truncate(damaged, 0)
        assert_continues(model, damaged, logits, 0)
        model.free(damaged)


class TestInterruptedCalls:
    """KeyboardInterrupt during a call leaves the state and the length of each sequence in agreement."""

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_a_call_of_several_steps(self, model, sequence, logits, monkeypatch, when):
        """Every sequence is as it was before the call."""
        other = model.new_sequence()
        with monkeypatch.context() as patch:
            patch.setattr("marlin_cy.decoder.model.MAX_ROWS", 16)
            for number in (1, 2, 3, 4):
                interrupt(patch, model, when, number)
                with pytest.raises(KeyboardInterrupt):
                    model.forward_batch([(sequence, TOKENS[40:80]), (other, TOKENS[:15])])
                assert (sequence.length, other.length) == (40, 0)
                patch.delattr(model._program, "step")
        assert_continues(model, sequence, logits, 40)
        assert_continues(model, other, logits, 0)
        model.free(other)

    @pytest.mark.parametrize("count", [1, 20])
    def test_before_a_step(self, model, sequence, logits, monkeypatch, count):
        with monkeypatch.context() as patch:
            interrupt(patch, model, "before")
            with pytest.raises(KeyboardInterrupt):
                model.forward(TOKENS[40 : 40 + count], sequence=sequence)
        assert_continues(model, sequence, logits, 40)

    @pytest.mark.parametrize("count", [1, 20])
    def test_after_a_step(self, model, sequence, logits, monkeypatch, count):
        """The state has the tokens, and so has the sequence. A sequence that was not in the call has no more."""
        other = model.fork(sequence)
        with monkeypatch.context() as patch:
            interrupt(patch, model, "after")
            with pytest.raises(KeyboardInterrupt):
                model.forward(TOKENS[40 : 40 + count], sequence=sequence)
        assert_continues(model, sequence, logits, 40 + count)
        assert_continues(model, other, logits, 40)
        model.free(other)

    def test_an_error_in_a_step(self, model, sequence, logits, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(model._program, "step", lambda batch: 1 / 0, raising=False)
            with pytest.raises(ZeroDivisionError):
                model.forward(TOKENS[40:50], sequence=sequence)
        assert_continues(model, sequence, logits, 40)

    def test_a_second_interruption(self, model, sequence, logits, monkeypatch):
        """What is left incomplete is refused until the sequence begins again."""

        def fail(slot, saved):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("marlin_cy.decoder.model.MAX_ROWS", 16)
            interrupt(patch, model, "after", 2)
            patch.setattr(model._program, "restore_state", fail, raising=False)
            with pytest.raises(KeyboardInterrupt):
                model.forward(TOKENS[40:80], sequence=sequence)
        for use in (lambda: model.forward([1], sequence=sequence), lambda: model.fork(sequence)):
            with pytest.raises(ValueError, match="KeyboardInterrupt has ended a call .* truncate the sequence to 0"):
                use()
        model.truncate(sequence, 0)
        assert_continues(model, sequence, logits, 0)
