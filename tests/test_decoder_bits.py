"""One set of bits for a token's logits, whatever is run beside it, before it, on how many threads, and by which ISA.

``MARLIN_CY_BITS_CASES=200`` runs 2,000 cases in the sweep: it is the number of cases of each family.
"""

import itertools
import os

import numpy as np
import pytest
from conftest import AVAILABLE_ISAS

from marlin_cy.decoder.load import load_model

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

from language_models import CONFIGS, VOCABULARY, write_model  # noqa: E402

CASES = int(os.environ.get("MARLIN_CY_BITS_CASES", "10"))
THREADS = 1, 2, 3, 7
CONTEXT = 640  # more than two chunks of the cache
SETTINGS = list(itertools.product(AVAILABLE_ISAS, THREADS))


class Models:
    """The models of one family, one for each ISA and number of threads, and what they must compute."""

    def __init__(self, folder, cache_dtype):
        self._folder, self._cache_dtype = folder, cache_dtype
        self._models = {}
        rng = np.random.default_rng(5)
        self.texts = [rng.integers(1, VOCABULARY, length) for length in (3, 17, 40, 90, 300)]
        base = self.model("generic", 1)
        self.logits = [base.forward(text, sequence=base.new_sequence(), all_logits=True) for text in self.texts]

    def model(self, isa, num_threads):
        if (isa, num_threads) not in self._models:
            self._models[isa, num_threads] = load_model(
                self._folder,
                context_length=CONTEXT,
                cache_tokens=4 * CONTEXT,
                cache_dtype=self._cache_dtype,
                isa=isa,
                num_threads=num_threads,
            )
        return self._models[isa, num_threads]


@pytest.fixture(scope="module", params=list(CONFIGS))
def models(request, tmp_path_factory):
    """The texts' lengths are those of cases that run in milliseconds, and one that takes more than one chunk."""
    folder = write_model(tmp_path_factory.mktemp(request.param), request.param)[0]
    dtypes = "float32", "float16", "bfloat16"
    return Models(folder, dtypes[list(CONFIGS).index(request.param) % len(dtypes)])


def run_case(models, rng):
    """Run some texts in random pieces, in random company; each piece's logits must have the known bits."""
    model = models.model(*SETTINGS[rng.integers(len(SETTINGS))])
    chosen = rng.choice(len(models.texts), rng.integers(1, len(models.texts) + 1), replace=False)
    sequences = {int(index): model.new_sequence() for index in chosen}
    while unfinished := [i for i, sequence in sequences.items() if sequence.length < len(models.texts[i])]:
        company = rng.permutation(unfinished)[: rng.integers(1, len(unfinished) + 1)]
        pairs, begins = [], []
        for index in company:
            text, begin = models.texts[index], sequences[index].length
            count = int(min(len(text) - begin, rng.choice([1, 2, 5, 30, 300])))
            pairs.append((sequences[index], text[begin : begin + count]))
            begins.append(begin)
        every = bool(rng.integers(2))
        results = model.forward_batch(pairs, all_logits=every)
        for index, begin, (_, tokens), logits in zip(company, begins, pairs, results, strict=True):
            expected = models.logits[index][begin : begin + len(tokens)]
            np.testing.assert_array_equal(logits, expected if every else expected[-1])
        if rng.integers(4) == 0:  # a fork goes on in place of its origin
            index = int(rng.choice(list(sequences)))
            origin, sequences[index] = sequences[index], model.fork(sequences[index])
            model.free(origin)
    for sequence in sequences.values():
        model.free(sequence)


@pytest.mark.sampled(5)
def test_bits(models, rng):
    for _ in range(3):
        run_case(models, rng)


@pytest.mark.sweep
def test_bits_of_many_cases(models, rng):
    for _ in range(CASES):
        run_case(models, rng)
