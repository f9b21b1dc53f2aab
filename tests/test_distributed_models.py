"""Whole models on several hosts: the same bits as on one, for every family of the decoder."""

import numpy as np
import pytest
from hosts import results_on_hosts

from marlin_cy.checkpoints.checkpoint import open_checkpoint
from marlin_cy.checkpoints.packed_writer import write_packed
from marlin_cy.decoder.load import load_model

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

from language_models import CONFIGS, VOCABULARY, write_model  # noqa: E402

OPTIONS = {"context_length": 320, "cache_tokens": 640, "num_threads": 1}


@pytest.fixture(scope="module", params=list(CONFIGS))
def folder(request, tmp_path_factory):
    """Experts have a tile of columns for each of four hosts."""
    experts = {"mixtral": "intermediate_size", "gpt_oss": "intermediate_size"}
    changes = {experts.get(request.param, "moe_intermediate_size"): 64}
    return write_model(tmp_path_factory.mktemp(request.param), request.param, **changes)[0]


def logits_of(folder, group=None, **options):
    """Of prompts in several calls, and of single tokens of several sequences."""
    model = load_model(folder, group=group, **{**OPTIONS, **options})
    rng = np.random.default_rng(3)
    texts = [rng.integers(1, VOCABULARY, length) for length in (40, 7)]
    sequences = [model.new_sequence() for _ in texts]
    found = [*model.forward_batch(list(zip(sequences, texts, strict=True)), all_logits=True)]
    found += model.forward_batch([(sequences[0], texts[1])])
    fork = model.fork(sequences[0])
    for token in texts[1][:3]:
        found += model.forward_batch([(sequence, [token]) for sequence in (*sequences, fork)])
    return np.concatenate([np.atleast_2d(logits) for logits in found])


def check_bits(folder, hosts, **options):
    expected = logits_of(folder, **options)
    for found in results_on_hosts(hosts, lambda group: logits_of(folder, group, **options)):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.sampled(5)
def test_bits(folder):
    check_bits(folder, 3)


@pytest.mark.sweep
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_bits_on_other_numbers_of_hosts(folder, hosts):
    check_bits(folder, hosts, cache_dtype="float32", compute_dtype="int8")


@pytest.mark.sweep
def test_bits_of_packed_folders(folder, tmp_path):
    write_packed(open_checkpoint(folder), tmp_path / "packed")
    for hosts in (1, 2, 3, 4):
        check_bits(tmp_path / "packed", hosts, lm_head="int8" if hosts == 3 else None)
