"""Tuning: what is measured, what is kept, and what a backend makes of a file, whatever is in it."""

import argparse
import json
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
from checkpoint_files import write_widths

from marlin_cy import cli, get_backend
from marlin_cy.commands.run import BUILT_IN
from marlin_cy.commands.tune import _shapes
from marlin_cy.cpu.backend import CpuBackend
from marlin_cy.errors import MarlinError
from marlin_cy.moe.align import moe_align_block_size

pytest.importorskip("pyopencl")
from opencl_devices import DEVICES, runtime_of
from problems import random_problem

from marlin_cy.opencl import tuned as results
from marlin_cy.opencl import tuning
from marlin_cy.opencl.gemm.multiply import problem_of

pytestmark = pytest.mark.skipif(not DEVICES, reason="no OpenCL device")

# K is split by default where one expert has one strip of columns and the device two compute units or more.
SHAPE = tuning.Shape(k=512, n=16, experts=2, group_size=128, top_k=1)


@pytest.fixture
def new_backend(shared_programs, tmp_path, monkeypatch):
    """A function that makes a backend whose results lie in a folder of the test's."""
    monkeypatch.setenv("MARLIN_CY_CACHE_DIR", str(tmp_path / "cache"))
    # Device 0 whatever the environment says; every device has this tier.
    context = runtime_of(DEVICES[0]).context
    return lambda: get_backend("opencl", device=DEVICES[0], context=context, tier="portable")


@pytest.fixture
def planned(rng):
    """A function that runs one row through expert 0: ``(configuration, problem, relative error)``."""
    problem = random_problem(rng, 2, 512, 16, 128, sym=True)
    x = rng.standard_normal((1, 512)).astype(np.float32)

    def run(backend):
        stack, ctx = problem.stack(backend), backend.new_context()
        routing = map(backend.from_host, moe_align_block_size(np.zeros((1, 1), np.int32), 1, 2))
        out = backend.from_host(np.full((1, 16), np.nan, np.float32))
        stack.gemm_phase_vllm(ctx, backend.from_host(x), *routing, out, 1, 1, 1)
        (plan,) = ctx.plans_of(stack.store).values()
        expected = x.astype(np.float64) @ problem.dense(0)
        error = np.linalg.norm(backend.to_host(out) - expected) / np.linalg.norm(expected)
        return plan.configuration, stack.store.symmetric, error

    return run


def product(backend, rng):
    """The tuner's case of one token, and the tier's own choice for it."""
    case = tuning.Case(backend, tuning.random_stack(backend, SHAPE, rng), SHAPE, 1, rng)
    return case, backend.tier.configurations(case.problem)[0]


def result_of(case, default, best):
    return tuning.Tuning(SHAPE, 1, case.problem.rows, case.key, 2e-5, 1e-5, default, best, 1, [])


def plant(backend, rng, best=None):
    """Keep another configuration than the tier's own for the product; returns it."""
    case, default = product(backend, rng)
    best = best or replace(default, splits=4 if default.splits != 4 else 2)
    results.keep(backend.runtime.capabilities, backend.tier, [result_of(case, default, best)])
    return best


def rewrite(change):
    """Change the entries of the file: ``change(entry)`` returns another."""
    path = results.tuning_file()
    document = json.loads(path.read_text())
    for place in document["places"].values():
        for key, entry in place.items():
            place[key] = change(entry)
    path.write_text(json.dumps(document))


def test_a_kept_configuration_is_used(new_backend, planned, rng):
    default, symmetric, _ = planned(new_backend())
    assert symmetric
    planted = plant(new_backend(), rng)
    assert planted != default
    used, _, error = planned(new_backend())
    assert used == planted
    assert error < 1e-6


def test_an_unsymmetric_stack_is_another_product(new_backend, rng):
    """And so is one of other codes."""
    backend = new_backend()
    plant(backend, rng)
    case, default = product(backend, rng)
    tuned = new_backend().runtime.tuned
    assert tuned.configurations(backend.tier, case.problem, True, "uint4")[0] != default
    assert tuned.configurations(backend.tier, case.problem, False, "uint4")[0] == default
    assert tuned.configurations(backend.tier, case.problem, True, "e2m1")[0] == default
    longer = case.problem._replace(k=1024)
    assert tuned.configurations(backend.tier, longer, True, "uint4")[0] == backend.tier.configurations(longer)[0]


OTHERS = {
    "zeros": {"symmetric": False},
    "e2m1": {"codes": "e2m1"},
    "bfloat16": {"scales": "bfloat16", "symmetric": False},
    "8 bits": {"codes": "uint8", "scales": "float32", "symmetric": False},
    "two levels": {"k": 256, "scales": "two_level_min", "symmetric": False},
}


@pytest.mark.sweep
@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_other_weights(new_backend, changes):
    """A product's key is that of the weights that were measured. Both 16-bit records are held in the same way."""
    shape = replace(SHAPE, **changes)
    (result,) = tuning.tune(new_backend(), shape, (1,))
    assert f"codes={shape.codes} " in result.key
    assert ("scales=" in result.key) == (shape.scales not in ("float16", "bfloat16"))
    assert result.refused == []


def test_tune_measures_and_keeps(new_backend, planned):
    backend = new_backend()
    progress = []
    measured = tuning.tune(backend, SHAPE, (1, 16, 17), lambda *where: progress.append(where))
    assert [result.tokens for result in measured] == [1, 16]  # 17 come to the same as 16
    assert progress[-1][:2] == (2, 3)
    first = measured[0]
    assert first.refused == []
    assert first.tried >= 2
    assert 0 < first.best_seconds <= first.default_seconds
    assert (first.best == first.default) == (first.best_seconds == first.default_seconds)
    path = results.keep(backend.runtime.capabilities, backend.tier, measured)
    assert path == results.tuning_file()
    assert not list(path.parent.glob("*.tmp"))
    used, _, error = planned(new_backend())
    assert used == first.best
    assert error < 1e-6


def test_what_is_kept_leaves_the_rest_alone(new_backend, rng):
    backend = new_backend()
    case, default = product(backend, rng)
    has, other = backend.runtime.capabilities, replace(backend.runtime.capabilities, driver_version="none")
    best = plant(backend, rng)
    results.keep(other, backend.tier, [result_of(case, default, best)])
    results.keep(has, backend.tier, [result_of(case, default, default)])  # the default won this time
    places = json.loads(results.tuning_file().read_text())["places"]
    assert places[results.place_key(has, backend.tier)] == {}
    assert places[results.place_key(other, backend.tier)] == {case.key: results.as_entry(best)}


@pytest.mark.parametrize("failing", ["wrong", "raising"])
def test_candidates_that_fail_are_refused_and_named(new_backend, monkeypatch, failing):
    run = tuning.Case.run

    def failing_run(case, configuration):
        if configuration.splits != 4:
            return run(case, configuration)
        if failing == "raising":
            raise MarlinError("no such kernel")
        seconds, output = run(case, configuration)
        output[0, 3] += 1
        return seconds / 100, output

    monkeypatch.setattr(tuning.Case, "run", failing_run)
    (result,) = tuning.tune(new_backend(), SHAPE, (1,))
    if result.default.splits == 4:
        pytest.skip("splits of 4 are the default here")
    assert result.refused
    for configuration, reason in result.refused:
        assert configuration.splits == 4
        assert ("no such kernel" if failing == "raising" else "its result is wrong") in reason
    assert result.best.splits != 4


def test_a_kernel_that_does_not_compile_is_refused(new_backend, monkeypatch):
    candidates = tuning.candidates

    def with_a_broken_one(tier, problem):
        good = candidates(tier, problem)[0]
        return [good, replace(good, macros=(*good.macros, ("K_WAVES", "(")))]

    monkeypatch.setattr(tuning, "candidates", with_a_broken_one)
    (result,) = tuning.tune(new_backend(), SHAPE, (1,))
    assert result.best == result.default
    assert "does not run: gemm_portable.cl does not build" in result.refused[0][1]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"schema": 0, "places": {}}', '{"schema": 1, "places": []}', "\0\1", "[" * 100000],
)
def test_a_damaged_file_is_left_out_and_rewritten(new_backend, planned, rng, content):
    path = results.tuning_file()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    backend = new_backend()
    with pytest.warns(RuntimeWarning, match="is damaged") as warned:
        _, _, error = planned(backend)
        planned(backend)
    assert len(warned) == 1  # a backend reads the file once
    assert error < 1e-6
    with pytest.warns(RuntimeWarning, match="is damaged"):
        results.keep(backend.runtime.capabilities, backend.tier, [])
    assert json.loads(path.read_text()) == {
        "schema": 1,
        "places": {results.place_key(backend.runtime.capabilities, backend.tier): {}},
    }
    plant(new_backend(), rng)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "change",
    [
        lambda entry: None,
        lambda entry: [],
        lambda entry: {},
        lambda entry: entry | {"more": 1},
        lambda entry: entry | {"rows": "8"},
        lambda entry: entry | {"rows": 0},
        lambda entry: entry | {"rows": True},
        lambda entry: entry | {"columns": -16},
        lambda entry: entry | {"splits": 3},
        lambda entry: entry | {"macros": {}},
        lambda entry: entry | {"macros": [["ROWS", 8]]},
        lambda entry: entry | {"macros": entry["macros"] | {"K_WAVES": "1 -DEVIL"}},
        lambda entry: entry | {"file": "gemm_abacus"},
        lambda entry: entry | {"local_size": 1 << 20},
        lambda entry: entry | {"local_bytes": 1 << 40},
    ],
)
def test_an_entry_that_cannot_run_is_left_out(new_backend, planned, rng, change):
    planted = plant(new_backend(), rng)
    rewrite(change)
    if change(results.as_entry(planted)) is None:  # as if it were not there
        used, _, error = planned(new_backend())
    else:
        with pytest.warns(RuntimeWarning, match="the tier's own choice is used"):
            used, _, error = planned(new_backend())
    assert used != planted
    assert error < 1e-6


def test_entries_of_a_place_that_are_no_object(new_backend, planned, rng):
    planted = plant(new_backend(), rng)
    path = results.tuning_file()
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"places": dict.fromkeys(document["places"], 7)}))
    assert planned(new_backend())[0] != planted


def test_splits_that_are_too_many_for_a_neighbour_are_left_out(new_backend, rng):
    backend = new_backend()
    planted = plant(backend, rng)
    case, _ = product(backend, rng)
    tuned = new_backend().runtime.tuned
    assert tuned.configurations(backend.tier, case.problem, True, "uint4")[0] == planted
    many = case.problem._replace(most_runs=1 << 20)
    assert tuned.configurations(backend.tier, many, True, "uint4")[0] == replace(planted, splits=1)


def test_problem_of_the_tuner_is_the_products(new_backend, planned, rng, monkeypatch):
    backend = new_backend()
    case, _ = product(backend, rng)
    seen = []
    monkeypatch.setattr(
        "marlin_cy.opencl.gemm.multiply.problem_of", lambda *given: seen.append(problem_of(*given)) or seen[-1]
    )
    planned(backend)
    # The first is the product's own; a check of its configuration, at first use, may have followed.
    assert results.product_key(seen[0], True, "uint4") == case.key


# Where the driver has no cache of its own, that of compiled programs warns as well.
@pytest.mark.filterwarnings("ignore:compiled OpenCL programs:RuntimeWarning")
def test_a_folder_that_cannot_be_written(new_backend, tmp_path, monkeypatch, planned):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MARLIN_CY_CACHE_DIR", str(tmp_path / "file"))
    backend = get_backend("opencl", device=DEVICES[0], tier="portable")
    with pytest.raises(MarlinError, match="cannot be written .*; set MARLIN_CY_CACHE_DIR to a writeable folder"):
        results.keep(backend.runtime.capabilities, backend.tier, [])


def test_nowhere_to_keep_results(new_backend, monkeypatch, planned):
    backend = new_backend()
    monkeypatch.setenv("MARLIN_CY_CACHE_DIR", "")
    assert planned(get_backend("opencl", device=DEVICES[0], tier="portable"))[2] < 1e-6
    with pytest.raises(MarlinError, match="MARLIN_CY_CACHE_DIR is empty"):
        results.keep(backend.runtime.capabilities, backend.tier, [])


# The command ------------------------------------------------------------------------------------


def tune(*arguments):
    return cli.main(["tune", "--device", "0", "--tier", "portable", *arguments])


def test_command_on_a_shape(new_backend, capsys):
    assert tune("--shape", "512,16,2,128", "--shape", "64,24,2,32", "--tokens", "1", "--top-k", "1", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tier"] == "portable"
    assert report["file"] == str(results.tuning_file())
    assert [(result["k"], result["n"], result["group_size"]) for result in report["results"]] == [
        (512, 16, 128),
        (64, 24, 32),
    ]
    for result in report["results"]:
        assert 0 < result["best_us"] <= result["default_us"]
        assert result["refused"] == []
        assert result["configuration"]["rows"] >= 1
    assert json.loads(results.tuning_file().read_text())["places"]


def test_command_on_a_checkpoint(new_backend, capsys):
    assert tune(str(files("marlin_cy") / BUILT_IN), "--tokens", "1") == 0
    out = capsys.readouterr().out
    assert "256, 512, 8" in out
    assert "256, 256, 8" in out
    assert str(results.tuning_file()) in out


def test_stacks_of_a_checkpoint(tmp_path):
    """Each kind of stack once, with its own codes and scales."""
    write_widths(tmp_path / "model", "compressed-tensors", layers=3, group_size=32, checkpoint_format="gptq_v2")
    arguments = argparse.Namespace(shape=None, checkpoint=tmp_path / "model")
    gate_up, down = _shapes(arguments, CpuBackend())
    assert (gate_up.k, gate_up.n, gate_up.codes, gate_up.scales) == (64, 192, "uint4", "bfloat16")
    assert (down.k, down.n, down.codes, down.scales, down.gathered) == (96, 64, "uint8", "bfloat16", True)
    assert gate_up.group_size == down.group_size == 32


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["somewhere", "--shape", "64,16,2,32"],
        ["--shape", "64,16,2"],
        ["--shape", "64,16,2,x"],
        ["--shape", "64,16,0,32"],
        ["--shape", "64,16,2,32", "--tokens", "0"],
        ["--shape", "64,16,2,32", "--top-k", "0"],
        ["--shape", "64,16,2,32", "--backend", "cpu"],
    ],
    ids=" ".join,
)
def test_command_refuses_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        tune(*arguments)
    assert stop.value.code == 2
    assert "usage: marlin-cy tune" in capsys.readouterr().err


def test_command_says_what_is_wrong_with_a_shape(new_backend, capsys):
    assert tune("--shape", "33,16,2,32") == 1
    assert "--shape: k: got 33" in capsys.readouterr().err


def test_command_refuses_to_measure_what_it_cannot_keep(new_backend, capsys, monkeypatch):
    monkeypatch.setenv("MARLIN_CY_CACHE_DIR", "")
    monkeypatch.setattr(tuning, "tune", lambda *arguments: pytest.fail("measured"))
    assert tune("--shape", "64,16,2,32") == 1
    assert "results cannot be kept" in capsys.readouterr().err
