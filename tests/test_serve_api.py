"""The OpenAI interface over HTTP, in this process: ``marlin_cy.serve.api``."""

import json
import math

import pytest

for name in ("tokenizers", "jinja2", "uvicorn", "starlette", "pydantic", "prometheus_client"):
    pytest.importorskip(name, reason=f"{name} is not installed")

from served import TEMPLATE, Serving, built_in, chat_folder  # noqa: E402

from marlin_cy.decoder.chat import chat  # noqa: E402
from marlin_cy.decoder.generate import generate  # noqa: E402
from marlin_cy.decoder.load import load_model  # noqa: E402
from marlin_cy.decoder.sampling import read_sampling  # noqa: E402
from marlin_cy.serve.api import MOST_BODY_BYTES  # noqa: E402

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]


def text_of(pieces):
    pieces = list(pieces)
    return "".join(piece.text for piece in pieces), len(pieces), pieces[-1].finish_reason


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_folder(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def reference(folder):
    """A model that is not served."""
    return load_model(folder, num_threads=1, context_length=512)


@pytest.fixture(scope="module")
def serving(folder):
    with Serving(load_model(folder, num_threads=1, context_length=512, cache_tokens=4096)) as server:
        yield server


# ---------------------------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}])
def test_chat(serving, reference, options):
    document = serving.document(CHAT, {"model": "tiny", "messages": HI, "max_tokens": 30, **options})
    text, tokens, reason = text_of(chat(reference, HI, max_new_tokens=30, **options))
    assert document["object"] == "chat.completion"
    assert document["id"].startswith("chatcmpl-")
    assert document["model"] == "tiny"
    (choice,) = document["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": reason,
    }
    prompt = len(b"u:Hi\na:")
    usage = document["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt, tokens)
    assert usage["total_tokens"] == prompt + tokens


def test_completions(serving, reference):
    document = serving.document(COMPLETIONS, {"prompt": "def f(", "temperature": 0})
    text, tokens, reason = text_of(generate(reference, "def f(", max_new_tokens=16))
    assert document["object"] == "text_completion"
    assert document["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]
    assert document["usage"]["completion_tokens"] == tokens
    same = serving.document(COMPLETIONS, {"prompt": list(b"def f("), "temperature": 0})
    assert same["choices"] == document["choices"]


def test_defaults_are_those_of_the_folder(serving, reference):
    params = read_sampling(reference.folder)
    options = {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    document = serving.document(CHAT, {"messages": HI, "max_tokens": 9, "seed": 3})
    assert (
        document["choices"][0]["message"]["content"]
        == text_of(generate(reference, "u:Hi\na:", max_new_tokens=9, seed=3, **options))[0]
    )


def test_several_prompts_and_texts(serving, reference):
    prompts = ["def f(", "import ", "class A"]
    options = {"temperature": 1.0, "max_tokens": 12, "seed": 7}
    document = serving.document(COMPLETIONS, {"prompt": prompts, "n": 2, **options})
    expected = [
        text_of(generate(reference, prompt, max_new_tokens=12, temperature=1.0, seed=seed))[0]
        for prompt in prompts
        for seed in (7, 8)
    ]
    assert [choice["text"] for choice in document["choices"]] == expected
    assert [choice["index"] for choice in document["choices"]] == list(range(6))
    assert document["usage"]["prompt_tokens"] == sum(map(len, prompts))
    tokens = [list(map(ord, prompt)) for prompt in prompts]
    assert serving.document(COMPLETIONS, {"prompt": tokens, "n": 2, **options})["choices"] == document["choices"]
    most = {"prompt": "a", "n": 2, "seed": 2**63 - 1, "temperature": 1.0}
    assert len(serving.document(COMPLETIONS, most)["choices"]) == 2


def test_seeds_are_drawn_where_none_is_given(serving):
    body = {"prompt": "x", "max_tokens": 40, "temperature": 2.0, "n": 3}
    texts = {choice["text"] for _ in range(2) for choice in serving.document(COMPLETIONS, body)["choices"]}
    assert len(texts) == 6


def test_stop_strings_and_the_end_of_a_text(serving, reference):
    whole = text_of(generate(reference, "def f(", max_new_tokens=60))[0]
    stop = whole[20:23]
    (choice,) = serving.document(
        COMPLETIONS, {"prompt": "def f(", "max_tokens": 60, "temperature": 0, "stop": ["\x00", stop]}
    )["choices"]
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    ended = serving.document(COMPLETIONS, {"prompt": "def f(", "temperature": 0, "max_tokens": 500})
    on = serving.document(COMPLETIONS, {"prompt": "def f(", "temperature": 0, "max_tokens": 500, "ignore_eos": True})
    assert on["usage"]["completion_tokens"] >= ended["usage"]["completion_tokens"]
    assert on["choices"][0]["finish_reason"] == "length"


def test_a_text_that_fills_the_context(serving):
    body = {"prompt": "a" * 500, "max_tokens": 1000, "temperature": 0, "ignore_eos": True}
    document = serving.document(COMPLETIONS, body)
    assert document["choices"][0]["finish_reason"] == "length"
    assert document["usage"]["total_tokens"] == 512


def test_prompts_in_the_cache(serving):
    body = {"prompt": "p" * 100, "max_tokens": 5, "temperature": 0}
    first, second = (serving.document(COMPLETIONS, body) for _ in range(2))
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert second["usage"]["prompt_tokens_details"] == {"cached_tokens": 99}
    assert first["choices"] == second["choices"]


# ---------------------------------------------------------------------------------------------
# Streams


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_has_the_whole_answer(serving, scored, n):
    more = {"logprobs": True, "top_logprobs": 2} if scored else {}
    body = {"messages": HI, "max_tokens": 20, "temperature": 1.0, "seed": 11, "n": n, **more}
    whole = serving.document(CHAT, body)
    events = serving.stream(CHAT, {**body, "stream_options": {"include_usage": True}})
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    *events, usage = events
    assert usage["choices"] == []
    del usage["usage"]["prompt_tokens_details"], whole["usage"]["prompt_tokens_details"]
    assert usage["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"].get("content", "") for part in mine) == choice["message"]["content"]
        assert [part["finish_reason"] for part in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        if scored:
            scores = [one for part in mine[1:] for one in part["logprobs"]["content"]]
            assert scores == choice["logprobs"]["content"]
    assert all("usage" not in event for event in serving.stream(CHAT, body))


def test_a_stream_of_completions(serving):
    body = {"prompt": ["def f(", "x ="], "max_tokens": 20, "temperature": 0, "logprobs": 2}
    whole, events = serving.document(COMPLETIONS, body), serving.stream(COMPLETIONS, body)
    for choice in whole["choices"]:
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [one for part in mine for one in part["logprobs"][name]] == choice["logprobs"][name], name
        tokens = choice["logprobs"]["tokens"]
        assert "".join(tokens) == choice["text"]
        assert choice["logprobs"]["text_offset"] == [len("".join(tokens[:i])) for i in range(len(tokens))]


def test_a_stream_comes_while_the_text_is_written(serving):
    connection = serving.connect()
    body = {"prompt": "a", "max_tokens": 480, "ignore_eos": True, "temperature": 1.0, "stream": True}
    connection.request("POST", COMPLETIONS, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.getheader("content-type") == "text/event-stream; charset=utf-8"
    assert response.readline().startswith(b'data: {"object":"text_completion"')
    assert serving.counts.running == 1, "the first event came before the last token"
    response.read()
    connection.close()


def test_log_probabilities(serving, reference):
    body = {"messages": HI, "max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    (choice,) = serving.document(CHAT, body)["choices"]
    scores = choice["logprobs"]["content"]
    assert len(scores) == 6
    text = b"".join(bytes(one["bytes"]) for one in scores).decode(errors="replace")
    assert text == choice["message"]["content"]
    for one in scores:
        assert one["top_logprobs"][0] == {name: one[name] for name in ("token", "logprob", "bytes")}
        top = [entry["logprob"] for entry in one["top_logprobs"]]
        assert len(top) == 3
        assert top == sorted(top, reverse=True)
        assert 0 < sum(map(math.exp, top)) <= 1 + 1e-9
    alone = serving.document(CHAT, {**body, "top_logprobs": None})["choices"][0]["logprobs"]["content"]
    assert [(one["token"], one["logprob"]) for one in alone] == [(one["token"], one["logprob"]) for one in scores]
    assert [one["top_logprobs"] for one in alone] == [[]] * 6


# ---------------------------------------------------------------------------------------------
# Messages


def test_messages_and_the_template(tmp_path, folder):
    """Parts of text are joined; tools and variables go to the template; errors of the template are the client's."""
    other = tmp_path / "model"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).symlink_to(file.resolve())
    (other / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'odd' %}{{ raise_exception('odd role') }}{% endif %}"
        + TEMPLATE
        + "{{ tools | length if tools else '-' }}{{ 'T' if thinks else 'F' }}"
    )
    prompts = []
    with Serving(load_model(other, num_threads=1)) as serving:
        encode = serving.service.tokenizer.encode

        def record(text, **options):
            prompts.append(text)
            return encode(text, **options)

        serving.service.tokenizer.encode = record
        tool = {"type": "function", "function": {"name": "f"}}
        for more in (
            {},
            {"tools": [tool], "chat_template_kwargs": {"thinks": True}},
            {"tools": [tool], "tool_choice": "none"},
            {"tools": []},
        ):
            serving.document(CHAT, {"messages": HI, "max_tokens": 1, **more})
        parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
        serving.document(CHAT, {"messages": [{"role": "user", "content": parts}], "max_tokens": 1})
        assert [prompt.removeprefix("u:Hi\na:") for prompt in prompts] == ["-F", "1T", "-F", "-F", "-F"]
        status, _, document = serving.ask(CHAT, {"messages": [{"role": "odd", "content": "x"}]})
        assert status == 400
        assert document["error"]["message"] == "the chat template fails: odd role"


def test_a_model_that_is_not_made_to_chat():
    with Serving(load_model(built_in(), num_threads=1)) as serving:
        assert serving.document("/v1/models")["data"][0]["chat"] is False
        status, _, document = serving.ask(CHAT, {"messages": HI})
        assert (status, document["error"]["code"]) == (400, "no_chat_template")
        assert "not made to chat" in document["error"]["message"]
        assert serving.document(COMPLETIONS, {"prompt": "a", "max_tokens": 2})["usage"]["completion_tokens"] == 2


# ---------------------------------------------------------------------------------------------
# Bad requests


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"temperature": -1}, 400, "temperature: got -1.0, expected a number of at least 0"),
        ({"temperature": "hot"}, 400, "temperature: got 'hot', expected a valid number"),
        ({"top_p": 0}, 400, "top_p: got 0.0, expected a number above 0 and at most 1"),
        ({"min_p": 2}, 400, "min_p: got 2.0, expected a number of at least 0 and at most 1"),
        ({"top_k": -1}, 400, "top_k: got -1, expected a number of tokens"),
        ({"presence_penalty": 1e300}, 400, "presence_penalty: got 1e+300, expected a finite"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty: got 0.0, expected a number above 0"),
        ({"seed": 1.5}, 400, "seed: got 1.5, expected a valid integer"),
        ({"seed": 2**64}, 400, "seed: got a number of 65 bits"),
        ({"stop": [""]}, 400, "stop: got an empty text"),
        ({"stop": 5}, 400, "stop: got 5, expected a valid string or a valid list"),
        ({"stop_token_ids": ["a"]}, 400, "stop_token_ids[0]: got 'a', expected a valid integer"),
        ({"n": 0}, 400, "n: got 0, expected greater than or equal to 1"),
        ({"n": 13}, 400, "n: got 13 texts for 1 prompts, expected at most 12 together"),
        ({"max_tokens": 0}, 400, "max_tokens: got 0, expected greater than or equal to 1"),
        ({"max_tokens": True}, 400, "max_tokens: got True"),
        ({"stream": "yes"}, 400, "stream: got 'yes', expected a valid boolean"),
        ({"stream_options": {"usage": True}}, 400, "stream_options.usage: there is no such field"),
        ({"temprature": 1}, 400, "temprature: there is no such field"),
        ({"model": "gpt-9"}, 404, "model: got 'gpt-9', expected 'tiny'"),
        (
            {"response_format": {"type": "json_object"}},
            400,
            "response_format: not supported, got {'type': 'json_object'}",
        ),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias: not supported"),
    ],
)
def test_fields_that_are_refused(serving, fields, status, message):
    for path, body in ((CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": "a"})):
        got, _, document = serving.ask(path, {**body, **fields})
        error = document["error"]
        assert error["message"].startswith(message), error
        assert (got, error["type"]) == (status, "invalid_request_error")
        assert error["param"] == next(iter(fields))
    assert serving.counts[:2] == (0, 0)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (CHAT, {}, "messages: missing"),
        (CHAT, {"messages": []}, "messages: got [], expected"),
        (CHAT, {"messages": "Hi"}, "messages: got 'Hi', expected a valid list"),
        (CHAT, {"messages": ["Hi"]}, "messages[0]: got 'Hi', expected a valid dictionary"),
        (CHAT, {"messages": [{"content": "Hi"}]}, "messages[0]['role']: got None, expected a str"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]: got 'image",
        ),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 600}]}, "messages: got 605 tokens, but the model has a"),
        (CHAT, {"messages": HI, "top_logprobs": 2}, "top_logprobs: only with logprobs"),
        (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs: got 21, expected less than or"),
        (CHAT, {"messages": HI, "tool_choice": "required"}, "tool_choice: got 'required', expected 'none' or 'auto'"),
        (CHAT, {"messages": HI, "prompt": "a"}, "prompt: there is no such field"),
        (CHAT, {"messages": HI, "max_completion_tokens": -1}, "max_completion_tokens: got -1"),
        (COMPLETIONS, {"prompt": ""}, "prompt: got no tokens"),
        (COMPLETIONS, {"prompt": []}, "prompt: got no prompt"),
        (COMPLETIONS, {"prompt": ["a", ""]}, "prompt: got no tokens"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt: got no tokens"),
        (COMPLETIONS, {"prompt": [1, 99999]}, "prompt: got the token 99999 at [1], expected 0 to 263"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt: got "),
        (COMPLETIONS, {"prompt": {"text": "a"}}, "prompt: got {'text': 'a'}, expected a text, texts"),
        (COMPLETIONS, {"prompt": [2**70]}, "prompt: got "),
        (COMPLETIONS, {"prompt": "a" * 512}, "prompt: got 512 tokens, but the model has a context of 512"),
        (COMPLETIONS, {"prompt": "a", "echo": True}, "echo: not supported, got True"),
        (COMPLETIONS, {"prompt": ["a"] * 13}, "n: got 1 texts for 13 prompts, expected at most 12 together"),
    ],
)
def test_bodies_that_are_refused(serving, path, body, message):
    status, _, document = serving.ask(path, body)
    assert document["error"]["message"].startswith(message), document
    assert status == 400


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b"\xff\xfe", "the body is not JSON"),
        (b"[1]", "the body: got list, expected a JSON object"),
        (b'{"prompt": "a", "temperature": NaN}', "the body is not JSON"),
        (b'{"prompt": "\\ud800"}', "the body is not JSON"),
        (b"[" * 100000, "the body is not JSON"),
    ],
)
def test_bodies_that_are_no_objects(serving, data, message):
    status, _, document = serving.ask(COMPLETIONS, data)
    assert status == 400
    assert document["error"]["message"].startswith(message)


def test_fields_that_change_no_answer(serving):
    plain = {"messages": HI, "max_tokens": 3, "temperature": 0}
    more = {"user": "u", "metadata": {"a": "b"}, "store": False, "logit_bias": {}, "response_format": {"type": "text"}}
    more |= {"n": 1, "stop": None, "seed": None, "tools": None, "max_completion_tokens": 3, "parallel_tool_calls": True}
    documents = [serving.document(CHAT, body) for body in (plain, {**plain, **more})]
    assert documents[0]["choices"] == documents[1]["choices"]


def test_other_types_sizes_paths_and_methods(serving):
    body = b'{"prompt": "a"}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, _, document = serving.ask(COMPLETIONS, body, headers={"Content-Type": kind})
        assert (status, document["error"]["code"]) == (415, "invalid_content_type")
    assert serving.ask(COMPLETIONS, body, headers={"Content-Type": "application/json; charset=utf-8"})[0] == 200
    status, _, document = serving.ask(COMPLETIONS, b" " * (MOST_BODY_BYTES + 1))
    assert (status, document["error"]["code"]) == (413, "body_too_large")
    status, _, document = serving.ask("/v1/embeddings", {})
    assert (status, document["error"]["message"]) == (404, "POST /v1/embeddings: Not Found")
    status, headers, document = serving.ask(COMPLETIONS)
    assert (status, document["error"]["type"]) == (405, "invalid_request_error")
    assert headers["allow"] == "POST"


# ---------------------------------------------------------------------------------------------
# Other paths


def test_models(serving):
    document = serving.document("/v1/models")
    (model,) = document["data"]
    assert (document["object"], model["id"], model["object"]) == ("list", "tiny", "model")
    assert (model["max_model_len"], model["chat"]) == (512, True)
    assert serving.document("/v1/models/tiny") == model
    status, _, document = serving.ask("/v1/models/a/b")
    assert (status, document["error"]["code"]) == (404, "model_not_found")


def test_health_and_metrics(folder):
    with Serving(load_model(folder, num_threads=1)) as serving:
        assert serving.document("/health") == {"status": "ok"}
        for _ in range(2):
            serving.document(COMPLETIONS, {"prompt": "m" * 40, "max_tokens": 5, "temperature": 0})
        serving.ask(COMPLETIONS, {"prompt": ""})
        status, headers, text = serving.ask("/metrics")
        assert status == 200
        assert headers["content-type"].startswith("text/plain")
        values = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))
        expected = {
            'marlin_cy_requests_total{outcome="length"}': 2,
            'marlin_cy_requests_total{outcome="refused"}': 1,
            "marlin_cy_prompt_tokens_total": 80,
            "marlin_cy_cached_prompt_tokens_total": 39,
            "marlin_cy_generated_tokens_total": 10,
            "marlin_cy_first_token_seconds_count": 2,
            "marlin_cy_token_seconds_count": 2,
            "marlin_cy_running": 0,
            "marlin_cy_waiting": 0,
            "marlin_cy_kept": 1,
            "marlin_cy_computed": 40 + 4 + 1 + 4,
        }
        assert {name: float(values[name]) for name in expected} == expected


def test_a_key(folder):
    with Serving(load_model(folder, num_threads=1), api_key="secret ü") as serving:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Basic secret"}):
            for path in ("/v1/models", "/v1/models/tiny", "/metrics", CHAT, COMPLETIONS):
                body = {"prompt": "a"} if "completions" in path else None
                status, answer, document = serving.ask(path, body, headers=headers)
                assert (status, document["error"]["code"]) == (401, "invalid_api_key")
                assert answer["www-authenticate"] == "Bearer"
        assert serving.ask("/v1/models", headers={"Authorization": "Bearer secret ü".encode()})[0] == 200
        assert serving.document("/health") == {"status": "ok"}
        assert serving.ask("/")[0] == 200
    with Serving(load_model(folder, num_threads=1), api_key="secret") as serving:
        assert serving.ask("/v1/models", headers={"Authorization": "Bearer secret"})[0] == 200
        assert serving.ask("/metrics", headers={"authorization": "bearer secret"})[0] == 200


def test_the_page(serving):
    status, headers, page = serving.ask("/")
    assert status == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert b"http://" not in page, "nothing from elsewhere"
    assert b"https://" not in page
