"""The plugin of vLLM where vLLM is absent: what decides without it, and shares of weights."""

import subprocess
import sys
import types
import warnings
from dataclasses import replace

import numpy as np
import pytest
from problems import random_problem

from marlin_cy.integrations import vllm as plugin
from marlin_cy.integrations.vllm.shares import columns, deinterleaved, rows, share, start_of_share
from marlin_cy.reference import dequantize_weight

CONFIG = "marlin_cy.integrations.vllm.config"


def test_returns_at_once_on_other_platforms(monkeypatch):
    """Nothing of vLLM but its platform is looked at."""
    monkeypatch.delitem(sys.modules, CONFIG, raising=False)
    platforms = types.ModuleType("vllm.platforms")
    platforms.current_platform = types.SimpleNamespace(is_cpu=lambda: False)
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    plugin.register()
    assert CONFIG not in sys.modules


def test_a_vllm_without_the_places_of_the_plugin(monkeypatch):
    """The plugin is off, with a warning that names the range."""
    monkeypatch.delitem(sys.modules, CONFIG, raising=False)
    monkeypatch.delattr(plugin, "config", raising=False)
    vllm, platforms = types.ModuleType("vllm"), types.ModuleType("vllm.platforms")
    vllm.__version__ = "0.32.0"
    platforms.current_platform = types.SimpleNamespace(is_cpu=lambda: True)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    with pytest.warns(RuntimeWarning, match=r"vLLM 0\.32\.0 .* is off: .* tested with vLLM 0\.32\.0 to 0\.32"):
        plugin.register()


def test_costs_nothing_at_import():
    code = "import sys, marlin_cy.integrations.vllm; print({'torch', 'vllm', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.32.7.dev3"])
def test_tested_versions(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plugin.warn_if_untested(version)


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0", "dev"])
def test_untested_versions(version):
    with pytest.warns(RuntimeWarning, match=rf"vLLM 0\.32\.0 to 0\.32, this is vLLM {version}"):
        plugin.warn_if_untested(version)


# ---------------------------------------------------------------------------------------------
# Shares


def random_weight(rng, k, n, group_size, g_idx=None, codes="uint4"):
    return replace(random_problem(rng, 1, k, n, group_size, codes=codes).canonical(0), g_idx=g_idx)


@pytest.mark.parametrize("codes", ["uint4", "uint8"])
@pytest.mark.parametrize(("group_size", "expected"), [(128, 32), (64, 32), (32, 32), (192, 96)])
def test_rows_cut_groups_exactly(rng, codes, group_size, expected):
    weight = random_weight(rng, 192, 16, group_size, codes=codes)
    part = rows(weight, 96, 96)
    assert (part.k, part.group_size) == (96, expected)
    np.testing.assert_array_equal(dequantize_weight(part), dequantize_weight(weight)[96:])


def test_rows_in_the_order_of_g_idx(rng):
    weight = random_weight(rng, 256, 8, 64, rng.permutation(np.repeat(np.arange(4, dtype=np.int32), 64)))
    whole = dequantize_weight(weight)
    for rank in range(2):
        part = share(weight, 128, 8, rank, 2)
        assert part.group_size == 32
        np.testing.assert_array_equal(dequantize_weight(part), whole[128 * rank : 128 * (rank + 1)])


def test_columns(rng):
    weight = random_weight(rng, 64, 48, 32)
    whole = dequantize_weight(weight)
    np.testing.assert_array_equal(dequantize_weight(columns(weight, 16, 24)), whole[:, 16:40])
    for rank in range(2):
        np.testing.assert_array_equal(dequantize_weight(share(weight, 64, 24, rank, 2)), whole[:, 24 * rank :][:, :24])
    for first, half in enumerate(deinterleaved(weight)):
        np.testing.assert_array_equal(dequantize_weight(half), whole[:, first::2])


def test_ranks_that_share_a_key_head():
    """Two heads for four ranks, as vLLM copies them."""
    assert [start_of_share(64, 32, rank, 4) for rank in range(4)] == [0, 0, 32, 32]
    assert [start_of_share(128, 32, rank, 4) for rank in range(4)] == [0, 32, 64, 96]


@pytest.mark.parametrize(("total", "size", "ranks"), [(100, 32, 4), (96, 32, 4), (16, 32, 2)])
def test_shares_that_do_not_fit(total, size, ranks):
    with pytest.raises(ValueError, match=f"got {total} columns or rows, expected shares of {size} for {ranks} ranks"):
        start_of_share(total, size, 0, ranks)


def test_rows_that_do_not_fit(rng):
    with pytest.raises(ValueError, match="expected multiples of 8"):
        rows(random_weight(rng, 64, 8, 32), 4, 32)
    order = rng.permutation(np.repeat(np.arange(2, dtype=np.int32), 48))
    with pytest.raises(ValueError, match="in the order of g_idx"):
        rows(random_weight(rng, 96, 8, 32, np.minimum(order, 2)), 0, 40)
