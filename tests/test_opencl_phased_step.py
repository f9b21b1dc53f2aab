"""Steps of few tokens by phases (``kernels/decoder_step.cl``), a launch for each phase, against recorded launches.

The kernel is for tensor cores. Here its products are the portable ones, and work-groups do not wait for each other.
"""

import dataclasses
import warnings
from functools import cache
from importlib.resources import files
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

cl = pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")

from asserts import relative_error  # noqa: E402
from opencl_devices import is_known_wrong  # noqa: E402
from test_opencl_faults import broken  # noqa: E402

from marlin_cy.decoder import build  # noqa: E402
from marlin_cy.decoder.load import load_model  # noqa: E402
from marlin_cy.decoder.plan import AttentionPlan  # noqa: E402
from marlin_cy.decoder.program import Batch  # noqa: E402
from marlin_cy.decoder.sampling import Sampler, SamplingParams  # noqa: E402
from marlin_cy.opencl import program as opencl_program  # noqa: E402
from marlin_cy.opencl.buffers import Rows  # noqa: E402
from marlin_cy.opencl.decoder import phased_step  # noqa: E402
from marlin_cy.opencl.decoder.phased_shape import NotPhased, shape_of  # noqa: E402
from marlin_cy.opencl.decoder.phased_step import PhasedStep  # noqa: E402
from marlin_cy.opencl.decoder.projections import DenseMatrix, Uploads  # noqa: E402
from marlin_cy.opencl.decoder.step import Cuts, StepLayout, describe_rows, describe_step  # noqa: E402

FOLDER = Path(str(files("marlin_cy") / "data" / "tiny-qwen3-moe-gptq-int4"))
TEXT = np.frombuffer((FOLDER / "validation.txt").read_bytes()[:300], np.uint8).astype(np.int32)
PROMPT = "def area(width"
BOUND = 2e-3
"""Relative, Frobenius: the phases round normed rows and attention to float16."""

pytestmark = pytest.mark.filterwarnings("ignore::pyopencl.CompilerWarning")


def steps_of(program, **changes):
    """Steps by phases of a model's program, with other ends where given."""
    ends = program._ends()._replace(**changes)
    return PhasedStep(program._ctx, program._plan, program._layers, ends, False)


def new_steps(ctx, plan, layers, ends, resident):
    """As on a device whose work-groups are not resident together: see ``new_phased_step``."""
    return None if resident else PhasedStep(ctx, plan, layers, ends, False)


@pytest.fixture(autouse=True)
def kernel_is_right(request):
    """Skip a test if the check finds the kernel wrong, on a driver that is known to compile some kernels wrongly."""
    if "device_alone" not in request.fixturenames:
        return
    backend = request.getfixturevalue("device_alone")
    if is_known_wrong(backend.device) and is_left(backend):
        pytest.skip("the driver's fault, which the check of the step by phases finds")


@cache
def is_left(backend):
    """Whether a model leaves the way by phases at its first step."""
    model = load_model(FOLDER, backend, cache_dtype="float16", context_length=512, cache_tokens=512)
    model._program._phased = steps_of(model._program)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        check_first(model, 1)
    return model._program._phased is None


@pytest.fixture
def phased(device_alone, monkeypatch):
    """A model whose steps of one row a sequence go by phases."""
    monkeypatch.setattr("marlin_cy.opencl.decoder.program.new_phased_step", new_steps)
    model = load_model(FOLDER, device_alone, cache_dtype="float16", context_length=512, cache_tokens=2048)
    model._program._phased = steps_of(model._program)
    return model


@pytest.fixture(scope="module")
def models():
    return {}


@pytest.fixture
def recorded(device_alone, models):
    """One model for each device: its launches are compiled and recorded once."""
    if id(device_alone) not in models:
        models[id(device_alone)] = load_model(
            FOLDER, device_alone, cache_dtype="float16", context_length=512, cache_tokens=2048
        )
    model = models[id(device_alone)]
    yield model
    for sequence in list(model._sequences):
        model.free(sequence)


@pytest.mark.sweep
class TestAgainstLaunches:
    @pytest.mark.parametrize("lengths", [[1], [40], [17, 3], [50, 1, 34]], ids=str)
    @pytest.mark.parametrize("groups", [2, 24], ids=["one run", "several runs"])
    def test_logits_and_tokens(self, phased, recorded, rng, lengths, groups, monkeypatch):
        """Rows at several depths, with one run of positions and, where there are pages enough, with several."""
        monkeypatch.setattr(phased_step, "SPLIT_PAGES", 2)
        steps = phased._program._phased
        steps._groups = groups
        ours, theirs = ([model.new_sequence() for _ in lengths] for model in (phased, recorded))
        for sequence, other, length in zip(ours, theirs, lengths, strict=True):
            prompt = rng.integers(0, phased.vocab_size, length)
            phased.forward(prompt, sequence=sequence)
            recorded.forward(prompt, sequence=other)
        for _ in range(2):
            tokens = rng.integers(0, phased.vocab_size, len(lengths))
            found, expected = (
                np.array(
                    model.forward_batch([(sequence, [token]) for sequence, token in zip(those, tokens, strict=True)])
                )
                for model, those in ((phased, ours), (recorded, theirs))
            )
            assert phased._program._phased is steps
            assert 0 < relative_error(found, expected) < BOUND

    @pytest.mark.parametrize("lengths", [[1, 40], [100]], ids=str)
    def test_a_soft_cap(self, device_alone, rng, lengths, monkeypatch):
        """In one layer of two, with scores that are often beyond it."""
        monkeypatch.setattr("marlin_cy.opencl.decoder.program.PHASED_ERROR", 0.1)
        caps = iter([0.5, None] * 9)
        monkeypatch.setattr(build, "AttentionPlan", lambda **values: AttentionPlan(**values, soft_cap=next(caps)))
        model = load_model(FOLDER, device_alone, cache_dtype="float16", context_length=512, cache_tokens=1024)
        program, sequences = model._program, [model.new_sequence() for _ in lengths]
        for sequence, length in zip(sequences, lengths, strict=True):
            model.forward(rng.integers(0, model.vocab_size, length), sequence=sequence)
        ours, theirs = ([(model.fork(sequence), [7]) for sequence in sequences] for _ in range(2))
        expected = np.array(model.forward_batch(theirs))
        program._phased = steps = steps_of(program)
        assert steps._macros["CAPPED"]
        assert 0 < relative_error(np.array(model.forward_batch(ours)), expected) < BOUND
        assert program._phased is steps

    def test_a_head_of_its_own(self, phased, recorded, rng, monkeypatch):
        """As with a quantised head, which is no part of the step; the description of a step outgrows its buffer."""
        monkeypatch.setattr(phased_step, "LEAST_STEP_INTS", 24)
        program = phased._program
        program._phased = steps = steps_of(program, head=None)
        ours, theirs = phased.new_sequence(), recorded.new_sequence()
        for count in (3, 100):
            prompt = rng.integers(0, phased.vocab_size, count)
            phased.forward(prompt, sequence=ours)
            recorded.forward(prompt, sequence=theirs)
            found, expected = (
                model.forward([count], sequence=one) for model, one in ((phased, ours), (recorded, theirs))
            )
            assert program._phased is steps and not steps.has_head
            assert 0 < relative_error(found, expected) < BOUND

    def test_a_head_of_8_bits(self, phased):
        """It is a product after the step."""
        program, plan = phased._program, phased.plan
        scales = np.ones((plan.vocab_size, 1), np.float32)
        weight = plan.head.weight.astype(ml_dtypes.float8_e4m3fn)
        uploads = Uploads(phased.context.backend.runtime)
        head = DenseMatrix(uploads, weight, None, scales, plan.hidden_size, of_plan=False)
        assert not steps_of(program, head=head).has_head

    def test_greedy(self, phased, recorded):
        """The same tokens, and the first of equal logits."""
        ours, theirs = (list(model.generate(PROMPT, max_new_tokens=20, temperature=0)) for model in (phased, recorded))
        assert "".join(piece.text for piece in ours) == "".join(piece.text for piece in theirs)

    @pytest.mark.parametrize("rows", [1, 5])
    def test_tokens_that_the_step_chooses(self, phased, rng, rows):
        """The largest logit of each row, also where a step has more rows than a work-group has waves."""
        batch = row_batch(phased, rng.integers(0, phased.vocab_size, rows), [0] * rows)
        logits = phased._program.step(batch)
        assert phased._program.greedy_step(batch).tolist() == logits.argmax(axis=1).tolist()

    @pytest.mark.parametrize("has_head", [True, False])
    def test_sampled_tokens(self, phased, rng, has_head):
        """From the logits of the step: of some rows drawn, of others the largest, and of one no token."""
        program = phased._program
        if not has_head:
            program._phased = steps_of(program, head=None)
        steps = program._phased
        batch = row_batch(phased, rng.integers(0, phased.vocab_size, 4), [0] * 4)
        logits = program.step(batch)
        options = {"temperature": 1.0}, {}, {"temperature": 2.0, "top_k": 9, "presence_penalty": 1.0}
        ours, theirs = (
            [(Sampler(SamplingParams(**those), phased.vocab_size, [3]), 7) for those in options] for _ in range(2)
        )
        found = program.pick(dataclasses.replace(batch, wanted=np.array([0, 2, 3], np.int32)), ours)
        assert program._phased is steps
        assert found == [sampler.pick(logits[row], 7) for row, (sampler, _) in zip((0, 2, 3), theirs, strict=True)]

    def test_a_wrong_kernel_is_left(self, phased, monkeypatch):
        """Errors beyond the bound: a warning, and logits by launches."""
        monkeypatch.setattr("marlin_cy.opencl.decoder.program.PHASED_ERROR", -1)
        monkeypatch.setattr(PhasedStep, "kind", lambda self, rows: "of this test, without a verdict")
        monkeypatch.setattr(phased.context.backend.runtime.verdicts._memory, "warned", set())
        sequence = phased.new_sequence()
        phased.forward(TEXT[:10], sequence=sequence)
        with pytest.warns(RuntimeWarning, match="a step by phases is not used: the relative error"):
            logits = phased.forward(TEXT[10:11], sequence=sequence)
        assert phased._program._phased is None
        assert np.isfinite(logits).all()

    def test_a_kernel_that_does_not_compile_is_left(self, phased, monkeypatch):
        """A warning with the compiler's log, and logits by launches."""
        monkeypatch.setattr(PhasedStep, "kind", lambda self, rows: "of this test, which does not compile")
        monkeypatch.setattr(phased.context.backend.runtime.verdicts._memory, "warned", set())
        monkeypatch.setattr(phased.context.backend.runtime.programs, "_programs", {})
        monkeypatch.setattr(opencl_program, "source", broken(["decoder_step"]))
        sequence = phased.new_sequence()
        phased.forward(TEXT[:10], sequence=sequence)
        with pytest.warns(RuntimeWarning, match=r"(?s)a step by phases is not used: the kernel does not run.*no_such"):
            logits = phased.forward(TEXT[10:11], sequence=sequence)
        assert phased._program._phased is None
        assert np.isfinite(logits).all()

    def test_work_groups_that_wait_in_vain(self, phased, monkeypatch):
        """The step runs again by launches: nothing of the given-up one is used."""
        sequence = phased.new_sequence()
        phased.forward(TEXT[:10], sequence=sequence)
        expected = phased.fork(sequence)
        by_phases = phased.forward(TEXT[10:11], sequence=expected)
        monkeypatch.setattr(PhasedStep, "gave_up", lambda self: True)
        with warnings.catch_warnings():  # the warning comes once in a process, by the first test that causes it
            warnings.simplefilter("ignore", RuntimeWarning)
            logits = phased.forward(TEXT[10:11], sequence=sequence)
        assert phased._program._phased is None
        assert relative_error(logits, by_phases) < BOUND

    @pytest.mark.parametrize("has_head", [True, False])
    def test_another_way_by_phases(self, phased, rng, has_head, monkeypatch):
        """After a step that is given up, tokens come from the logits of the way that takes its place."""
        program = phased._program

        def steps_by(ctx, plan, layers, ends, resident):
            return PhasedStep(ctx, plan, layers, ends if has_head else ends._replace(head=None), resident)

        monkeypatch.setattr("marlin_cy.opencl.decoder.program.new_phased_step", steps_by)
        monkeypatch.setattr(PhasedStep, "kind", lambda self, rows: "of this test, with a verdict")
        monkeypatch.setattr(phased.context.backend.runtime.verdicts, "knows", lambda kind: True)
        monkeypatch.setattr(phased.context.backend.runtime.verdicts, "reason_wrong", lambda kind, check: None)
        program._phased = first = steps_by(program._ctx, program._plan, program._layers, program._ends(), False)
        sampling = SamplingParams(temperature=1.0)

        def picked(batch):
            return program.pick(batch, [(Sampler(sampling, phased.vocab_size, []), 7)] * len(batch.tokens))

        picked(row_batch(phased, rng.integers(0, phased.vocab_size, 4), [0] * 4))
        first.resident = True  # as by one launch
        monkeypatch.setattr(first, "gave_up", lambda: True)
        monkeypatch.setattr(first, "enqueue", lambda batch, greedy: Rows(first._rooms_for(4)["x"], 0, 0, 4, 1))
        batch = row_batch(phased, rng.integers(0, phased.vocab_size, 4), [0] * 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            found = picked(batch)
        assert program._phased is not first
        logits = program.step(batch)
        assert found == [Sampler(sampling, phased.vocab_size, []).pick(row, 7) for row in logits]


def check_first(model, rows):
    """Run a step, so that the kernel is no longer checked at its first use. Nothing is in the cache."""
    model._program.greedy_step(row_batch(model, range(rows), range(rows)))


class Counted:
    """How often steps were launched and described."""

    def __init__(self, steps, monkeypatch):
        self.launched = self.described = 0
        launch, describe = steps._launch, steps._describe

        def count_launch(*arguments):
            self.launched += 1
            return launch(*arguments)

        def count_description(batch):
            self.described += 1
            return describe(batch)

        monkeypatch.setattr(steps, "_launch", count_launch)
        monkeypatch.setattr(steps, "_describe", count_description)


class TestFollowingSteps:
    """Steps of a text that are enqueued before the tokens of the step before are read."""

    @pytest.mark.parametrize("lengths", [[2], [15, 33, 6]], ids=str)
    def test_text(self, phased, recorded, rng, lengths, monkeypatch):
        """Several sequences, over the ends of their pages: the tokens are those of launches."""
        samplers = [Sampler(SamplingParams(), phased.vocab_size, []) for _ in lengths]
        texts = []
        prompts = [rng.integers(0, phased.vocab_size, length) for length in lengths]
        check_first(phased, len(lengths))
        counted = None
        for model in (phased, recorded):
            pairs = [(model.new_sequence(), prompt) for prompt in prompts]
            texts.append([])
            for _ in range(40):
                tokens = model.pick_batch(pairs, samplers)
                texts[-1].append(tokens)
                pairs = [(sequence, [token]) for (sequence, _), token in zip(pairs, tokens, strict=True)]
                if counted is None:
                    counted = Counted(phased._program._phased, monkeypatch)
        assert texts[0] == texts[1]
        # The first step of each page is described, and so is the first step of all. One step is ahead of the last one.
        boundaries = {step for length in lengths for step in range(39) if (length + step) % 16 == 0}
        assert counted.described == len(boundaries | {0})
        assert 39 <= counted.launched <= 40

    def test_another_course(self, phased, recorded, rng):
        """A sequence goes on with other tokens, is cut, forked and joined by others: no step ahead has an effect."""
        sampler = Sampler(SamplingParams(), phased.vocab_size, [])
        prompt = rng.integers(0, phased.vocab_size, 18)
        seen = []
        for model in (phased, recorded):
            sequence = model.new_sequence()
            (token,) = model.pick_batch([(sequence, prompt)], [sampler])

            def decode(count, sequence=sequence, model=model):
                nonlocal token
                for _ in range(count):
                    (token,) = model.pick_batch([(sequence, [token])], [sampler])

            decode(4)
            fork = model.fork(sequence)
            logits = [model.forward([5], sequence=sequence)]  # not the token that was chosen
            decode(3)
            model.truncate(sequence, 20)
            logits.append(model.forward([7], sequence=sequence))
            decode(3)
            logits += model.forward_batch([(fork, [9]), (sequence, [token])])
            decode(3)
            logits.append(model.forward([token], sequence=sequence))
            seen.append(np.array(logits))
        assert 0 < relative_error(*seen) < BOUND

    def test_end_of_the_context(self, device_alone, phased, monkeypatch):
        """No step is ahead at a position that the model does not have."""
        model = load_model(FOLDER, device_alone, cache_dtype="float16", context_length=40, cache_tokens=64)
        program = model._program
        program._phased = steps_of(program)
        sampler = Sampler(SamplingParams(), model.vocab_size, [])
        check_first(model, 1)
        sequence = model.new_sequence()
        (token,) = model.pick_batch([(sequence, TEXT[:36])], [sampler])
        counted = Counted(program._phased, monkeypatch)
        for _ in range(4):
            (token,) = model.pick_batch([(sequence, [token])], [sampler])
        assert counted.launched == 4

    def test_a_step_ahead_that_is_given_up(self, phased, recorded, monkeypatch):
        """The text goes on by launches. A step that gave up has not written its number."""
        launch, steps = phased._program._phased._launch, phased._program._phased

        def launch_fewer(*arguments):
            launched = launch(*arguments)
            return launched._replace(number=launched.number + 2) if launched.number == steps_left else launched

        prompt = TEXT[:20]
        texts = []
        for model in (phased, recorded):
            sampler, sequence = Sampler(SamplingParams(), model.vocab_size, []), model.new_sequence()
            (token,) = model.pick_batch([(sequence, prompt)], [sampler])
            texts.append([token])
            if model is phased:
                steps_left = steps._number + 5
                monkeypatch.setattr(steps, "_launch", launch_fewer)
            for _ in range(9):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)
                    (token,) = model.pick_batch([(sequence, [token])], [sampler])
                texts[-1].append(token)
        assert phased._program._phased is None
        assert texts[0] == texts[1]

    def test_a_row_of_nan(self, phased):
        """The step that follows has a token of the vocabulary all the same."""
        program = phased._program
        steps = program._phased
        batch = row_batch(phased, [3, 4], [0, 5])
        program.greedy_step(batch)
        poisoned = np.full(phased.plan.hidden_size, np.nan, np.float32)
        cl.enqueue_copy(phased.context.queue, program._final_norm, poisoned)
        assert program.greedy_step(batch).tolist() == [0, 0]
        described = np.empty(24, np.int32)
        cl.enqueue_copy(phased.context.queue, described, steps._step.buffer)
        assert described[16:24].reshape(2, 4)[:, :2].tolist() == [[0, 1], [0, 6]]


def test_prompts_are_not_taken(phased):
    """Rows of one step cannot attend to each other."""
    steps = phased._program._phased
    batch = row_batch(phased, [1, 2], [5, 9])
    assert steps.takes(batch)
    assert not steps.takes(dataclasses.replace(batch, segments=np.array([[0, 2, 5, -1]], np.int64)))
    assert not steps.takes(row_batch(phased, range(9), range(9)))


def test_description(rng):
    """The records and page tables that ``describe_step`` gives, without tiles."""
    positions = np.array([0, 37, 15])
    segments = np.stack([np.arange(3), np.ones(3, int), positions, np.full(3, -1)], axis=1)
    batch = Batch(
        rng.integers(0, 99, 3).astype(np.int32),
        segments.astype(np.int64),
        rng.integers(0, 50, (3, 4)).astype(np.int32),
        np.arange(3, dtype=np.int32),
    )
    step, pages = describe_rows(batch)
    whole, _ = describe_step(batch, StepLayout(3), Cuts(4, 8), 128)
    assert pages == 3
    records, others = step[16:28].reshape(3, 4), whole[16:28].reshape(3, 4)
    assert np.array_equal(records[:, [0, 1, 3]], others[:, [0, 1, 3]])
    for (*_, ours, _), (*_, theirs, _) in zip(records, others, strict=True):
        assert np.array_equal(step[ours : ours + pages], whole[theirs : theirs + pages])


def test_what_it_does_not_support(phased):
    """Named, for `doctor` and for whoever asks."""
    plan, layers = phased.plan, phased._program._layers
    shape_of(plan, layers)
    attention = dataclasses.replace(plan.layers[0].mixer, head_dim=20)
    changed = dataclasses.replace(plan.layers[0], mixer=attention)
    with pytest.raises(NotPhased, match="its head size is 20, no multiple of 32"):
        shape_of(dataclasses.replace(plan, layers=[changed, *plan.layers[1:]]), layers)


def row_batch(model, tokens, positions):
    """A step of one row of each of some sequences, whose caches hold zeros."""
    rows, pages = len(positions), max(positions) // 16 + 1
    segments = np.stack([np.arange(rows), np.ones(rows, int), list(positions), np.full(rows, -1)], axis=1)
    return Batch(
        np.array(list(tokens), np.int32),
        segments.astype(np.int64),
        np.arange(rows * pages, dtype=np.int32).reshape(rows, pages),
        np.arange(rows, dtype=np.int32),
    )
