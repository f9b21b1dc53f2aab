"""Configurations are checked at their first use: wrong ones, as drivers make them, never give a caller numbers.

A driver's fault is put into the kernels' source, where a configuration's own macro ``FAULT`` switches it on.
"""

import dataclasses
import warnings

import numpy as np
import pytest
from asserts import assert_close, product_bound
from conftest import DEVICE_LABELS
from layers import Layer
from problems import activations, random_problem

from marlin_cy import reference
from marlin_cy.errors import BuildError, DeviceError
from marlin_cy.moe.align import moe_align_block_size

cl = pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")
if DEVICE_LABELS == ["cpu"]:
    pytest.skip("no OpenCL device", allow_module_level=True)

from marlin_cy.opencl import program, selfcheck, tuned, tuning  # noqa: E402
from marlin_cy.opencl.backend import OpenClBackend  # noqa: E402
from marlin_cy.opencl.checks import products, verdicts  # noqa: E402
from marlin_cy.opencl.checks import routing as routing_checks  # noqa: E402

K, N, E, ROWS = 96, 24, 3, 6
STORE = "#define store_output JOIN(store_, OUTPUT_TYPE)\n"
FAULTS = f"""
#ifndef FAULT
#define FAULT 0
#endif
#if FAULT == 1  // wrong numbers in some columns
#define store_output(value, p, i) JOIN(store_, OUTPUT_TYPE)((i) % 8 < 5 ? (value) : 1.25f * (value), p, i)
#elif FAULT == 2  // outputs left unwritten
#define store_output(value, p, i) if ((i) % 8 < 7) JOIN(store_, OUTPUT_TYPE)(value, p, i)
#elif FAULT == 3  // does not compile
int broken = no_such_name;
#else
{STORE}
#endif
"""
WRONG, UNWRITTEN, BROKEN = 1, 2, 3


def with_text(monkeypatch, changes, files=None):
    """Change the kernels' sources: ``{text: its replacement}``, in some files or all."""
    right = program.source

    def source(file, *folder):
        text = right(file, *folder)
        if files is None or file in files:
            for before, after in changes.items():
                assert before in text
                text = text.replace(before, after)
        return text

    monkeypatch.setattr(program, "source", source)


@pytest.fixture
def new_backend(device_alone, shared_programs, tmp_path, monkeypatch):
    """A function that makes a backend with kernels that have faults, as a new process would."""
    with_text(monkeypatch, {STORE: FAULTS}, [file for file in program.kernel_files() if file.startswith("gemm")])
    monkeypatch.setenv("MARLIN_CY_CACHE_DIR", str(tmp_path / "cache"))

    def make():
        monkeypatch.setattr(verdicts, "_memories", {})
        return OpenClBackend(context=device_alone.context, device=device_alone.device, tier=device_alone.tier.name)

    return make


def faulty(configuration, fault):
    """Without splits of K: there outputs are written by another program, which does not know the macro."""
    return dataclasses.replace(configuration, splits=1, macros=(*configuration.macros, ("FAULT", fault)))


def offering(backend, change):
    """A backend whose tier offers ``change(configurations)`` for each product."""
    own = backend.tier
    return backend._unchecked(
        dataclasses.replace(own, configurations=lambda problem: change(own.configurations(problem)))
    )


def faulty_first(backend, fault):
    return offering(backend, lambda offered: [faulty(offered[0], fault), *offered])


def batched(backend, problem, x, ctx=None):
    stack, ctx = problem.stack(backend), ctx or backend.new_context()
    out = backend.from_host(np.full((len(x), N), 7, np.float32))
    try:
        stack.gemm_phase_batched(ctx, backend.from_host(x), [(1, 0, 0, len(x))], out, K)
    except DeviceError:
        assert (backend.to_host(out) == 7).all()
        raise
    (plan,) = ctx.plans_of(stack.store).values()
    return backend.to_host(out), plan.configuration


def routed(backend, problem, x):
    stack, ctx = problem.stack(backend), backend.new_context()
    ids = np.ones((len(x), 1), np.int32)
    routing = map(backend.from_host, moe_align_block_size(ids, 4, E))
    out = backend.empty((len(x), N), np.float32)
    stack.gemm_phase_vllm(ctx, backend.from_host(x), *routing, out, len(x), 4, 1)
    (plan,) = ctx.plans_of(stack.store).values()
    return backend.to_host(out), plan.configuration


def linear(backend, problem, x):
    stack, ctx = problem.stack(backend), backend.new_context()
    out = backend.empty((len(x), N), np.float32)
    stack.make_expert_linear(N, N).forward(ctx, backend.from_host(x), out, len(x))
    (plan,) = ctx.plans_of(stack.store).values()
    return backend.to_host(out), plan.configuration


CALLS = {"batched": batched, "routed": routed, "linear": linear}


def has_fault(configuration):
    return dict(configuration.macros).get("FAULT", 0) != 0


@pytest.mark.sampled(1)
@pytest.mark.parametrize("fault", [WRONG, UNWRITTEN, BROKEN], ids=["wrong", "unwritten", "broken"])
@pytest.mark.parametrize("call", CALLS)
def test_the_next_configuration_is_used(new_backend, rng, call, fault):
    backend = faulty_first(new_backend(), fault)
    problem, x = random_problem(rng, E, K, N, 32), activations(rng, ROWS, K)
    what = "does not compile" if fault == BROKEN else "results are wrong"
    with pytest.warns(RuntimeWarning, match=f"'FAULT', {fault}.* is not used: .*{what}"):
        result, used = CALLS[call](backend, problem, x)
    assert not has_fault(used)
    assert_close(result, x.astype(np.float64) @ problem.dense(1), product_bound(backend, x, problem.dense(1)))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "kind",
    [
        {"g_idx": "common"},
        {"g_idx": "per_expert"},
        {"bias": True},
        {"sym": True},
        {"codes": "e2m1"},
    ],
    ids=["common order", "orders", "bias", "symmetric", "e2m1"],
)
@pytest.mark.parametrize("call", CALLS)
def test_right_configurations_of_all_kinds_pass(new_backend, rng, call, kind):
    """The check knows what each kind of product should give: it refuses none that is right."""
    backend = new_backend()
    problem, x = random_problem(rng, E, K, N, 32, **kind), activations(rng, ROWS, K)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, used = CALLS[call](backend, problem, x)
    assert not has_fault(used)


@pytest.mark.parametrize("fault", [WRONG, UNWRITTEN], ids=["wrong", "unwritten"])
def test_no_configuration_is_right(new_backend, rng, fault):
    backend = offering(new_backend(), lambda offered: [faulty(offered[0], fault)])
    problem, x, ctx = random_problem(rng, E, K, N, 32), activations(rng, ROWS, K), backend.new_context()
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"results are wrong"):
            batched(backend, problem, x, ctx)


def test_no_configuration_compiles(new_backend, rng):
    backend = offering(new_backend(), lambda offered: [faulty(offered[0], BROKEN)])
    with pytest.raises(BuildError, match="no_such_name"):
        batched(backend, random_problem(rng, E, K, N, 32), activations(rng, ROWS, K))


def test_splits_that_are_wrong_are_done_without(new_backend, rng, monkeypatch):
    """The sums of runs of K are added up by a kernel of their own."""
    reduce = "    store_output("
    with_text(monkeypatch, {reduce: "    if (get_group_id(0) != 1) store_output("}, ["reduce"])
    backend = offering(new_backend(), lambda offered: [dataclasses.replace(offered[0], splits=2)])
    problem, x = random_problem(rng, E, K, N, 32), activations(rng, ROWS, K)
    with pytest.warns(RuntimeWarning, match="splits=2.* is not used"):
        result, used = batched(backend, problem, x)
    assert used.splits == 1
    assert_close(result, x.astype(np.float64) @ problem.dense(1), product_bound(backend, x, problem.dense(1)))


class Counted:
    """How often products are checked."""

    def __init__(self, monkeypatch):
        self.kinds = []
        check = products.reason_wrong
        monkeypatch.setattr(products, "reason_wrong", lambda *args: self.kinds.append(args[1]) or check(*args))


def test_checked_once_and_remembered(new_backend, rng, monkeypatch):
    """For other calls, contexts, stacks and backends of a process; and, in the cache folder, for other processes."""
    counted, problem, x = Counted(monkeypatch), random_problem(rng, E, K, N, 32), activations(rng, ROWS, K)
    backend = new_backend()
    ctx = backend.new_context()
    for _ in range(3):
        batched(backend, problem, x)
    batched(backend, problem, x, ctx)
    batched(OpenClBackend(device=backend.device, tier=backend.tier.name), problem, x)
    assert len(counted.kinds) == 1
    batched(new_backend(), problem, x)
    assert len(counted.kinds) == 1
    batched(backend, problem, x.astype(np.float16))
    assert len(counted.kinds) == 2
    assert len(set(counted.kinds)) == 2


def test_a_wrong_one_is_remembered(new_backend, rng, monkeypatch):
    """Each process warns once, and checks no more."""
    problem, x = random_problem(rng, E, K, N, 32), activations(rng, ROWS, K)
    counted = Counted(monkeypatch)
    for _ in range(2):
        backend = faulty_first(new_backend(), WRONG)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(3):
                _, used = batched(backend, problem, x)
                assert not has_fault(used)
        assert len([one for one in said if one.category is RuntimeWarning]) == 1
    assert [has_fault(kind.configuration) for kind in counted.kinds] == [True, True, False]


@pytest.mark.parametrize("damage", [b"", b"{", b"\0\1\n[]\nnull\n", b'{"kind": 3, "wrong": null}\n'])
def test_a_damaged_file_is_ignored(new_backend, rng, monkeypatch, tmp_path, damage):
    problem, x = random_problem(rng, E, K, N, 32), activations(rng, ROWS, K)
    counted = Counted(monkeypatch)
    batched(new_backend(), problem, x)
    (file,) = (tmp_path / "cache" / "opencl").glob("*.checked")
    file.write_bytes(damage)
    batched(new_backend(), problem, x)
    assert len(counted.kinds) == 2
    batched(new_backend(), problem, x)
    assert len(counted.kinds) == 2


def test_verdicts_hold_for_a_device_driver_version_and_kernels(new_backend, monkeypatch):
    device = new_backend().device

    def name():
        return verdicts.Verdicts(device)._name

    names = [name(), name()]
    assert len(set(names)) == 1
    identity = program.device_identity(device)
    for index in range(len(identity)):
        other = (*identity[:index], "other", *identity[index + 1 :])
        with monkeypatch.context() as patch:
            patch.setattr(verdicts, "device_identity", lambda device, other=other: other)
            names.append(name())
    for attribute, value in (("__version__", "0"), ("sources_digest", lambda: "other")):
        with monkeypatch.context() as patch:
            patch.setattr(verdicts, attribute, value)
            names.append(name())
    assert len(set(names)) == len(names) - 1


def test_a_check_that_fails_is_no_verdict(new_backend, rng, monkeypatch):
    """A device that fails says nothing about its kernels."""
    problem, x, backend = random_problem(rng, E, K, N, 32), activations(rng, ROWS, K), new_backend()

    def fail(*args):
        raise DeviceError("lost")

    with monkeypatch.context() as patch:
        patch.setattr(products, "reason_wrong", fail)
        with pytest.raises(DeviceError, match="lost"):
            batched(backend, problem, x)
    assert not has_fault(batched(backend, problem, x)[1])


def test_an_unwritable_folder(new_backend, rng, monkeypatch, tmp_path):
    """Verdicts are kept in memory, and one warning says so."""
    (tmp_path / "file").write_text("")
    backend = new_backend()
    monkeypatch.setenv("MARLIN_CY_CACHE_DIR", str(tmp_path / "file"))
    counted, problem, x = Counted(monkeypatch), random_problem(rng, E, K, N, 32), activations(rng, ROWS, K)
    with pytest.warns(RuntimeWarning, match="cannot be written") as said:
        batched(backend, problem, x)
        batched(backend, problem, x.astype(np.float16))
        batched(backend, problem, x)
    assert len(said) == 1
    assert len(counted.kinds) == 2


class TestTuning:
    SHAPE = tuning.Shape(k=512, n=16, experts=2, group_size=128, top_k=1)

    @pytest.mark.parametrize("fault", [WRONG, UNWRITTEN], ids=["wrong", "unwritten"])
    @pytest.mark.sweep
    def test_a_wrong_candidate_is_refused(self, new_backend, monkeypatch, fault):
        candidates = tuning.candidates
        monkeypatch.setattr(
            tuning,
            "candidates",
            lambda tier, problem: [*candidates(tier, problem), faulty(candidates(tier, problem)[0], fault)],
        )
        (result,) = tuning.tune(new_backend(), self.SHAPE, (1,))
        ((configuration, reason),) = result.refused
        assert has_fault(configuration)
        assert "results are wrong" in reason
        assert not has_fault(result.best)

    def test_a_wrong_default_is_refused(self, new_backend):
        backend = faulty_first(new_backend(), WRONG)
        (result,) = tuning.tune(backend, self.SHAPE, (1,))
        assert not has_fault(result.default)
        assert not has_fault(result.best)
        assert [has_fault(configuration) for configuration, _ in result.refused] == [True]

    @pytest.mark.sweep
    def test_a_result_that_is_wrong_now_is_not_used(self, new_backend, rng):
        """A file of another machine, or of a driver that says the same of itself and is not."""
        backend = new_backend()
        own = backend.tier
        offered = dataclasses.replace(
            own,
            configurations=lambda problem: [*own.configurations(problem), faulty(own.configurations(problem)[0], 0)],
        )
        backend = backend._unchecked(offered)
        case = tuning.Case(backend, tuning.random_stack(backend, self.SHAPE, rng), self.SHAPE, 1, rng)
        default, *_ = own.configurations(case.problem)
        planted = tuning.Tuning(
            self.SHAPE, 1, case.problem.rows, case.key, 2e-5, 1e-5, default, faulty(default, WRONG), 1, []
        )
        tuned.keep(backend.runtime.capabilities, backend.tier, [planted])
        problem, x = random_problem(rng, 2, 512, 16, 128, sym=True), activations(rng, 1, 512)
        stack, ctx = problem.stack(backend), backend.new_context()
        routing = map(backend.from_host, moe_align_block_size(np.zeros((1, 1), np.int32), 1, 2))
        out = backend.empty((1, 16), np.float32)
        with pytest.warns(RuntimeWarning, match="'FAULT', 1.* is not used"):
            stack.gemm_phase_vllm(ctx, backend.from_host(x), *routing, out, 1, 1, 1)
        w = problem.dense(0)
        assert_close(backend.to_host(out), x.astype(np.float64) @ w, product_bound(backend, x, w))


class TestRoutingAndAlignment:
    """Checked in a layer, and by themselves."""

    def logits(self, backend, rng, tokens):
        return backend.from_host(activations(rng, tokens, 5))

    @pytest.mark.sampled(1)
    @pytest.mark.parametrize(
        "change",
        [
            {"ids[place] = e;": "if (e != 3) ids[place] = e;"},
            {"weights[j] = bad": "if (j != 1) weights[j] = bad"},
            {"PICKED_WEIGHT(j) / (normalise": "PICKED_WEIGHT(j) * 1.01f / (normalise"},
        ],
        ids=["ids unwritten", "weights unwritten", "weights wrong"],
    )
    def test_wrong_routing_is_an_error(self, new_backend, rng, monkeypatch, change):
        with_text(monkeypatch, change, ["routing", "route_align"])
        layer, backend = Layer(rng), new_backend()
        for _ in range(2):
            with pytest.raises(DeviceError, match=r"routing is wrong"):
                layer.on(backend).route(backend.new_context(), self.logits(backend, rng, 4))

    def test_right_routing_is_checked_once(self, new_backend, rng, monkeypatch):
        checked = []
        check = routing_checks.reason_wrong_route
        monkeypatch.setattr(routing_checks, "reason_wrong_route", lambda *args: checked.append(args) or check(*args))
        backend = new_backend()
        layer = Layer(rng).on(backend)
        for _ in range(3):
            layer.route(backend.new_context(), self.logits(backend, rng, 4))
        assert len(checked) == 1

    def layer_call(self, backend, rng, tokens=4, **kind):
        """The output of a layer, and the float64 reference, and a bound on their difference."""
        layer = Layer(rng, **kind)
        x, logits = activations(rng, tokens, 96), activations(rng, tokens, 5)
        on, ctx = layer.on(backend), backend.new_context()
        with ctx.profile() as events:
            out = on(ctx, backend.from_host(x), backend.from_host(logits))
        ids, weights = reference.route(logits, on.routing)
        expected = layer.expected(x, ids, weights)
        error = np.linalg.norm(backend.to_host(out) - expected) / np.linalg.norm(expected)
        return error, [label for label, _ in events]

    def test_a_right_layer_passes(self, new_backend, rng):
        for kind in ({}, {"g_idx": "common"}, {"g_idx": "per_expert"}, {"weigh_input": True}):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                error, _ = self.layer_call(new_backend(), rng, **kind)
            assert error < 1e-3

    def test_a_wrong_fused_launch_is_cut_up(self, new_backend, rng, monkeypatch):
        """Routing and aligning are launched one by one, and right."""
        backend = new_backend()
        if backend.runtime.capabilities.device_atomics is None:
            pytest.skip("this device does not route and align in one launch")
        change = {"expert_ids[first + block] = (int)e;": "expert_ids[first + block] = (int)e + 1;"}
        with_text(monkeypatch, change, ["route_align"])
        with pytest.warns(RuntimeWarning, match="the launch 'route, align' is not used: expert_ids are wrong"):
            error, labels = self.layer_call(backend, rng)
        assert error < 1e-3
        assert labels[:2] == ["route", "align"]

    def test_a_wrong_preparation_beside_is_cut_up(self, new_backend, rng, monkeypatch):
        """Where K has an order common to all experts, rows are prepared while pairs are aligned."""
        change = {"expert_ids[first + block] = (int)expert;": "expert_ids[first + block] = (int)expert + 1;"}
        with_text(monkeypatch, change, ["align_prepare"])
        layer, backend = Layer(rng, g_idx="common"), new_backend()
        x, ids = activations(rng, 40, 96), rng.permuted(np.tile(np.arange(5), (40, 1)), axis=1)[:, :2].astype(np.int32)
        weights = rng.random((40, 2)).astype(np.float32)
        with pytest.warns(RuntimeWarning, match="the launch 'align, prepare_rows' is not used: expert_ids are wrong"):
            out = layer.on(backend).forward_routed(backend.new_context(), backend.from_host(x), ids, weights)
        expected = layer.expected(x, ids, weights)
        assert np.linalg.norm(backend.to_host(out) - expected) < 1e-3 * np.linalg.norm(expected)

    @pytest.mark.parametrize("unwritten", [False, True], ids=["wrong", "unwritten"])
    def test_wrong_alignment_is_an_error(self, new_backend, rng, monkeypatch, unwritten):
        right = "expert_ids[first + block] = (int)expert;"
        change = {right: f"if (block) {right}" if unwritten else right.replace(";", " + 1;")}
        with_text(monkeypatch, change, ["align", "align_prepare"])
        layer, backend = Layer(rng), new_backend()
        x, ids = activations(rng, 40, 96), np.tile(np.arange(2, dtype=np.int32), (40, 1))
        weights = np.ones((40, 2), np.float32)
        out = backend.from_host(np.full((40, 96), 7, np.float32))
        with pytest.raises(DeviceError, match="grouping of tokens by expert is wrong .expert_ids are wrong"):
            layer.on(backend).forward_routed(backend.new_context(), backend.from_host(x), ids, weights, out=out)
        assert (backend.to_host(out) == 7).all()


class TestSums:
    """The kernels around a layer's products."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"fma((float4)(weight[i])": "fma((float4)(1.01f * weight[i])"}, "the sum of the experts' rows is wrong"),
            ({"store_output(sum.w, output, place + 3);": ""}, "the sum of the experts' rows is wrong"),
            ({"&& (uint)ids[j] < num_experts": ""}, "the sum of the experts' rows is wrong .*nan"),
            ({"vstore8(weight * ": "vstore8(1.01f * weight * "}, "the product of tokens and weights is wrong"),
            ({"1 / (1 + exp(": "0.99f / (1 + exp("}, "the factor of the shared expert is wrong"),
        ],
        ids=["wrong", "unwritten", "left out", "weighing", "factor"],
    )
    @pytest.mark.sampled(2)
    def test_a_wrong_kernel_is_an_error(self, new_backend, rng, monkeypatch, change, message):
        with_text(monkeypatch, change, ["moe"])
        backend = new_backend()
        layer = Layer(rng, weigh_input="tokens" in message, shared=32, gate=True).on(backend)
        x, logits = activations(rng, 4, 96), activations(rng, 4, 5)
        for _ in range(2):
            with pytest.raises(DeviceError, match=message):
                layer(backend.new_context(), backend.from_host(x), backend.from_host(logits))


def faults_of_runs(monkeypatch, wrong):
    """Make the runs of products' checks wrong by a list of bools; returns the list of the runs so far."""
    runs, right = [], products.relative_error

    def error(*args):
        runs.append(len(runs) < len(wrong) and wrong[len(runs)])
        return np.inf if runs[-1] else right(*args)

    monkeypatch.setattr(products, "relative_error", error)
    return runs


@pytest.mark.parametrize(
    ("wrong", "is_used"),
    [((True, False, False), True), ((True, True), False), ((True, False, True), False)],
    ids=["passes", "stays", "returns"],
)
def test_a_fault_is_confirmed_before_it_is_remembered(new_backend, rng, monkeypatch, wrong, is_used):
    """A fault in one run of the check condemns no configuration, neither now nor in later processes."""
    problem, x = random_problem(rng, E, K, N, 32), activations(rng, ROWS, K)
    runs = faults_of_runs(monkeypatch, wrong)
    for _ in range(2):
        backend = offering(new_backend(), lambda offered: offered[:1])
        if is_used:
            result, _ = batched(backend, problem, x)
            assert_close(result, x.astype(np.float64) @ problem.dense(1), product_bound(backend, x, problem.dense(1)))
        else:
            with pytest.raises(DeviceError, match="results are wrong"):
                batched(backend, problem, x)
        assert runs == list(wrong)


def test_a_tiers_fault_is_confirmed(new_backend, monkeypatch):
    """A device that fails once at its first use keeps its tier."""
    right, runs = selfcheck.relative_error, []
    monkeypatch.setattr(selfcheck, "_known", {})
    monkeypatch.setattr(
        selfcheck, "relative_error", lambda backend: runs.append(1) or (right(backend) + (len(runs) == 1))
    )
    assert selfcheck.reason_wrong(new_backend()) is None
    assert len(runs) == 3
