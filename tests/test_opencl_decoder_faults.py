"""Whole models on OpenCL devices that fail: lost devices, short memory, programs that do not compile."""

import threading
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

cl = pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")

from asserts import relative_error  # noqa: E402
from test_opencl_faults import broken, failing  # noqa: E402

from marlin_cy.decoder.load import load_model  # noqa: E402
from marlin_cy.errors import BuildError, DeviceError, DeviceMemoryError  # noqa: E402
from marlin_cy.opencl import context, program, recording  # noqa: E402

FOLDER = Path(str(files("marlin_cy") / "data" / "tiny-qwen3-moe-gptq-int4"))
TEXT = np.frombuffer((FOLDER / "validation.txt").read_bytes()[:100], np.uint8).astype(np.int32)
BOUND = 2e-3  # as in test_opencl_decoder.py
PROMPTS = "def area(width", "The "

pytestmark = pytest.mark.filterwarnings("ignore::pyopencl.CompilerWarning")


@pytest.fixture
def model(device_alone):
    return load_model(FOLDER, device_alone, cache_dtype="float32", context_length=256, cache_tokens=1024)


def fail_launches(patch, after, code="DEVICE_NOT_AVAILABLE"):
    """Let launches of recordings fail from the ``after``-th on."""
    enqueue = recording.enqueue_launches

    def first_ones(function, queue, table, begin):
        return begin if begin >= after else min(enqueue(function, queue, table[:after], begin), after)

    patch.setattr(recording, "enqueue_launches", first_ones)
    patch.setattr(cl, "enqueue_nd_range_kernel", failing(code))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("what", ["launches", "copies"])
def test_a_device_that_is_lost_between_tokens(model, monkeypatch, what):
    """In the middle of a step's launches, and while its logits are read: the error is named, and nothing goes on."""
    asks, other = model.new_sequence(), model.new_sequence()
    pieces = model.generate(PROMPTS[0], temperature=0)
    next(pieces)
    for sequence in (asks, other):
        model.forward(TEXT[:10], sequence=sequence)
    free = model.free_tokens
    with monkeypatch.context() as patch:
        if what == "launches":
            fail_launches(patch, 7)
        else:
            patch.setattr(cl, "enqueue_copy", failing("DEVICE_NOT_AVAILABLE", 1, cl.enqueue_copy))
        with pytest.raises(DeviceError, match="DEVICE_NOT_AVAILABLE"):
            model.forward(TEXT[10:11], sequence=asks)
    assert asks.freed and other.freed
    assert model.free_tokens == 1024 > free
    for attempt in (
        model.new_sequence,
        lambda: model.forward([1]),
        lambda: model.forward([1], sequence=other),
        lambda: next(pieces),
    ):
        with pytest.raises(DeviceError, match=r"model: its device has failed, load the model again: .*NOT_AVAILABLE"):
            attempt()
    model.free(asks)  # as a caller does that cleans up after the error


def test_a_text_whose_device_is_lost(model, monkeypatch):
    """Its error is that of the device, also where the generator frees its sequence."""
    pieces = model.generate(PROMPTS[0], temperature=0)
    next(pieces)
    with monkeypatch.context() as patch:
        fail_launches(patch, 0)
        with pytest.raises(DeviceError, match="DEVICE_NOT_AVAILABLE"):
            next(pieces)


def test_a_launch_that_fails_once(model, monkeypatch):
    """PyOpenCL repeats it, and the launches after it follow."""
    expected = model.forward(TEXT[:4], sequence=model.new_sequence())
    enqueue, failed = recording.enqueue_launches, []

    def fails_at_3(function, queue, table, begin):
        if len(table) <= 5 or begin > 3:
            return enqueue(function, queue, table, begin)
        failed.append(begin)
        return enqueue(function, queue, table[:3], begin)

    monkeypatch.setattr(recording, "enqueue_launches", fails_at_3)
    np.testing.assert_array_equal(model.forward(TEXT[:4], sequence=model.new_sequence()), expected)
    assert failed == [0]


@pytest.mark.sweep
def test_a_step_whose_workspace_does_not_fit(model, monkeypatch):
    """The sequence is as before, others go on, and so does the sequence with fewer rows."""
    asks, other = model.new_sequence(), model.new_sequence()
    expected = load_model(FOLDER, cache_dtype="float32", context_length=256, num_threads=2).forward(
        TEXT, all_logits=True
    )
    for sequence in (asks, other):
        model.forward(TEXT[:2], sequence=sequence)
    with monkeypatch.context() as patch:
        patch.setattr(context, "zeroed_buffers", refused_above(20_000, context.zeroed_buffers))
        with pytest.raises(DeviceMemoryError, match="do not fit"):
            model.forward(TEXT[2:90], sequence=asks)
        assert asks.length == 2
        for sequence in (other, asks):
            assert relative_error(model.forward(TEXT[2:4], sequence=sequence), expected[3]) < BOUND
    assert relative_error(model.forward(TEXT[4:], sequence=asks), expected[-1]) < BOUND


def refused_above(most, zeroed):
    """``zeroed_buffers`` on a device without room for a buffer of more bytes."""

    def few(runtime, sizes, what):
        if max(sizes) > most:
            raise DeviceMemoryError(f"{what}: {max(sizes)} bytes do not fit")
        return zeroed(runtime, sizes, what)

    return few


def test_attention_that_does_not_compile(model, monkeypatch):
    """There is no other kernel: the log is shown, and a later call compiles it."""
    monkeypatch.setattr(model.context.backend.runtime.programs, "_programs", {})
    with monkeypatch.context() as patch:
        patch.setattr(program, "source", broken(["decoder_attention"]))
        with pytest.raises(BuildError, match="no_such_name") as caught:
            model.forward(TEXT[:7])
        assert caught.value.program == "decoder_attention.cl"
    assert model.free_tokens == 1024
    assert np.isfinite(model.forward(TEXT[:7])).all()


@pytest.mark.sweep
def test_two_models_on_one_device(device_alone):
    """Their steps interleave, from two threads, and each gives the text that it gives alone."""
    models = [load_model(FOLDER, device_alone, context_length=64) for _ in PROMPTS]
    tokens = dict.fromkeys(range(len(PROMPTS)), ())

    def text_of(number):
        return tuple(piece.tokens for piece in models[number].generate(PROMPTS[number], max_new_tokens=6))

    alone = {number: text_of(number) for number in tokens}
    turns = threading.Barrier(len(models))

    def write(number):
        turns.wait(60)
        tokens[number] = text_of(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in tokens]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert tokens == alone
