"""The first choice of tokens on the device: checked on four rows. If it is wrong, tokens are chosen on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from marlin_cy.decoder.sampling import Sampler, SamplingParams
from marlin_cy.opencl.checks.routing import read
from marlin_cy.opencl.checks.verdicts import unchecked_backend
from marlin_cy.opencl.decoder.maker import Maker
from marlin_cy.opencl.decoder.sample import TokenChooser, describe_choices
from marlin_cy.opencl.decoder.step import StepLayout
from marlin_cy.opencl.memory import driver_errors, uploaded
from marlin_cy.opencl.recording import RecordingContext

if TYPE_CHECKING:
    import numpy.typing as npt

    from marlin_cy.opencl.backend import OpenClBackend

__all__ = ["is_choosing_correct"]

PARAMS = (
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=40, top_p=0.95, min_p=0.01),
    SamplingParams(temperature=0.9, top_k=50, top_p=0.9, repetition_penalty=1.1, presence_penalty=0.5),
)
"""Of a row each."""
SPREAD = 3.0  # of the logits: some hundred tokens matter
POSITION = 7


def is_choosing_correct(backend: OpenClBackend, vocab_size: int) -> bool:
    """Whether the device chooses the tokens that the host chooses, from ``vocab_size`` logits.

    Raises
    ------
    DeviceError
        The device fails.
    """
    verdicts = backend.runtime.verdicts
    if verdicts is None:
        return True
    with driver_errors(backend.runtime):
        reason = verdicts.reason_wrong(f"choice of {vocab_size} tokens", lambda: reason_wrong(backend, vocab_size))
    if reason is not None:
        verdicts.warn(f"{backend.runtime.capabilities.name}: the choice of tokens", reason, stacklevel=6)
    return reason is None


def reason_wrong(backend: OpenClBackend, vocab_size: int) -> str | None:
    """None if the tokens of some rows are right, else a description of the error."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((len(PARAMS), vocab_size), np.float32) * np.float32(SPREAD)
    prompt = rng.integers(0, vocab_size, 20).tolist()
    ours, theirs = ([Sampler(params, vocab_size, prompt) for params in PARAMS] for _ in range(2))
    expected = [sampler.pick(row, POSITION) for sampler, row in zip(theirs, logits, strict=True)]
    found = chosen(unchecked_backend(backend), logits, [(sampler, POSITION) for sampler in ours])
    return None if found == expected else f"it chooses {found}, and {expected} are right"


def chosen(backend: OpenClBackend, logits: npt.NDArray[np.float32], choices: list[tuple[Sampler, int]]) -> list[int]:
    """The tokens of some rows of logits, chosen on the device."""
    runtime, ctx, (rows, width) = backend.runtime, backend.new_context(), logits.shape
    buffer = uploaded(runtime, logits, "logits to check")
    chooser, recorder = TokenChooser(runtime), RecordingContext(backend, ctx.queue)
    described = describe_choices(choices, rows)
    chooser.reserve(len(described.ints))
    recorder.begin()
    tokens = chooser.record(Maker(recorder, buffer, StepLayout(rows), rows), buffer, width)
    chooser.write(ctx.queue, described)
    recorder.recording.enqueue(ctx.queue, described.most_entries)
    found: list[int] = read(ctx, tokens, np.int32, 2 * rows)[::2].tolist()
    return found
