"""Which requests run, and what a step computes: ``marlin_cy.serve.scheduler``."""

import math
from array import array

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from fake_model import FakeModel, write_tokenizer  # noqa: E402
from served import FullModel, built_in, request_for, run, text_of, watched  # noqa: E402

from marlin_cy.decoder.generate import generate  # noqa: E402
from marlin_cy.decoder.load import load_model  # noqa: E402
from marlin_cy.decoder.program import PAGE_TOKENS  # noqa: E402
from marlin_cy.errors import DeviceError, MarlinError  # noqa: E402
from marlin_cy.serve.pace import FIRST, LEAST, MOST, Pace  # noqa: E402
from marlin_cy.serve.prefixes import MOST_KEPT, PrefixStore, common_length  # noqa: E402
from marlin_cy.serve.request import Request  # noqa: E402
from marlin_cy.serve.scheduler import QueueFull, Scheduler  # noqa: E402
from marlin_cy.serve.scores import scores_of  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    return write_tokenizer(tmp_path)


def scheduler_of(model, **options):
    """A scheduler whose steps take no time."""
    return Scheduler(model, **{"clock": lambda: 0.0, **options})


def alone(model, prompt, max_new_tokens=None, **sampling):
    """What such a model writes without a scheduler."""
    other = FakeModel(model.folder, context_length=model.context_length)
    pieces = list(generate(other, prompt, max_new_tokens=max_new_tokens, **sampling))
    return "".join(piece.text for piece in pieces), [t for piece in pieces for t in piece.tokens], pieces[-1][2]


PROMPTS = ["a", "b" * 40, "some words", "x" * 17, "b" * 30 + "c", "z" * 30]


@pytest.mark.parametrize("cache_tokens", [64, 100, 128, 1000])
@pytest.mark.parametrize("max_sequences", [1, 3, 16])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3, "frequency_penalty": 0.5, "stop": ["e"]}])
def test_texts_are_those_of_requests_alone(folder, cache_tokens, max_sequences, options):
    """With requests that wait, are put back, and begin alike."""
    model = FullModel(folder, cache_tokens=cache_tokens)
    expected = [alone(model, prompt, 20, **options) for prompt in PROMPTS]
    scheduler = scheduler_of(model, max_sequences=max_sequences)
    requests = [request_for(model, prompt, 20, **options) for prompt in PROMPTS]
    outputs = run(scheduler, {0: requests[:2], 2: requests[2:4], 5: requests[4:]})
    assert [text_of(outputs[request]) for request in requests] == expected
    assert max(map(len, model.calls)) <= max_sequences
    assert len(model.open) == scheduler.counts().kept
    scheduler.close()
    assert model.open == []


def test_a_text_without_a_limit_ends_with_the_context(folder):
    model = FullModel(folder)
    requests = [request_for(model, prompt) for prompt in PROMPTS]
    outputs = run(scheduler_of(model), {0: requests})
    for request, prompt in zip(requests, PROMPTS, strict=True):
        text = text_of(outputs[request])
        assert text == alone(model, prompt)
        assert text[2] in ("context", "stop")
    assert any(text_of(found)[2] == "context" for found in outputs.values())


def test_running_answers_go_on_while_a_prompt_is_read(folder):
    model = FullModel(folder, context_length=4096, cache_tokens=1 << 14)
    scheduler = scheduler_of(model, step_seconds=10)
    run(scheduler, {0: [request_for(model, "a", 8)], 2: [request_for(model, "b" * 2000, 2)]})
    assert model.calls == [[1], [1], [1, 256], [1, 512], [1, 1024], [1, 208], [1, 1], [1]]


def timed(model, seconds_a_token):
    """A clock that the calls of the model move."""
    now, forward = [0.0], model.forward_batch

    def move(pairs):
        pairs = list(pairs)
        now[0] += sum(len(tokens) for _, tokens in pairs) * seconds_a_token
        return forward(pairs)

    model.forward_batch = move
    return lambda: now[0]


def test_parts_of_prompts_fit_into_the_time(folder):
    """Steps beside a text that take long have smaller parts; the first request's prompt is read first."""
    model = FullModel(folder, context_length=4096, cache_tokens=1 << 14)
    scheduler = Scheduler(model, clock=timed(model, 0.01), step_seconds=0.5)
    prompts = [request_for(model, letter * 600, 1) for letter in "bc"]
    run(scheduler, {0: [request_for(model, "a", 60, stop_token_ids=[])], 1: prompts})
    assert model.calls[:5] == [[1], [1, 256], [1, LEAST], [1, LEAST], [1, 88, 40]]
    assert all(sum(call) <= LEAST + 1 for call in model.calls[2:])


def test_prompts_alone_have_large_parts(folder):
    """No text waits for them, however long they take."""
    model = FullModel(folder, context_length=4096, cache_tokens=1 << 14)
    scheduler = Scheduler(model, clock=timed(model, 1.0), step_seconds=0.5)
    run(scheduler, {0: [request_for(model, letter * 1500, 1) for letter in "ab"]})
    assert model.calls == [[1024], [476, 548], [952]]


def test_pace():
    pace = Pace(0.5)
    assert pace.most(beside_texts=False) == MOST
    assert pace.most(beside_texts=True) == FIRST
    pace.record(100, 0.01)
    assert pace.most(beside_texts=True) == FIRST, "a step with fewer tokens says nothing about more"
    for _ in range(5):
        pace.record(pace.most(beside_texts=True), 0.2)
    assert pace.most(beside_texts=True) == MOST
    pace.record(MOST, 0.4)
    assert pace.most(beside_texts=True) == MOST
    for _ in range(10):
        pace.record(MOST, 0.6)
    assert pace.most(beside_texts=True) == LEAST


# ---------------------------------------------------------------------------------------------
# The queue


def test_a_full_queue(folder):
    model = FullModel(folder)
    scheduler = scheduler_of(model, max_sequences=2, max_waiting=3)
    requests = [request_for(model, "a", 3) for _ in range(6)]
    scheduler.submit(requests[:4])
    with pytest.raises(QueueFull, match="got 2 requests, 4 of at most 5 have not ended"):
        scheduler.submit(requests[4:])
    scheduler.submit(requests[4:5])
    assert scheduler.counts()[:2] == (0, 5)
    scheduler.step()
    assert scheduler.counts()[:2] == (2, 3)
    with pytest.raises(QueueFull):
        scheduler.submit(requests[5:])
    run(scheduler)
    scheduler.submit(requests[5:])
    outputs = run(scheduler)
    assert text_of(outputs[requests[5]]) == alone(model, "a", 3)


def test_requests_begin_in_the_order_of_arrival(folder):
    model = FullModel(folder)
    scheduler = scheduler_of(model, max_sequences=1)
    requests = [request_for(model, prompt, 2) for prompt in ("a", "b", "c")]
    outputs = run(scheduler, {0: [requests[1]], 1: [requests[0], requests[2]]})
    assert list(outputs) == [requests[1], requests[0], requests[2]]


def test_a_request_that_is_put_back_is_the_latest(folder):
    """The others go on, and it continues where it was."""
    model = FullModel(folder, cache_tokens=96)
    scheduler = scheduler_of(model)
    requests = [request_for(model, letter * 10, 40) for letter in "abc"]
    lengths = {request: [] for request in requests}
    scheduler.submit(requests)
    while scheduler.open:
        for output in scheduler.step():
            lengths[output.request].append(scheduler.counts().put_back)
    assert scheduler.counts().put_back > 0
    assert [list(request.tokens[10:]) for request in requests] == [alone(model, x * 10, 40)[1][:-1] for x in "abc"]
    assert lengths[requests[0]][30] > 0, "the first request has put others back"
    assert [request.known for request in requests] == [0, 0, 0]


@pytest.mark.parametrize("moment", ["waiting", "reading", "writing"])
def test_a_request_that_is_cancelled(folder, moment):
    model = FullModel(folder, context_length=2048, cache_tokens=4096)
    scheduler = scheduler_of(model, max_sequences=1 if moment == "waiting" else 2)
    stays, leaves = request_for(model, "a", 9), request_for(model, "b" * (1600 if moment == "reading" else 3), 9)
    scheduler.submit([stays, leaves])
    seen = [output for _ in range(2) for output in scheduler.step()]
    assert any(output.request is leaves for output in seen) == (moment == "writing")
    scheduler.cancel(leaves)
    outputs = run(scheduler)
    assert leaves not in outputs
    assert text_of([output for output in seen if output.request is stays] + outputs[stays]) == alone(model, "a", 9)
    scheduler.close()
    assert model.open == []
    assert scheduler.counts()[:2] == (0, 0)


# ---------------------------------------------------------------------------------------------
# Prefixes


def test_a_conversation_computes_what_is_new(folder):
    model = FullModel(folder, context_length=512, cache_tokens=4096)
    scheduler = scheduler_of(model)
    first = request_for(model, "q" * 50, 20)
    text = text_of(run(scheduler, {0: [first]})[first])
    tokens = list(first.tokens) + text[1][-1:]
    second = request_for(model, [*tokens, *b"more"], 5)
    model.calls.clear()
    outputs = run(scheduler, {0: [second]})
    assert model.calls[0] == [5], "the token that was written last, and four more"
    assert second.known == len(tokens) - 1
    assert text_of(outputs[second]) == alone(model, [*tokens, *b"more"], 5)
    assert scheduler.counts().kept == 1, "the longer sequence in place of the shorter one"


def test_a_part_of_a_kept_sequence_is_shared(folder):
    model = FullModel(folder, context_length=512, cache_tokens=4096)
    scheduler = scheduler_of(model)
    run(scheduler, {0: [request_for(model, "s" * 100 + "a" * 20, 3)]})
    for prompt, known in (("s" * 100 + "b" * 20, 100), ("s" * 100, 99), ("s" * 15, 0), ("t" * 30, 0)):
        request = request_for(model, prompt, 3)
        outputs = run(scheduler, {0: [request]})
        assert request.known == known, prompt
        assert text_of(outputs[request]) == alone(model, prompt, 3)


def test_requests_that_begin_alike_wait_for_the_first(folder):
    model = FullModel(folder, context_length=2048, cache_tokens=1 << 14)
    scheduler = scheduler_of(model)
    prompts = ["s" * 700 + end for end in ("a", "b", "c")] + ["other"]
    requests = [request_for(model, prompt, 3) for prompt in prompts]
    model.calls.clear()
    outputs = run(scheduler, {0: requests})
    assert sum(map(sum, model.calls)) == 701 + 1 + 1 + 5 + 4 * 2
    assert [request.known for request in requests] == [0, 700, 700, 0]
    assert [text_of(outputs[request]) for request in requests] == [alone(model, prompt, 3) for prompt in prompts]


def test_the_first_of_requests_that_begin_alike_is_cancelled(folder):
    model = FullModel(folder, context_length=2048, cache_tokens=1 << 14)
    scheduler = scheduler_of(model)
    requests = [request_for(model, "s" * 1500, 3) for _ in range(3)]
    scheduler.submit(requests)
    scheduler.step()
    scheduler.cancel(requests[0])
    outputs = run(scheduler)
    assert [text_of(outputs[request]) for request in requests[1:]] == [alone(model, "s" * 1500, 3)] * 2
    assert requests[1].known == 1024, "what the first has computed"


def test_kept_sequences_make_room(folder):
    model = FullModel(folder, cache_tokens=128)
    scheduler = scheduler_of(model)
    for number in range(20):
        request = request_for(model, chr(97 + number) * 30, 10)
        assert text_of(run(scheduler, {0: [request]})[request])[1]
        assert model.free_tokens >= 0
    assert 1 <= scheduler.counts().kept <= 3
    assert scheduler.counts().put_back == 0


def test_a_model_with_recurrent_state(folder):
    """It cannot forget: only whole sequences are continued."""
    model = FullModel(folder, context_length=512, cache_tokens=4096)
    model.recurrent = True
    scheduler = scheduler_of(model)
    first = request_for(model, "q" * 50, 5)
    text_of(run(scheduler, {0: [first]})[first])
    tokens = [*first.tokens, *b"more"]
    again, longer = request_for(model, "q" * 50, 5), request_for(model, tokens, 5)
    outputs = run(scheduler, {0: [again], 1: [longer]})
    assert (again.known, longer.known) == (0, len(first.tokens))
    assert text_of(outputs[longer]) == alone(model, tokens, 5)
    assert text_of(outputs[again]) == alone(model, "q" * 50, 5)
    scheduler.close()
    assert model.open == []


def tokens_of(start, *more):
    """A page of the number, and more tokens."""
    return array("i", [start] * PAGE_TOKENS + list(more))


def test_the_store_of_prefixes():
    freed = []
    store = PrefixStore(freed.append)
    for number in range(MOST_KEPT + 1):
        store.keep(tokens_of(number, 7, 7), number)
    assert (freed, len(store)) == ([0], MOST_KEPT)
    prefix, common = store.find(tokens_of(5, 7, 8), whole=False)
    assert (prefix.sequence, common) == (5, PAGE_TOKENS + 1)
    assert store.find(tokens_of(5, 7, 8), whole=True) == (None, 0)
    assert store.find(tokens_of(5, 7, 7, 8), whole=True)[1] == PAGE_TOKENS + 2
    assert store.find(tokens_of(5)[:-1], whole=False) == (None, 0), "less than a page"
    store.touch(store.find(tokens_of(1), whole=False)[0])
    assert store.evict()
    assert freed == [0, 2]
    spared = store.find(tokens_of(3), whole=False)[0]
    assert store.evict(spared)
    assert freed == [0, 2, 4]
    assert store.take(spared) == 3
    store.keep(tokens_of(5, 7, 7, 9), "longer")
    assert freed == [0, 2, 4, 5]
    store.keep(tokens_of(5, 7, 7, 8), "beside")
    assert freed == [0, 2, 4, 5]
    assert store.find(tokens_of(5, 7, 7, 9, 9), whole=True)[0].sequence == "longer"
    store.clear()
    assert (len(store), len(freed)) == (0, MOST_KEPT + 2)
    assert store.find(tokens_of(5, 7, 7, 9), whole=False) == (None, 0)


def test_common_length(rng):
    for _ in range(200):
        a, b = (array("i", rng.integers(0, 2, int(rng.integers(0, 40))).tolist()) for _ in range(2))
        expected = 0
        while expected < min(len(a), len(b)) and a[expected] == b[expected]:
            expected += 1
        assert common_length(a, b) == common_length(b, a) == expected


# ---------------------------------------------------------------------------------------------
# Failures


def test_logits_that_are_not_numbers_end_one_request(folder):
    model = FullModel(folder, cache_tokens=1024)
    expected = [alone(model, prompt, 20) for prompt in PROMPTS]
    logits = model.logits
    model.logits = lambda tokens: (
        np.full(264, math.nan, np.float32) if tokens[0] == ord("s") and len(tokens) == 13 else logits(tokens)
    )
    scheduler = scheduler_of(model)
    requests = [request_for(model, prompt, 20) for prompt in PROMPTS]
    outputs = run(scheduler, {0: requests})
    *_, failed = outputs[requests[2]]
    assert (failed.piece, failed.last) == (None, True)
    assert "position 13: the model's logits have nan" in str(failed.error)
    texts = [text_of(outputs[request]) for request in requests if request is not requests[2]]
    assert texts == [text for text in expected if text is not expected[2]]
    again = request_for(model, "some words", 3)
    assert run(scheduler, {0: [again]})[again][-1].piece.finish_reason == "length"
    assert again.known == 0, "what gave NaN is not kept"


@pytest.mark.parametrize("error", [DeviceError("lost"), MemoryError(), ValueError("wrong")])
def test_a_step_that_fails_ends_what_runs(folder, error):
    """Requests that wait run afterwards."""
    model = FullModel(folder)
    scheduler = scheduler_of(model, max_sequences=2)
    requests = [request_for(model, prompt, 3) for prompt in ("a", "b", "c")]
    scheduler.submit(requests)
    scheduler.step()
    forward, calls = model.forward_batch, []

    def fail(pairs):
        calls.append(pairs)
        raise error

    model.forward_batch = fail
    failed = scheduler.step()
    assert [output.request for output in failed] == requests[:2]
    assert all(isinstance(output.error, MarlinError) for output in failed)
    assert len(calls) == 1
    assert model.open == []
    model.forward_batch = forward
    outputs = run(scheduler)
    assert text_of(outputs[requests[2]]) == alone(model, "c", 3)


def test_a_request_that_the_cache_cannot_hold(folder):
    """It fails with the cache's error, and the next one runs."""
    model = FullModel(folder, context_length=256, cache_tokens=64)
    scheduler = scheduler_of(model)
    requests = [request_for(model, "a" * 100, 3), request_for(model, "b", 3)]
    outputs = run(scheduler, {0: requests})
    assert "cache: full" in str(outputs[requests[0]][0].error)
    assert text_of(outputs[requests[1]]) == alone(model, "b", 3)


def test_all_requests_are_aborted(folder):
    model = FullModel(folder)
    scheduler = scheduler_of(model, max_sequences=1)
    requests = [request_for(model, prompt, 3) for prompt in ("a", "b")]
    scheduler.submit(requests)
    scheduler.step()
    outputs = scheduler.abort(MarlinError("the end"))
    assert [(output.request, str(output.error)) for output in outputs] == [(one, "the end") for one in requests]
    assert scheduler.open == 0
    assert model.open == []


# ---------------------------------------------------------------------------------------------
# Log-probabilities


def test_scores(rng):
    logits = rng.standard_normal(1000).astype(np.float32) * 3
    logits[[3, 5, 8]] = 20
    exact = logits.astype(np.float64)
    exact = exact - exact.max()
    exact -= np.log(np.exp(exact).sum())
    scores = scores_of(logits, 17, 5)
    assert scores.score == pytest.approx(exact[17], rel=1e-9)
    assert [token for token, _ in scores.top[:3]] == [3, 5, 8]
    assert [score for _, score in scores.top] == pytest.approx(np.sort(exact)[::-1][:5], rel=1e-9)
    assert scores_of(logits, 17, 0).top == ()
    few = scores_of(np.array([0, -np.inf, 1], np.float32), 1, 20)
    assert few.score == -math.inf or few.score < -30
    assert [token for token, _ in few.top] == [2, 0, 1]


def test_scores_come_with_tokens(folder):
    model = FullModel(folder)
    plain, scored = request_for(model, "a", 5), request_for(model, "a", 5, top_scores=2)
    outputs = run(scheduler_of(model), {0: [plain, scored]})
    assert [output.scores for output in outputs[plain]] == [None] * 5
    for output in outputs[scored]:
        assert output.scores.token == output.piece.tokens[0] == output.scores.top[0][0], "greedy"
        assert len(output.scores.top) == 2
    assert text_of(outputs[plain]) == text_of(outputs[scored])


# ---------------------------------------------------------------------------------------------
# A real model


@pytest.mark.parametrize("cache_tokens", [256, 4096])
def test_the_same_bits_whatever_else_is_served(rng, cache_tokens):
    """Logits, bit by bit, of a request beside others that come, share, are put back and leave."""
    model = load_model(built_in(), num_threads=1, context_length=256, cache_tokens=cache_tokens)
    tokens = [rng.integers(0, 256, int(size)).tolist() for size in (5, 70, 33, 120, 16, 90)]
    tokens.append(tokens[3][:100] + tokens[0])
    options = {"temperature": 0.9, "top_p": 0.9, "stop_token_ids": []}
    expected = []
    for number, prompt in enumerate(tokens):
        scheduler = scheduler_of(model, max_sequences=1)
        request = watched(request_for(model, prompt, 40, seed=number, **options))
        run(scheduler, {0: [request]})
        scheduler.close()
        expected.append(request.rows)
    scheduler = scheduler_of(model, max_sequences=5)
    requests = [watched(request_for(model, prompt, 40, seed=number, **options)) for number, prompt in enumerate(tokens)]
    others = [request_for(model, prompt[:50], 60, temperature=1.0) for prompt in tokens]
    arrivals = {0: requests[:2] + others[:2], 3: [requests[2]], 10: others[2:4] + requests[3:], 30: others[4:]}
    run(scheduler, arrivals)
    for request, rows in zip(requests, expected, strict=True):
        assert len(request.rows) == len(rows)
        assert all(np.array_equal(a, b) for a, b in zip(request.rows, rows, strict=True))
    assert (scheduler.counts().put_back > 0) == (cache_tokens == 256)
    scheduler.close()
    assert model.free_tokens == cache_tokens


def test_requests_are_what_they_were(folder):
    model = FullModel(folder)
    request = Request([1, 2, 3], request_for(model, "abc").writer)
    assert (request.pending, request.reads_prompt, request.cancelled) == (3, False, False)
