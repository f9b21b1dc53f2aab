"""The choice of tokens on OpenCL devices: from equal logits exactly the tokens that the CPU chooses."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

cl = pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")

from opencl_devices import is_known_wrong  # noqa: E402
from test_opencl_faults import failing  # noqa: E402

from marlin_cy.decoder.load import load_model  # noqa: E402
from marlin_cy.decoder.sampling import Sampler, SamplingParams  # noqa: E402
from marlin_cy.errors import DeviceError  # noqa: E402
from marlin_cy.opencl.checks.sampling import is_choosing_correct, reason_wrong  # noqa: E402
from marlin_cy.opencl.decoder import sample  # noqa: E402
from marlin_cy.opencl.decoder.maker import Maker  # noqa: E402
from marlin_cy.opencl.decoder.sample import TokenChooser, describe_choices  # noqa: E402
from marlin_cy.opencl.decoder.step import StepLayout  # noqa: E402
from marlin_cy.opencl.recording import RecordingContext  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::pyopencl.CompilerWarning")

FOLDER = Path(str(files("marlin_cy") / "data" / "tiny-qwen3-moe-gptq-int4"))
OPTIONS = {
    "greedy": {},
    "all": {"temperature": 1.0},
    "cold": {"temperature": 1e-6},
    "hot": {"temperature": 1e38},
    "top_k": {"temperature": 0.8, "top_k": 20},
    "top_k of one": {"temperature": 5.0, "top_k": 1},
    "top_k of more than there are": {"temperature": 1.0, "top_k": 1 << 40},
    "top_p": {"temperature": 1.2, "top_p": 0.9},
    "top_p of almost all": {"temperature": 1.0, "top_p": 1 - 2.0**-53},
    "top_p of almost none": {"temperature": 1.0, "top_p": 1e-30},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "min_p of the largest": {"temperature": 1.0, "min_p": 1.0},
    "all of them": {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.25},
    "negative penalties": {"temperature": 1.0, "presence_penalty": -3.0, "repetition_penalty": 0.5},
    "extreme penalties": {"temperature": 1.0, "repetition_penalty": 1e-38, "frequency_penalty": 1e38},
    "all, with penalties": {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1},
}


class Chooser:
    """Rows of logits on a device, and what samplers choose there."""

    def __init__(self, backend, items=None):
        self._backend, self._ctx = backend, backend.new_context()
        self._recorder = RecordingContext(backend, self._ctx.queue)
        self._chooser = TokenChooser(backend.runtime)
        if items:
            self._chooser._items = items

    def choose(self, logits, choices):
        """``(tokens, largest logits)``; the logits are not changed. One more row than choices, for a padded step."""
        rows, width = len(logits) + 1, logits.shape[1]
        padded = np.concatenate([logits, logits[:1]])
        flags = cl.mem_flags.READ_WRITE | cl.mem_flags.COPY_HOST_PTR
        buffer = cl.Buffer(self._ctx.cl_context, flags, hostbuf=np.ascontiguousarray(padded))
        described = describe_choices(choices, rows)
        self._chooser.reserve(len(described.ints))
        self._recorder.begin()
        tokens = self._chooser.record(Maker(self._recorder, buffer, StepLayout(rows), rows), buffer, width)
        self._chooser.write(self._ctx.queue, described)
        self._recorder.recording.enqueue(self._ctx.queue, described.most_entries)
        found = np.empty((rows, 2), np.int32)
        cl.enqueue_copy(self._ctx.queue, found, tokens)
        assert found[-1, 0] == logits[0].argmax()
        return found[:-1, 0].tolist(), found[:-1, 1].copy().view(np.float32)


@pytest.fixture(scope="module")
def choosers():
    return {}


@pytest.fixture
def chooser(device_alone, choosers):
    return choosers.setdefault(id(device_alone), Chooser(device_alone))


def assert_same_tokens(chooser, logits, names, rng, count=6):
    """At some positions, with a prompt, and with the tokens of the text so far counted."""
    vocab = logits.shape[1]
    prompts = [rng.integers(0, vocab, 30).tolist() for _ in names]
    ours, theirs = (
        [
            Sampler(SamplingParams(**OPTIONS[name], seed=number), vocab, prompt)
            for number, (name, prompt) in enumerate(zip(names, prompts, strict=True))
        ]
        for _ in range(2)
    )
    for position in range(count):
        expected = [sampler.pick(row, position) for sampler, row in zip(theirs, logits, strict=True)]
        found, _ = chooser.choose(logits, [(sampler, position) for sampler in ours])
        assert dict(enumerate(found)) == dict(enumerate(expected)), dict(enumerate(names))
        for sampler, token in zip(ours, found, strict=True):
            sampler.took(token)


def random_logits(rng, rows, vocab, kind):
    """Rows of logits: smooth, with many equal ones, with masked ones, or spread over more than the range of scores."""
    logits = rng.standard_normal((rows, vocab)).astype(np.float32) * 4
    if kind == "equal":
        logits = np.round(logits, 0)
    elif kind == "masked":
        logits[rng.random(logits.shape) < 0.9] = -np.inf
        logits[:, rng.integers(vocab)] = 3.0
    elif kind == "far":
        logits *= 10 ** rng.uniform(-8, 6, (rows, 1)).astype(np.float32)
    return logits


@pytest.mark.sampled(6)
@pytest.mark.parametrize("vocab", [1, 2, 263, 5000])
@pytest.mark.parametrize("kind", ["smooth", "equal", "masked", "far"])
def test_tokens_of_all_options(chooser, rng, vocab, kind):
    assert_same_tokens(chooser, random_logits(rng, len(OPTIONS), vocab, kind), list(OPTIONS), rng, 3)


@pytest.mark.sweep
@pytest.mark.parametrize("vocab", [1023, 1025, 32_000, 151_936])
@pytest.mark.parametrize("kind", ["smooth", "equal", "masked", "far"])
def test_tokens_of_large_vocabularies(chooser, rng, vocab, kind):
    assert_same_tokens(chooser, random_logits(rng, len(OPTIONS), vocab, kind), list(OPTIONS), rng)


@pytest.mark.sweep
def test_other_work_groups(device_alone, rng):
    """As many work-items as GPUs have."""
    chooser = Chooser(device_alone, items=256)
    for kind in ("smooth", "equal"):
        assert_same_tokens(chooser, random_logits(rng, len(OPTIONS), 5000, kind), list(OPTIONS), rng)


def test_a_large_vocabulary(device_alone, chooser, rng):
    """One case of the sweep: a model's vocabulary, and the options of a chat."""
    if is_known_wrong(device_alone.device) and reason_wrong(device_alone, 151_936):
        pytest.skip("the driver's fault, which the check finds")
    names = ["all of them", "all, with penalties"]
    assert_same_tokens(chooser, random_logits(rng, 2, 151_936, "smooth"), names, rng, 2)


def test_many_tokens_with_penalties(chooser, rng):
    """The list outgrows its buffer; rows have lists of their own."""
    logits = rng.standard_normal((3, 5000), np.float32)
    params = SamplingParams(temperature=1.0, presence_penalty=0.5, repetition_penalty=1.2)
    prompts = [rng.integers(0, 5000, count).tolist() for count in (4000, 0, 7)]
    ours, theirs = ([Sampler(params, 5000, prompt) for prompt in prompts] for _ in range(2))
    found, _ = chooser.choose(logits, [(sampler, 9) for sampler in ours])
    assert found == [sampler.pick(row, 9) for sampler, row in zip(theirs, logits, strict=True)]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"repetition_penalty": 2.0}], ids=str)
def test_logits_that_are_not_finite(chooser, options):
    """The token and the value that the CPU's error names."""
    logits = np.zeros((4, 40), np.float32)
    logits[0, [31, 17]] = np.nan
    logits[1, [5, 33]] = np.inf
    logits[2] = -np.inf
    logits[3, [3, 39]] = np.inf, np.nan
    sampler = Sampler(SamplingParams(**options), 40, [5, 17])
    tokens, largest = chooser.choose(logits, [(sampler, 0)] * 4)
    assert tokens == logits.argmax(axis=1).tolist()
    np.testing.assert_array_equal(largest, logits.max(axis=1))


class TestCheck:
    """The check at the first use."""

    @pytest.mark.parametrize("vocab_size", [264, 151_936])
    def test_a_right_kernel(self, device_alone, vocab_size):
        if is_known_wrong(device_alone.device):
            pytest.skip("the kernel may be wrong here")
        assert reason_wrong(device_alone, vocab_size) is None

    def test_a_wrong_kernel(self, device_alone, monkeypatch):
        """Powers of two that are wrong: the message has both tokens of each row."""
        monkeypatch.setattr("marlin_cy.opencl.decoder.sample.TABLES", np.zeros_like(sample.TABLES))
        assert "are right" in reason_wrong(device_alone, 264)

    def test_a_device_that_fails(self, device_alone, monkeypatch):
        """The error is that of the library, so that a model knows that its device is lost."""
        monkeypatch.setattr("marlin_cy.opencl.checks.sampling.chosen", failing("DEVICE_NOT_AVAILABLE"))
        with pytest.raises(DeviceError, match="DEVICE_NOT_AVAILABLE"):
            is_choosing_correct(device_alone, 77)

    def test_a_model_chooses_on_the_host(self, device_alone, monkeypatch):
        """The tokens of a model whose device chooses wrongly are those that the host chooses from its logits."""
        model = load_model(FOLDER, device_alone, context_length=64)
        monkeypatch.setattr("marlin_cy.opencl.decoder.program.is_choosing_correct", lambda backend, size: False)
        monkeypatch.setattr(model._program, "_run", only_logits(model._program._run))
        for options in ({"temperature": 1.0}, {}):
            sequence, other = model.new_sequence(), model.new_sequence()
            (found,) = model.pick_batch([(sequence, [5, 6, 7])], [Sampler(SamplingParams(**options), 264, [])])
            logits = model.forward([5, 6, 7], sequence=other)
            assert found == Sampler(SamplingParams(**options), 264, []).pick(logits, 3)


def only_logits(run):
    def checked(batch, choices):
        assert choices is None
        return run(batch, choices)

    return checked
