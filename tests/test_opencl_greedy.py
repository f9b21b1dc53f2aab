"""Greedy text after 10 prompts, on every OpenCL device that is found, against the CPU's.

Show what was found in texts of 200 tokens, also where they are equal::

    MARLIN_CY_GREEDY_TOKENS=200 .venv/bin/python -m pytest -n0 -rP -m sweep tests/test_opencl_greedy.py
"""

import os
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

cl = pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")

from marlin_cy.decoder.load import load_model  # noqa: E402
from marlin_cy.decoder.sampling import Sampler, SamplingParams  # noqa: E402

FOLDER = Path(str(files("marlin_cy") / "data" / "tiny-qwen3-moe-gptq-int4"))
TEXT = np.frombuffer((FOLDER / "validation.txt").read_bytes(), np.uint8).astype(np.int32)
PROMPTS = [TEXT[begin : begin + 20 + begin // 100] for begin in range(0, 10_000, 1000)]
COUNT = int(os.environ.get("MARLIN_CY_GREEDY_TOKENS", "50"))
BOUND = 2e-3
"""Relative error of a row of logits, Frobenius. A largest logit that is ahead by more than twice that cannot change."""

pytestmark = [pytest.mark.sweep, pytest.mark.filterwarnings("ignore::pyopencl.CompilerWarning")]


def greedy_texts(model):
    """The tokens after each prompt, int64 ``[prompts, COUNT]``, whatever tokens they are."""
    sequences = [model.new_sequence() for _ in PROMPTS]
    sampler = Sampler(SamplingParams(), model.vocab_size, [])
    texts, parts = [], PROMPTS
    for _ in range(COUNT):
        texts.append(model.pick_batch(list(zip(sequences, parts, strict=True)), [sampler] * len(PROMPTS)))
        parts = [[token] for token in texts[-1]]
    return np.array(texts).T


@pytest.fixture(scope="module")
def cpu():
    return load_model(FOLDER, cache_tokens=4096, num_threads=2)


@pytest.fixture(scope="module")
def expected(cpu):
    return greedy_texts(cpu)


def test_greedy_texts(device_alone, cpu, expected):
    """Equal, or the first token that differs is one that rounding may choose: its gap is shown."""
    found = greedy_texts(load_model(FOLDER, device_alone, cache_tokens=4096))
    unequal = []
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        different = np.flatnonzero(ours != theirs)
        if not len(different):
            continue
        token = int(different[0])
        logits = cpu.forward(np.concatenate([PROMPTS[number], theirs[:token]]), sequence=cpu.new_sequence())
        gap = (logits[theirs[token]] - logits[ours[token]]) / np.linalg.norm(logits)
        unequal.append(f"prompt {number} from token {token} on, where the gap is {gap:.1e} of the logits' norm")
        assert 0 <= gap < 2 * BOUND, unequal[-1]
    equal = len(PROMPTS) - len(unequal)
    print("; ".join([f"{device_alone!r}: {equal} of {len(PROMPTS)} texts equal the CPU's", *unequal]))
