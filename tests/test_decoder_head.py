"""Heads in 8 bits: the product against float64, the same bits on every ISA, and what is refused."""

from importlib.resources import files

import ml_dtypes
import numpy as np
import pytest
from conftest import ISAS

from marlin_cy import UnsupportedError, load_model
from marlin_cy.decoder.head import rounded_head, with_head
from marlin_cy.decoder.plan import DenseLinear
from marlin_cy.decoder.reference import reference_logits

FOLDER = files("marlin_cy") / "data" / "tiny-qwen3-moe-gptq-int4"
TEXT = np.arange(40, 100)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_rounding(rng, dtype):
    weight = (rng.standard_normal((5000, 48)) * rng.uniform(0.01, 10, (5000, 1))).astype(dtype)
    weight[7] = 0
    head = rounded_head(DenseLinear(weight))
    assert (head.weight.dtype, head.weight.shape) == (np.int8, weight.shape)
    assert np.abs(head.weight).max(axis=1)[np.arange(5000) != 7].min() == 127
    error = np.abs(head.weight * head.scales.astype(np.float64) - weight.astype(np.float64))
    # Half a step, and the roundings of the scale and of its inverse.
    assert (error <= head.scales * (0.5 + 127 * 3 * 2.0**-24)).all()
    assert head.scales[7] == 0
    np.testing.assert_array_equal(head.matrix(slice(5, 9)), head.weight[5:9] * head.scales[5:9])


@pytest.mark.parametrize("count", [1, 5, 60])
def test_logits(count):
    """Many rows and few rows, on every ISA: the same bits, near the reference of the same rounded head."""
    kept = None
    for isa in (name for name, isa in ISAS.items() if isa["available"]):
        model = load_model(FOLDER, cache_dtype="float32", context_length=128, lm_head="int8", isa=isa, num_threads=2)
        logits = model.forward(TEXT[:count], all_logits=True)
        reference = reference_logits(model.plan, TEXT[:count])
        assert np.linalg.norm(logits - reference) < 5e-4 * np.linalg.norm(reference)
        kept = logits if kept is None else kept
        np.testing.assert_array_equal(logits, kept)
    exact = load_model(FOLDER, cache_dtype="float32", context_length=128).forward(TEXT[:count], all_logits=True)
    difference = np.linalg.norm(kept - exact) / np.linalg.norm(exact)
    assert 1e-4 < difference < 2e-2


@pytest.mark.parametrize("lm_head", ["int4", 8, "", True])
def test_invalid(lm_head):
    with pytest.raises(ValueError, match="lm_head: got"):
        load_model(FOLDER, context_length=64, lm_head=lm_head)


def test_a_quantised_head():
    model = load_model(FOLDER, context_length=64)
    quantised = type(model.plan)(**{**vars(model.plan), "head": model.plan.layers[0].mixer.q})
    assert with_head(quantised, None) is quantised
    with pytest.raises(UnsupportedError, match="lm_head: the model's head is quantised already"):
        with_head(quantised, "int8")
