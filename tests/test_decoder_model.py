"""Whole models: logits against the reference, bits that do not depend on how tokens are run, and invalid calls."""

import threading

import numpy as np
import pytest

from marlin_cy import CheckpointError, ContextInUse, get_backend
from marlin_cy.cpu._dispatch import available_isas
from marlin_cy.decoder.cache import CacheFull
from marlin_cy.decoder.model import cut_into_steps, load_model
from marlin_cy.decoder.reference import reference_logits
from marlin_cy.commands.options import built_in_checkpoint

TEXT = b"def quicksort(values):\n    if len(values) < 2:\n        return values\n"


@pytest.fixture(scope="module")
def folder():
    with built_in_checkpoint() as path:
        yield path


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, cache_dtype="float32", cache_tokens=4096)
