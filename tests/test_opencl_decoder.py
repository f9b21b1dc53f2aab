"""Whole models by OpenCL launches, against the CPU's decoder: every family, sequences, and what does not fit."""

import threading
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

cl = pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")

from asserts import relative_error  # noqa: E402

from marlin_cy import ContextInUse  # noqa: E402
from marlin_cy.decoder.cache import CacheFull  # noqa: E402
from marlin_cy.decoder.generate import generate, keep_tokenizer  # noqa: E402
from marlin_cy.decoder.load import load_model  # noqa: E402
from marlin_cy.decoder.program import Batch  # noqa: E402
from marlin_cy.decoder.sampling import Sampler, SamplingParams  # noqa: E402
from marlin_cy.decoder.text import Tokenizer  # noqa: E402
from marlin_cy.opencl.decoder.program import HEAD_ROWS  # noqa: E402

FOLDER = Path(str(files("marlin_cy") / "data" / "tiny-qwen3-moe-gptq-int4"))
TEXT = np.frombuffer((FOLDER / "validation.txt").read_bytes()[:300], np.uint8).astype(np.int32)
BOUND = 2e-3
"""Relative, Frobenius: products in float16 on some devices, in int16 planes on the CPU, are off by some 1e-4 each."""
CACHE_BOUNDS = {"float32": BOUND, "float16": BOUND, "bfloat16": 8e-3}

pytestmark = pytest.mark.filterwarnings("ignore::pyopencl.CompilerWarning")


@pytest.fixture(scope="module")
def expected():
    """The CPU's logits after each token of TEXT."""
    model = load_model(FOLDER, cache_dtype="float32", context_length=512, num_threads=2)
    return model.forward(TEXT, all_logits=True)


@pytest.fixture(scope="module")
def models():
    return {}


@pytest.fixture
def model(device_alone, models):
    """One model for each device: its launches are compiled once."""
    if id(device_alone) not in models:
        models[id(device_alone)] = load_model(
            FOLDER, device_alone, cache_dtype="float32", context_length=512, cache_tokens=2048
        )
    return models[id(device_alone)]


@pytest.fixture
def sequence(model):
    sequence = model.new_sequence()
    yield sequence
    if not sequence.freed:
        model.free(sequence)


def assert_near(logits, expected, bound=BOUND):
    assert logits.shape == expected.shape
    assert relative_error(logits, expected) < bound


class TestLogits:
    def test_prompt_then_tokens(self, model, sequence, expected):
        """The tokens fill one page of the cache, and begin another."""
        assert_near(model.forward(TEXT[:28], sequence=sequence, all_logits=True), expected[:28])
        for place in range(28, 36):
            logits = model.forward(TEXT[place : place + 1], sequence=sequence)
            assert (logits.shape, logits.dtype) == ((model.vocab_size,), np.float32)
            assert_near(logits, expected[place])

    @pytest.mark.sweep
    def test_a_head_of_8_bits(self, device_alone):
        options = {"cache_dtype": "float32", "context_length": 64, "lm_head": "int8"}
        expected = load_model(FOLDER, num_threads=1, **options).forward(TEXT[:20], all_logits=True)
        assert_near(load_model(FOLDER, device_alone, **options).forward(TEXT[:20], all_logits=True), expected)

    @pytest.mark.sweep
    def test_long_prompt(self, model, sequence, expected):
        """More rows whose logits are wanted than the head takes at once."""
        assert_near(model.forward(TEXT, sequence=sequence, all_logits=True), expected)

    @pytest.mark.sweep
    def test_prompt_in_pieces(self, model, sequence, expected):
        """The last piece has more rows than the head takes at once."""
        begin = 0
        for count in (1, 2, 3, 4, 17, 70):
            logits = model.forward(TEXT[begin : begin + count], sequence=sequence, all_logits=True)
            assert_near(logits, expected[begin : begin + count])
            begin += count

    @pytest.mark.sweep
    def test_rows_of_float16(self, device_alone, expected, monkeypatch):
        """As on devices whose products read float16 rows alone."""
        monkeypatch.setattr("marlin_cy.opencl.decoder.program.row_type", lambda ctx: 1)
        model = load_model(FOLDER, device_alone, cache_dtype="float32", context_length=64)
        logits = model.forward(TEXT[:20], all_logits=True)
        # float16 keeps 11 bits; with float32 rows the error is half as large.
        assert 3e-5 < relative_error(logits, expected[:20]) < BOUND
        assert_near(model.forward(TEXT[20:21]), expected[20])

    @pytest.mark.sweep
    @pytest.mark.parametrize("cache_dtype", ["float16", "bfloat16"])
    def test_cache_dtype(self, device_alone, expected, cache_dtype):
        model = load_model(FOLDER, device_alone, cache_dtype=cache_dtype, context_length=64)
        assert_near(model.forward(TEXT[:20], all_logits=True), expected[:20], CACHE_BOUNDS[cache_dtype])

    @pytest.mark.sweep
    def test_tokens_that_the_device_chooses(self, model, sequence):
        """The argmax on the device is that of the logits; more rows are wanted than the head takes at once."""
        rows = HEAD_ROWS + 3
        logits = model.forward(TEXT[:rows], sequence=sequence, all_logits=True)
        other = model.new_sequence()
        other.grow(rows, model._program.copy_page)
        segments = np.array([[0, rows, 0, -1]])
        batch = Batch(TEXT[:rows], segments, other.page_table[None], np.arange(rows, dtype=np.int32))
        np.testing.assert_array_equal(model._program.greedy_step(batch), logits.argmax(axis=1))
        model.free(other)

    def test_sampled_tokens(self, model, expected):
        """The device's own logits choose what the CPU chooses from them; rows without a sampler are left out."""
        names = {"temperature": 1.0, "top_p": 0.9, "seed": 3}, {"repetition_penalty": 1.5}, {"temperature": 0.7}
        sequences = [model.new_sequence() for _ in range(5)]
        texts = [TEXT[: 5 + 4 * number].tolist() for number in range(5)]
        ours, theirs = (
            [Sampler(SamplingParams(**options), model.vocab_size, texts[0]) for options in (*names, {})]
            for _ in range(2)
        )
        found = model.pick_batch(list(zip(sequences, texts, strict=True)), [*ours, None])
        assert found.pop() is None
        logits = [model.forward_batch([(model.new_sequence(), text)])[0] for text in texts[:-1]]
        for sampler, row, text, token in zip(theirs, logits, texts, found, strict=False):
            assert token == sampler.pick(row, len(text)) == int(token)
        assert [sequence.length for sequence in sequences] == [len(text) for text in texts]
        model.free(sequences[0])
        with pytest.raises(ValueError, match="samplers: got 1, expected 2, one for each pair"):
            model.pick_batch([(one, [1]) for one in sequences[1:3]], [None])
        for one in list(model._sequences):
            model.free(one)

    def test_only_tokens_are_read(self, model, monkeypatch):
        """A sampled text reads two numbers a token from the device, and writes little more."""
        read, copy = [], cl.enqueue_copy

        def counted(queue, target, source, **options):
            if isinstance(target, np.ndarray):
                read.append(target.nbytes)
            return copy(queue, target, source, **options)

        pieces = model.generate("The ", temperature=1.0, top_k=5, repetition_penalty=1.1, max_new_tokens=4)
        for _ in range(2):  # the first step of a kind checks its kernels
            next(pieces)
        monkeypatch.setattr(cl, "enqueue_copy", counted)
        assert len(list(pieces)) == 2
        assert read == [8, 8]

    def test_logits_that_are_not_finite(self, model, sequence):
        """The sequence's error, as from the CPU; other sequences of the step go on."""
        damaged = model.new_sequence()
        model.forward(TEXT[:20], sequence=damaged)
        pool, page = model._program._pools[0], int(damaged.page_table[0])
        nbytes = pool._page_bytes[1]
        cl.enqueue_fill_buffer(model.context.queue, pool.values, b"\xff" * 4, page * nbytes, nbytes)
        for options in ({}, {"temperature": 1.0}):
            samplers = [Sampler(SamplingParams(**options), model.vocab_size, []) for _ in range(2)]
            error, token = model.pick_batch([(damaged, TEXT[:1]), (sequence, TEXT[:1])], samplers)
            assert isinstance(token, int)
            assert f"position {damaged.length}: the model's logits have nan for token 0" in str(error)
        cl.enqueue_fill_buffer(model.context.queue, pool.values, b"\0" * 4, page * nbytes, nbytes)
        model.free(damaged)

    @pytest.mark.sweep
    def test_prompts_longer_than_a_step(self, model, sequence, expected, monkeypatch):
        monkeypatch.setattr("marlin_cy.decoder.model.MAX_ROWS", 16)
        assert_near(model.forward(TEXT[:40], sequence=sequence, all_logits=True), expected[:40])

    @pytest.mark.sweep
    def test_splits(self, model, sequence, expected, monkeypatch):
        """Positions of few rows are cut into runs, on devices with more compute units than this one may have."""
        monkeypatch.setattr(model._program, "most_splits", 8)
        monkeypatch.setattr(model._program, "split_tokens", 16)
        model._program._recordings.clear()
        model.forward(TEXT[:60], sequence=sequence)
        assert_near(model.forward(TEXT[60:62], sequence=sequence, all_logits=True), expected[60:62])
        assert_near(model.forward(TEXT[62:63], sequence=sequence), expected[62])
        model._program._recordings.clear()


class TestSequences:
    def test_several_at_once(self, model, expected):
        """Prompts and single tokens in one step."""
        sequences = [model.new_sequence() for _ in range(4)]
        lengths = 3, 24, 7, 11
        for one, length in zip(sequences, lengths, strict=True):
            model.forward(TEXT[:length], sequence=one)
        more = 1, 9, 2, 1
        pairs = [
            (one, TEXT[length : length + count]) for one, length, count in zip(sequences, lengths, more, strict=True)
        ]
        results = model.forward_batch(pairs, all_logits=True)
        for length, count, logits in zip(lengths, more, results, strict=True):
            assert_near(logits, expected[length : length + count])
        last = model.forward_batch([(one, TEXT[:1]) for one in sequences])
        assert len(last) == 4
        for one in sequences:
            model.free(one)

    def test_fork_and_truncate(self, model, sequence, expected):
        model.forward(TEXT[:40], sequence=sequence)
        fork = model.fork(sequence)
        model.forward([7, 8, 9], sequence=fork)
        assert_near(model.forward(TEXT[40:50], sequence=sequence), expected[49])
        model.truncate(fork, 35)
        assert_near(model.forward(TEXT[35:45], sequence=fork), expected[44])
        model.free(fork)

    @pytest.mark.sweep
    def test_more_sequences_than_cache(self, device_alone):
        model = load_model(FOLDER, device_alone, context_length=64, cache_tokens=100)
        first = model.new_sequence()
        model.forward(TEXT[:60], sequence=first)
        with pytest.raises(CacheFull, match="cache: got 4 pages of 16 tokens to add, 3 are free"):
            model.forward(TEXT[:60])
        assert first.length == 60

    def test_nan_stays_in_its_sequence(self, model, expected):
        damaged, healthy = model.new_sequence(), model.new_sequence()
        model.forward(TEXT[:20], sequence=damaged)
        pool, page = model._program._pools[0], int(damaged.page_table[0])
        nbytes = pool._page_bytes[1]
        queue = model.context.queue
        cl.enqueue_fill_buffer(queue, pool.values, b"\xff" * 4, page * nbytes, nbytes)
        results = model.forward_batch([(damaged, TEXT[20:23]), (healthy, TEXT[:23])], all_logits=True)
        assert np.isnan(results[0]).all()
        assert_near(results[1], expected[:23])
        cl.enqueue_fill_buffer(queue, pool.values, b"\0" * 4, page * nbytes, nbytes)
        model.free(damaged)
        model.free(healthy)


class TestProgram:
    def test_launches_are_few(self, model):
        """Of a layer at one token; a launch that only some depths need is counted."""
        labels = model._program.launches(1)
        layers = len(model.plan.layers)
        assert labels[0] == "embed_rows"
        by_tensor_cores = model.context.backend.tier.name == "mma"
        chooses = "norm_router, route, align" in labels
        assert chooses or not by_tensor_cores
        choice = 0 if chooses else 1 if "route, align" in labels else 2
        most = LAUNCHES + (not by_tensor_cores) + choice
        assert (len(labels) - 1) / layers <= most

    def test_a_step_allocates_nothing(self, model, sequence, monkeypatch):
        """After the first step of a kind, a step makes no buffer and sets no argument."""
        for place in range(2):
            model.forward(TEXT[place : place + 1], sequence=sequence)

        def refused(*arguments, **options):
            raise AssertionError("a buffer, a kernel or an argument in a step")

        monkeypatch.setattr(cl, "Buffer", refused)
        monkeypatch.setattr(cl.Kernel, "set_arg", refused)
        monkeypatch.setattr(cl.Kernel, "set_args", refused)
        model.forward(TEXT[2:3], sequence=sequence)

    def test_recordings_are_limited(self, model, sequence, expected, monkeypatch):
        monkeypatch.setattr("marlin_cy.opencl.decoder.program.MAX_RECORDINGS", 2)
        model.forward(TEXT[:2], sequence=sequence)
        model.forward(TEXT[2:3], sequence=sequence)
        assert_near(model.forward(TEXT[3:5], sequence=sequence), expected[4])
        assert len(model._program._recordings) <= 2

    def test_memory(self, model):
        """The cache is as large as was asked for, and nothing grows with the steps."""
        plan = model.plan.layers[0].mixer
        positions = 2048 * len(model.plan.layers)
        assert model.cache_bytes == positions * plan.num_kv_heads * 2 * plan.head_dim * 4

    def test_profile(self, model, sequence):
        """A context that profiles has the label of each launch."""
        with model.context.profile() as events:
            model.forward(TEXT[:1], sequence=sequence)
        labels = [label for label, _ in events]
        assert labels[0] == "embed_rows"
        assert labels[-1] == "head"
        assert "attend" in labels
        assert "merge_splits" not in labels  # one split

    def test_two_threads(self, model, sequence):
        with model.context:  # as if another thread were in a call
            failures = []
            thread = threading.Thread(target=lambda: failures.append(raised(model, sequence)))
            thread.start()
            thread.join()
        assert isinstance(failures[0], ContextInUse)


LAUNCHES = 9  # besides the one that only cut positions need, and the choice of experts where it has launches of its own


def raised(model, sequence):
    try:
        model.forward([1], sequence=sequence)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("cache_tokens", [2**36, 2**44])
def test_a_cache_that_does_not_fit(device_alone, cache_tokens):
    with pytest.raises(MemoryError, match=r"cache: \d+ tokens need \d+ bytes.* there is room for \d+ tokens"):
        load_model(FOLDER, device_alone, cache_tokens=cache_tokens)


def test_generate(device_alone):
    """The text that the CPU gives, where its choice is not close."""
    texts = []
    for backend in ("cpu", device_alone):
        model = load_model(FOLDER, backend, context_length=128)
        keep_tokenizer(model, Tokenizer(FOLDER))
        texts.append("".join(piece.text for piece in generate(model, "The ", max_new_tokens=12)))
    assert texts[0] == texts[1]
