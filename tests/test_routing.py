"""All kinds of routing: backends compared with ``reference.route``, and that function with transformers' routers."""

import importlib

import ml_dtypes
import numpy as np
import pytest
from asserts import assert_close, assert_same_bits, unit_roundoff
from problems import DTYPES, as_given

import marlin_cy
from marlin_cy import Routing, reference
from marlin_cy.moe.routing import GROUP_SCORES, SCORINGS

FLOAT32 = unit_roundoff(np.float32)
# (experts, groups, groups to choose from): one group, all groups, groups of one expert, of two, of many.
SIZES = [(1, 1, 1), (7, 1, 1), (60, 1, 1), (12, 3, 3), (12, 12, 5), (24, 12, 5), (64, 8, 3), (96, 2, 1)]


class NoWeights:
    """The attributes of a stack that routing uses."""

    def __init__(self, num_experts, k, n_per_expert):
        self.num_experts, self.k, self.n_per_expert = num_experts, k, n_per_expert


SELECTED = tuple(scoring for scoring in SCORINGS if scoring != "sparsemixer")
"""The scorings that may have a correction bias and groups."""


def layer_of(routing):
    """A layer that routes by ``routing``, and can do no more."""
    sizes = {name: value for name, value in vars(routing).items() if name not in ("num_experts", "top_k")}
    experts = routing.num_experts
    return marlin_cy.MoeLayer(NoWeights(experts, 32, 64), NoWeights(experts, 32, 32), top_k=routing.top_k, **sizes)


def route(backend, routing, logits, **options):
    """``(ids, weights)`` on the host."""
    result = layer_of(routing).route(backend.new_context(**options), backend.from_host(logits))
    ids, weights = map(backend.to_host, result)
    assert (ids.dtype, weights.dtype) == (np.int32, np.float32)
    assert ids.shape == weights.shape == (len(logits), routing.top_k)
    return ids, weights


def spread(logits):
    """Largest minus smallest logit of each row: the range in which a softmax rounds before its exponential."""
    return (logits.max(axis=1) - logits.min(axis=1)).astype(np.float64)


def score_error(logits, routing):
    """Per row, how far a score may be off, relative to it, in float32.

    The exponential is good to 4 roundoffs, what is added and divided by to 2 more; a softmax rounds differences
    of logits, which are exponents, and as many sums as there are experts.
    """
    error = {
        "softmax": 8 + routing.num_experts + spread(logits),
        "softmax_topk": 0,
        "sigmoid": 8,
        "sqrt_softplus": 8,
    }[routing.scoring]
    return np.broadcast_to(FLOAT32 * error, len(logits))


def decided(logits, routing):
    """Rows whose experts do not depend on rounding in float32: scores are equal or far apart."""
    bias = 0 if routing.correction_bias is None else np.abs(routing.correction_bias.astype(np.float64))
    rows = []
    for row, error in zip(logits.astype(np.float64), score_error(logits, routing), strict=True):
        scores, choice = reference.routing_scores(row, routing)
        slack = error * np.abs(scores) + 2 * FLOAT32 * (np.abs(scores) + bias) * (routing.correction_bias is not None)
        groups = reference.group_scores(choice, routing)
        group_slack = np.full(len(groups), 2 * slack.max() + 2 * FLOAT32 * np.abs(groups).max())
        groups_far_apart = far_apart(groups, group_slack)
        if routing.group_score == "top2_sum" and routing.scoring != "softmax_topk":  # sums of logits are exact here
            groups_far_apart = groups_far_apart and alike_where_equal(choice, groups)
        rows.append(far_apart(choice, slack) and (routing.num_groups == 1 or groups_far_apart))
    return np.array(rows, bool)


def alike_where_equal(choice, groups):
    """Whether groups that are worth the same have the same best two: other sums are rounded differently."""
    order = np.argsort(groups)
    best_two = np.sort(choice.reshape(len(groups), -1), axis=1)[order][:, -2:]
    equal = groups[order][1:] == groups[order][:-1]
    return bool((best_two[1:] == best_two[:-1])[equal].all())


def far_apart(values, slack):
    """Whether neighbouring values are equal, or further apart than their slacks."""
    order = np.argsort(values)
    gaps, slack = np.diff(values[order]), slack[order]
    return bool(((gaps == 0) | (gaps > slack[1:] + slack[:-1])).all())


def check(result, logits, routing):
    """Experts exactly, weights within a bound, of the rows that float32 can decide; which must be many."""
    logits = as_given(logits)
    ids, weights = result
    clear = decided(logits, routing)
    assert clear.mean() > 0.2
    expected_ids, expected_weights = reference.route(logits, routing)
    np.testing.assert_array_equal(ids[clear], expected_ids[clear])
    # And the sum over chosen ones, the division by it and the scaling.
    error = score_error(logits, routing) + FLOAT32 * (routing.top_k + 8)
    if routing.scoring == "softmax_topk":
        error = error + FLOAT32 * spread(logits)
    bound = error[:, None] * np.abs(expected_weights) + 2.0**-120
    assert_close(weights[clear], expected_weights[clear], bound[clear])


def kinds(rng, experts, groups, topk_groups, scoring, group_score):
    """Routings of these sizes: any number of experts, with and without bias, normalisation and factor."""
    most = experts // groups * topk_groups
    sizes = {"scoring": scoring, "num_groups": groups, "topk_groups": topk_groups, "group_score": group_score}
    for top_k in sorted({1, (most + 1) // 2, most}):
        for normalise in (True, False):
            yield Routing(experts, top_k, norm_topk_prob=normalise, **sizes)
        bias = rng.standard_normal(experts).astype(np.float32)
        yield Routing(experts, top_k, correction_bias=bias, routed_scaling_factor=2.5, **sizes)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("scoring", SELECTED)
@pytest.mark.parametrize(
    ("size", "group_score"),
    [(size, score) for size in SIZES for score in GROUP_SCORES if score == "max" or size[0] >= 2 * size[1] > 2],
)
def test_matches_the_reference(backend, rng, size, group_score, scoring):
    for routing in kinds(rng, *size, scoring, group_score):
        logits = (2 * rng.standard_normal((20, routing.num_experts))).astype(np.float32)
        check(route(backend, routing, logits), logits, routing)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scoring", SELECTED)
def test_dtypes(backend, rng, scoring, dtype, normalise):
    for experts in (1, 7, 16, 60):
        logits = (rng.permuted(np.tile(np.arange(experts), (20, 1)), axis=1) / 8 - 2).astype(DTYPES[dtype])
        for top_k in sorted({1, (experts + 1) // 2, experts}):
            routing = Routing(experts, top_k, scoring=scoring, norm_topk_prob=normalise)
            check(route(backend, routing, logits), logits, routing)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("scoring", SELECTED)
def test_many_experts_and_tokens(backend, rng, scoring):
    """As DeepSeek-V3 and Qwen3 have them; more tokens than threads or work-groups take at once."""
    logits = (2 * rng.standard_normal((300, 256))).astype(np.float32)
    for sizes in ({}, {"num_groups": 8, "topk_groups": 4}):
        routing = Routing(256, 8, scoring=scoring, **sizes)
        check(route(backend, routing, logits), logits, routing)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("scoring", SELECTED)
@pytest.mark.parametrize("sizes", [(1, 1, "max"), (8, 3, "max"), (8, 3, "top2_sum")])
def test_of_equal_ones_the_smaller_index(backend, rng, sizes, scoring):
    """Experts and groups, equal before and after a bias."""
    groups, topk_groups, group_score = sizes
    for bias in (None, rng.integers(0, 2, 24) / 4):
        routing = Routing(
            24,
            6,
            scoring=scoring,
            correction_bias=bias,
            num_groups=groups,
            topk_groups=topk_groups,
            group_score=group_score,
        )
        logits = rng.integers(0, 3, (50, 24)).astype(np.float32)
        logits[0] = 0
        ids, weights = route(backend, routing, logits)
        check((ids, weights), logits, routing)
        if bias is None:
            assert ids[0].tolist() == [0, 1, 2, 3, 4, 5]
            assert (weights[0] == weights[0, 0]).all()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrt_softplus"])
def test_expert_scale(backend, rng, scoring):
    """Weights alone are scaled, after everything else."""
    logits = (2 * rng.standard_normal((30, 16))).astype(np.float32)
    scale = rng.uniform(-2, 2, 16).astype(np.float32)
    plain = route(backend, Routing(16, 5, scoring=scoring, routed_scaling_factor=1.5), logits)
    scaled = Routing(16, 5, scoring=scoring, routed_scaling_factor=1.5, expert_scale=scale)
    ids, weights = route(backend, scaled, logits)
    np.testing.assert_array_equal(ids, plain[0])
    np.testing.assert_array_equal(weights, plain[1] * scale[ids])
    assert_close(weights, reference.route(logits, scaled)[1], 1e-5)


@pytest.mark.parametrize("jitter", [0.01, 0.25, 2.0])
def test_sparsemixer(backend, rng, jitter):
    """Each weight is a softmax over the experts that were not selected before, and are near."""
    routing = Routing(24, 3, scoring="sparsemixer", mixer_jitter=jitter, routed_scaling_factor=0.5)
    # Multiples of 1/8: float32 has the distances exactly, and they are not at the limit.
    logits = (rng.integers(-16, 17, (60, 24)) / 8).astype(np.float32)
    ids, weights = route(backend, routing, logits)
    expected_ids, expected_weights = reference.route(logits, routing)
    np.testing.assert_array_equal(ids, expected_ids)
    rows, column = logits.astype(np.float64), 0
    most = rows.max(axis=1, keepdims=True)
    limit = 2 * jitter * np.maximum(np.abs(rows), most)
    clear = (np.abs(most - rows - limit) > 1e-5 * limit).all(axis=1) & (np.diff(np.sort(rows), axis=1)[:, -3:] > 0).all(
        1
    )
    assert clear.sum() > 3
    assert_close(weights[clear, column], expected_weights[clear, column], 1e-6)
    far = np.abs(weights - expected_weights).max(axis=1) > 1e-6
    assert far.mean() < 0.2, "beyond what rounding of the limit explains"


class TestByHand:
    """Small cases worked out without the reference."""

    def test_softmax(self, backend):
        logits = np.log(np.array([[1, 2, 4, 1], [6, 1, 1, 8]], np.float32))
        ids, weights = route(backend, Routing(4, 2), logits)
        assert ids.tolist() == [[2, 1], [3, 0]]
        assert_close(weights, [[4 / 6, 2 / 6], [8 / 14, 6 / 14]], 1e-6)
        ids, weights = route(backend, Routing(4, 2, norm_topk_prob=False, routed_scaling_factor=16), logits)
        assert ids.tolist() == [[2, 1], [3, 0]]
        assert_close(weights, [[8, 4], [8, 6]], 1e-5)

    def test_softmax_topk(self, backend):
        logits = np.log(np.array([[1, 2, 4, 1]], np.float32)) + 30
        for normalise in (True, False):
            routing = Routing(4, 2, scoring="softmax_topk", norm_topk_prob=normalise, routed_scaling_factor=-3)
            ids, weights = route(backend, routing, logits)
            assert ids.tolist() == [[2, 1]]
            assert_close(weights, [[-2, -1]], 1e-5)

    def test_groups_and_bias(self, backend):
        """Six experts in three groups. Scores 0.5 and 0.75; a bias that decides, and does not get into weights."""
        logits = np.log(np.array([[1, 1, 3, 1, 3, 1]], np.float32))
        bias = [0, 0.5, 0, 0.125, -9, 0.625]  # c = 0.5 1 | 0.75 0.625 | -8.25 1.125
        sizes = {"scoring": "sigmoid", "correction_bias": bias, "num_groups": 3, "norm_topk_prob": False}
        for group_score, topk_groups, expected in (
            ("max", 1, [5, 4]),
            ("max", 2, [5, 1]),
            ("top2_sum", 1, [1, 0]),  # 1.5, 1.375 and -7.125
            ("top2_sum", 2, [1, 2]),
            ("max", 3, [5, 1]),
        ):
            routing = Routing(6, 2, topk_groups=topk_groups, group_score=group_score, **sizes)
            ids, weights = route(backend, routing, logits)
            assert ids.tolist() == [expected]
            assert_close(weights, np.array([[0.5, 0.5, 0.75, 0.5, 0.75, 0.5]])[:, expected], 1e-6)

    def test_scores_below_zero(self, backend):
        """A selected expert is not selected again, even if all other scores are low."""
        bias = -np.arange(1, 6, dtype=np.float32) * 1e30
        for scoring in SELECTED:
            ids, weights = route(backend, Routing(5, 5, scoring=scoring, correction_bias=bias), np.zeros((3, 5), "f4"))
            assert ids.tolist() == [[0, 1, 2, 3, 4]] * 3
            assert_close(weights, np.full((3, 5), 0.2), 1e-6)

    def test_nothing_to_normalise(self, backend):
        """Sigmoids of 0: the constant that is added to their sum prevents weights of NaN."""
        logits = np.array([[-200, -300, -1, -250]], np.float32)
        routing = Routing(4, 2, scoring="sigmoid", correction_bias=[5.0, 5.0, 0.0, 0.0])
        ids, weights = route(backend, routing, logits)
        assert ids.tolist() == [[0, 1]]
        assert (weights == 0).all()


class TestExtremes:
    def test_extreme_logits(self, backend):
        logits = np.array([[3e38, -3e38, 0, 1], [-np.inf, 0, -np.inf, -1], [-1e30, -1e30, -1e30, -1e30]], np.float32)
        expected = {
            "softmax": ([[0, 1], [1, 3], [0, 1]], [[1, 0], [0.7310586, 0.2689414], [0.5, 0.5]]),
            "softmax_topk": ([[0, 3], [1, 3], [0, 1]], [[1, 0], [0.7310586, 0.2689414], [0.5, 0.5]]),
            "sigmoid": ([[0, 3], [1, 3], [0, 1]], [[0.5776812, 0.4223188], [0.6502446, 0.3497554], [0, 0]]),
        }
        for scoring, (ids, weights) in expected.items():
            actual = route(backend, Routing(4, 2, scoring=scoring), logits)
            assert actual[0].tolist() == ids
            assert_close(actual[1], weights, 1e-6)

    @pytest.mark.parametrize("scoring", SELECTED)
    @pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
    def test_some_experts_are_not_there(self, backend, rng, groups, scoring):
        """Logits of minus infinity among others, also so many that some must be selected."""
        routing = Routing(8, 4, scoring=scoring, num_groups=groups[0], topk_groups=groups[1])
        logits = rng.permuted(np.tile(np.arange(8, dtype=np.float32) / 4, (30, 1)), axis=1)
        for row in range(30):
            logits[row, rng.permutation(8)[: rng.integers(1, 8)]] = -np.inf
        ids, weights = route(backend, routing, logits)
        expected_ids, expected_weights = reference.route(logits, routing)
        np.testing.assert_array_equal(ids, expected_ids)
        assert_close(weights, expected_weights, 1e-6)

    @pytest.mark.sampled(16)
    @pytest.mark.parametrize("scoring", SELECTED)
    @pytest.mark.parametrize("groups", [(1, 1), (3, 2)])
    @pytest.mark.parametrize("bad", [[np.nan], [np.inf], [-np.nan, np.inf], [-np.inf] * 6, [-np.inf] * 5 + [np.nan]])
    def test_bad_logits(self, backend, rng, bad, groups, scoring):
        """Weights of NaN for the first experts; other tokens are not touched."""
        bias = rng.standard_normal(6)
        routing = Routing(6, 3, scoring=scoring, correction_bias=bias, num_groups=groups[0], topk_groups=groups[1])
        logits = rng.standard_normal((5, 6)).astype(np.float32)
        clean = route(backend, routing, logits)
        for place in range(7 - len(bad)):
            spoilt = logits.copy()
            spoilt[1, place : place + len(bad)] = bad
            ids, weights = route(backend, routing, spoilt)
            assert ids[1].tolist() == [0, 1, 2]
            assert np.isnan(weights[1]).all()
            for actual, right in zip((ids, weights), clean, strict=True):
                assert_same_bits(np.delete(actual, 1, axis=0), np.delete(right, 1, axis=0))
        np.testing.assert_array_equal(reference.route(spoilt, routing)[0], ids)

    def test_no_tokens(self, backend):
        for scoring in SCORINGS:
            ids, weights = route(backend, Routing(5, 2, scoring=scoring), np.empty((0, 5), np.float32))
            assert ids.shape == weights.shape == (0, 2)


@pytest.mark.parametrize("scoring", SELECTED)
def test_bits_do_not_depend_on_threads_batch_or_isa(cpu_backend, rng, isa, scoring):
    bias = rng.standard_normal(96).astype(np.float32) / 8
    routing = Routing(
        96, 7, scoring=scoring, correction_bias=bias, num_groups=8, topk_groups=3, routed_scaling_factor=2.5
    )
    logits = (4 * rng.standard_normal((50, 96))).astype(np.float32)
    expected = route(cpu_backend, routing, logits, num_threads=1, isa="generic")
    for threads in (1, 2, 5):
        for part in (slice(None), slice(3, 4), slice(7, 20)):
            actual = route(cpu_backend, routing, logits[part], num_threads=threads, isa=isa)
            for mine, right in zip(actual, expected, strict=True):
                assert_same_bits(mine, right[part])


class TestArguments:
    """The refusals and the attributes of ``Routing``."""

    @pytest.mark.parametrize(
        ("changes", "exception", "message"),
        [
            ({"num_experts": 0}, ValueError, "num_experts: got 0, expected at least 1"),
            ({"num_experts": -8}, ValueError, "num_experts: got -8, expected at least 1"),
            ({"num_experts": 8.0}, TypeError, "num_experts: got 8.0, expected an int"),
            ({"num_experts": None}, TypeError, "num_experts: got None, expected an int"),
            ({"num_experts": 2**70}, ValueError, "num_experts: got a number of 71 bits"),
            ({"top_k": 0}, ValueError, "top_k: got 0, expected 1 to 8, the number of experts"),
            ({"top_k": 9}, ValueError, "top_k: got 9, expected 1 to 8"),
            ({"top_k": True}, TypeError, "top_k: got True, expected an int"),
            ({"top_k": 5, "num_groups": 4, "topk_groups": 2}, ValueError, "top_k: got 5, expected at most 4, the"),
            ({"scoring": "tanh"}, ValueError, "scoring: got 'tanh', expected one of softmax, softmax_topk, sigmoid"),
            ({"scoring": None}, ValueError, "scoring: got None, expected one of"),
            ({"scoring": ["softmax"]}, ValueError, r"scoring: got \['softmax'\], expected one of"),
            ({"scoring": np.array("softmax")}, ValueError, "scoring: got array"),
            ({"group_score": "sum"}, ValueError, "group_score: got 'sum', expected one of max, top2_sum"),
            ({"group_score": 2}, ValueError, "group_score: got 2, expected one of"),
            ({"num_groups": 0}, ValueError, "num_groups: got 0, expected a divisor of 8 experts"),
            ({"num_groups": 3}, ValueError, "num_groups: got 3, expected a divisor of 8 experts"),
            ({"num_groups": 16}, ValueError, "num_groups: got 16, expected a divisor"),
            ({"num_groups": -4}, ValueError, "num_groups: got -4, expected a divisor"),
            ({"num_groups": "4"}, TypeError, "num_groups: got '4', expected an int"),
            ({"num_groups": 8, "topk_groups": 4, "group_score": "top2_sum"}, ValueError, "num_groups: got 8"),
            ({"topk_groups": 0}, ValueError, "topk_groups: got 0, expected 1 to 1, the number of groups"),
            ({"topk_groups": 2}, ValueError, "topk_groups: got 2, expected 1 to 1"),
            ({"num_groups": 4, "topk_groups": 5}, ValueError, "topk_groups: got 5, expected 1 to 4"),
            ({"topk_groups": 1.0}, TypeError, "topk_groups: got 1.0, expected an int"),
            ({"norm_topk_prob": None}, TypeError, "norm_topk_prob: got None, expected a bool"),
            ({"norm_topk_prob": 1}, TypeError, "norm_topk_prob: got 1, expected a bool"),
            ({"norm_topk_prob": "no"}, TypeError, "norm_topk_prob: got 'no', expected a bool"),
            ({"routed_scaling_factor": None}, TypeError, "routed_scaling_factor: got None, expected a number"),
            ({"routed_scaling_factor": "2.5"}, TypeError, "routed_scaling_factor: got '2.5', expected a number"),
            ({"routed_scaling_factor": True}, TypeError, "routed_scaling_factor: got True, expected a number"),
            ({"routed_scaling_factor": 1j}, TypeError, "routed_scaling_factor: got 1j, expected a number"),
            ({"routed_scaling_factor": [1.0]}, TypeError, r"routed_scaling_factor: got \[1.0\], expected a number"),
            ({"routed_scaling_factor": np.nan}, ValueError, "routed_scaling_factor: got nan, expected a finite"),
            ({"routed_scaling_factor": -np.inf}, ValueError, "routed_scaling_factor: got -inf, expected a finite"),
            ({"routed_scaling_factor": 1e39}, ValueError, r"routed_scaling_factor: got 1e\+39, expected a finite"),
            ({"routed_scaling_factor": 10**400}, ValueError, "routed_scaling_factor: got 1000"),
            ({"correction_bias": np.zeros(7)}, ValueError, r"correction_bias: got shape \(7,\), expected \(8,\)"),
            ({"correction_bias": np.zeros((1, 8))}, ValueError, r"correction_bias: got shape \(1, 8\)"),
            ({"correction_bias": 0.0}, ValueError, r"correction_bias: got shape \(\)"),
            ({"correction_bias": [[0.0], [0.0, 1.0]]}, ValueError, "correction_bias: got list"),
            ({"correction_bias": np.zeros(8, int)}, TypeError, "correction_bias: got dtype int64, expected float32"),
            ({"correction_bias": np.zeros(8, ">f4")}, TypeError, "correction_bias: got dtype >f4"),
            ({"correction_bias": np.zeros(8, object)}, TypeError, "correction_bias: got dtype object"),
            ({"correction_bias": "bias"}, TypeError, "correction_bias: got dtype <U4"),
            ({"correction_bias": [0.0] * 7 + [np.nan]}, ValueError, r"correction_bias: got nan at \[7\]"),
            ({"correction_bias": [0.0, -np.inf] + [0.0] * 6}, ValueError, r"correction_bias: got -inf at \[1\]"),
            ({"correction_bias": [1e39] * 8}, ValueError, r"correction_bias: got 1e\+39 at \[0\]"),
        ],
    )
    def test_refused(self, changes, exception, message):
        right = {"num_experts": 8, "top_k": 2}
        with pytest.raises(exception, match=f"^{message}"):
            Routing(**{**right, **changes})
        if "num_experts" not in changes:
            with pytest.raises(exception, match=f"^{message}"):
                marlin_cy.MoeLayer(NoWeights(8, 32, 64), NoWeights(8, 32, 32), **{"top_k": 2, **changes})

    def test_no_such_argument(self):
        with pytest.raises(TypeError, match="topk_group"):
            marlin_cy.MoeLayer(NoWeights(8, 32, 64), NoWeights(8, 32, 32), top_k=2, topk_group=1)

    @pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
    def test_the_bias_is_copied(self, dtype):
        bias = np.arange(4).astype(dtype)
        routing = Routing(4, 2, correction_bias=bias)
        bias[:] = 9
        assert routing.correction_bias.dtype == np.float32
        assert routing.correction_bias.tolist() == [0, 1, 2, 3]
        with pytest.raises(ValueError, match="read-only"):
            routing.correction_bias[0] = 1

    def test_numbers_of_any_kind(self):
        routing = Routing(np.int64(8), np.int32(2), norm_topk_prob=np.bool_(False), routed_scaling_factor=np.float32(2))
        assert (routing.num_experts, routing.top_k) == (8, 2)
        assert (routing.norm_topk_prob, routing.routed_scaling_factor) == (False, 2.0)


GROUPED = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "n_routed_experts": 16}
V3 = {"scoring": "sigmoid", "num_groups": 4, "topk_groups": 2, "group_score": "top2_sum", "routed_scaling_factor": 2.5}
NOT_NORMALISED = {"norm_topk_prob": False}
# Module, router, configuration, its options, and the routing that they mean.
ROUTERS = {
    "mixtral": ("mixtral", "MixtralTopKRouter", "MixtralConfig", {"num_local_experts": 16}, {}),
    "qwen2": ("qwen2_moe", "Qwen2MoeTopKRouter", "Qwen2MoeConfig", NOT_NORMALISED, NOT_NORMALISED),
    "qwen3": ("qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeConfig", {"norm_topk_prob": True}, {}),
    "qwen3.5": ("qwen3_5_moe", "Qwen3_5MoeTopKRouter", "Qwen3_5MoeTextConfig", {}, {}),
    "gpt-oss": ("gpt_oss", "GptOssTopKRouter", "GptOssConfig", {"num_local_experts": 16}, {"scoring": "softmax_topk"}),
    "deepseek-v2-lite": (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        "DeepseekV2Config",
        {**GROUPED, "topk_method": "greedy"},
        {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    ),
    "deepseek-v2": (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        "DeepseekV2Config",
        {**GROUPED, "topk_method": "group_limited_greedy"},
        {"norm_topk_prob": False, "num_groups": 4, "topk_groups": 2, "routed_scaling_factor": 2.5},
    ),
    "deepseek-v3": ("deepseek_v3", "DeepseekV3TopkRouter", "DeepseekV3Config", {**GROUPED, "norm_topk_prob": True}, V3),
    "deepseek-v3-not-normalised": (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        "DeepseekV3Config",
        {**GROUPED, "norm_topk_prob": False},
        {**V3, "norm_topk_prob": False},
    ),
    "glm-4.5": ("glm4_moe", "Glm4MoeTopkRouter", "Glm4MoeConfig", {**GROUPED, "norm_topk_prob": True}, V3),
    "dots1": ("dots1", "Dots1TopkRouter", "Dots1Config", {**GROUPED, "norm_topk_prob": True}, V3),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_the_reference_is_what_transformers_does(rng, name):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    folder, router_name, config_name, options, expected = ROUTERS[name]
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    config_module = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
    sizes = {"num_experts": 16, "num_experts_per_tok": 3, "hidden_size": 16, "num_attention_heads": 4, **options}
    router = getattr(module, router_name)(getattr(config_module, config_name)(**sizes))
    bias = None
    with torch.no_grad():
        router.weight.copy_(torch.eye(16))  # hidden states are logits
        if getattr(router, "bias", None) is not None:
            router.bias.zero_()
        if hasattr(router, "e_score_correction_bias"):
            bias = rng.standard_normal(16).astype(np.float32)
            router.e_score_correction_bias.copy_(torch.from_numpy(bias))
        logits = (2 * rng.standard_normal((200, 16))).astype(np.float32)
        _, weights, ids = (tensor.numpy() for tensor in router(torch.from_numpy(logits)))
    routing = Routing(16, 3, correction_bias=bias, **expected)
    order = np.argsort(ids, axis=1)  # some are not sorted there
    ids, weights = np.take_along_axis(ids, order, 1), np.take_along_axis(weights, order, 1)
    expected_ids, expected_weights = reference.route(logits, routing)
    order = np.argsort(expected_ids, axis=1)
    clear = decided(logits, routing)
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(ids[clear], np.take_along_axis(expected_ids, order, 1)[clear])
    expected_weights = np.take_along_axis(expected_weights, order, 1)
    assert_close(weights[clear], expected_weights[clear], 1e-5 * expected_weights[clear])


def test_the_reference_is_what_llama4_does(rng):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4Router

    router = Llama4Router(Llama4TextConfig(hidden_size=16, num_local_experts=16, num_experts_per_tok=1))
    logits = (2 * rng.standard_normal((200, 16))).astype(np.float32)
    with torch.no_grad():
        router.weight.copy_(torch.eye(16))
        scores = router(torch.from_numpy(logits))[0].numpy()
    routing = Routing(16, 1, scoring="sigmoid", norm_topk_prob=False)
    ids, weights = reference.route(logits, routing)
    assert (np.count_nonzero(scores, axis=1) == 1).all()
    np.testing.assert_array_equal(np.argmax(scores, axis=1), ids[:, 0])
    assert_close(scores.max(axis=1), weights[:, 0], 1e-6)
