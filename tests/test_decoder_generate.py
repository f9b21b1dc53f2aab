"""Text from a model that is a function of its tokens: ``marlin_cy.decoder.generate``, ``chat`` and ``stop``."""

import json
import math
import pickle

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from fake_model import FakeModel, write_tokenizer  # noqa: E402

from marlin_cy.decoder import generate as generation  # noqa: E402
from marlin_cy.decoder.chat import Chat, chat  # noqa: E402
from marlin_cy.decoder.generate import generate, generate_batch, prefill, stream_batch  # noqa: E402
from marlin_cy.decoder.stop import StopStrings  # noqa: E402
from marlin_cy.errors import BatchError, CheckpointError, MarlinError  # noqa: E402

EOS = 256
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


@pytest.fixture
def folder(tmp_path):
    return write_tokenizer(tmp_path, chat_template=TEMPLATE)


def says(folder, text, *, prompt="?", **options):
    """A model that continues the prompt with a text, and then ends."""
    tokens = [*(text.encode() if isinstance(text, str) else text), EOS]
    return FakeModel(folder, scripted=tokens, prompt_length=len(prompt), **{"context_length": 4096, **options})


def text_of(pieces):
    """The text, the tokens and the finish reason of a whole text."""
    pieces = list(pieces)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert all(len(piece.tokens) == 1 for piece in pieces)
    tokens = [token for piece in pieces for token in piece.tokens]
    return "".join(piece.text for piece in pieces), tokens, pieces[-1].finish_reason


def by_definition(model, prompt, count, stop=EOS):
    """Greedy text, without a cache."""
    tokens = list(prompt)
    while count and (len(tokens) == len(prompt) or tokens[-1] != stop) and len(tokens) < model.context_length:
        tokens.append(int(model.logits(tokens).argmax()))
        count -= 1
    return tokens[len(prompt) :]


# ---------------------------------------------------------------------------------------------
# One prompt


def test_a_text(folder):
    model = says(folder, "Grüße 世界")
    pieces = list(generate(model, "?"))
    assert "".join(piece.text for piece in pieces) == "Grüße 世界"
    assert [piece.text for piece in pieces[:5]] == ["G", "r", "", "ü", ""]
    assert pieces[-1] == ("", (EOS,), "stop")
    assert model.open == []
    assert model.calls == [[1]] * len(pieces)  # the last token is not run


def test_greedy_is_its_definition(folder):
    model = FakeModel(folder)
    for prompt in ("a", "some words", "x" * 50):
        text, tokens, _ = text_of(generate(model, prompt, max_new_tokens=40))
        assert tokens == by_definition(model, prompt.encode(), 40)
        assert text == bytes(token for token in tokens if token < 256).decode(errors="replace")


def test_prompts_are_texts_or_tokens(folder):
    model = says(folder, "abc", prompt="??")
    for prompt in ("??", [63, 63], (63, np.int32(63)), np.array([63, 63])):
        assert text_of(generate(model, prompt))[0] == "abc"


def test_why_it_ends(folder):
    model = says(folder, "abcdef")
    assert text_of(generate(model, "?", max_new_tokens=3)) == ("abc", [97, 98, 99], "length")
    assert text_of(generate(model, "?", max_new_tokens=7))[2] == "stop"
    assert text_of(generate(model, "?", max_new_tokens=6))[2] == "length"
    assert text_of(generate(model, "?", stop_token_ids=[100])) == ("abc", [97, 98, 99, 100], "stop")
    short = says(folder, "abcdef", context_length=4)
    assert text_of(generate(short, "?")) == ("abc", [97, 98, 99], "context")
    assert text_of(generate(short, "?", max_new_tokens=3))[2] == "length"
    assert text_of(generate(short, "?", max_new_tokens=4))[2] == "context"


def test_text_that_ends_within_a_character(folder):
    model = says(folder, "aü")
    assert text_of(generate(model, "?", max_new_tokens=2))[0] == "a\ufffd"
    assert text_of(generate(says(folder, [97, 0xC3]), "?")) == ("a\ufffd", [97, 0xC3, EOS], "stop")


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("def", "abc"),
        (["x", "cd"], "ab"),
        (["abcdefgh", "b"], "a"),
        (["bcd", "cd"], "a"),  # both complete at "d": the longest
        (["efg", "gh"], "abcd"),
        ("a", ""),
        ("hi", "abcdefgh"),
        ("h", "abcdefg"),
        ("\ufffd", "abcdefgh"),
    ],
)
def test_stop_strings(folder, stop, expected):
    model = says(folder, "abcdefgh")
    text, tokens, reason = text_of(generate(model, "?", stop=stop))
    assert (text, reason) == (expected, "stop")
    assert bytes(tokens[:-1]).decode() == "abcdefgh"[: len(tokens) - 1]


def test_what_may_be_a_stop_string_is_held_back(folder):
    pieces = [piece.text for piece in generate(says(folder, "aababac"), "?", stop="abac")]
    assert pieces == ["", "a", "", "", "ab", "", ""]
    pieces = [piece.text for piece in generate(says(folder, "aab"), "?", stop="abac")]
    assert pieces == ["", "a", "", "ab"]
    pieces = [piece.text for piece in generate(says(folder, "aab"), "?", stop="abac", max_new_tokens=3)]
    assert pieces == ["", "a", "ab"]


def test_a_stop_string_in_what_is_held_back_to_the_end(folder):
    model = says(folder, [97, 0xC3])
    assert text_of(generate(model, "?", stop="\ufffd"))[0] == "a"


def test_stop_strings_wherever_the_stream_is_cut(rng):
    for _ in range(500):
        text = "".join(rng.choice(list("ab"), 20))
        stops = ["".join(rng.choice(list("ab"), int(rng.integers(1, 6)))) for _ in range(3)]
        ends = [(end, -len(stop)) for stop in stops for end in range(len(stop), 21) if text[:end].endswith(stop)]
        end, length = min(ends, default=(20, 0))
        machine, passed, stopped = StopStrings(stops), "", False
        cuts = [0, *sorted(rng.integers(0, 21, 5)), 20]
        for begin, stop in zip(cuts, cuts[1:], strict=False):
            part, stopped = machine.put(text[begin:stop])
            passed += part
            assert (text[: end + length] if ends else text).startswith(passed)
            if stopped:
                break
        assert stopped == bool(ends)
        assert passed + machine.finish() == text[: end + length]


def test_sampling_depends_on_the_seed_alone(folder):
    model = FakeModel(folder)
    options = {"max_new_tokens": 30, "temperature": 1.0}
    first, again, other = (text_of(generate(model, "ab", seed=seed, **options)) for seed in (1, 1, 2))
    assert first == again != other
    assert first[1] != text_of(generate(model, "ab", max_new_tokens=30))[1]


def test_penalties_see_the_prompt(folder):
    model = says(folder, "aaaa")
    assert text_of(generate(model, "?", max_new_tokens=3, presence_penalty=20.0))[1][0] == 97
    assert text_of(generate(model, "?", max_new_tokens=3, presence_penalty=20.0))[1][1] != 97
    repeats = says(folder, "?")
    assert text_of(generate(repeats, "?", max_new_tokens=1, repetition_penalty=100.0))[1] != [63]


def test_long_prompts_in_parts(folder):
    model = says(folder, "abc", prompt="?" * 1500)
    told = []
    text, _, _ = text_of(generate(model, "?" * 1500, progress=lambda *arguments: told.append(arguments)))
    assert text == "abc"
    assert model.calls[:2] == [[512], [988]]
    assert told == [(512, 1500, "prompt of 1500 tokens")]


def test_parts_of_a_slow_model_stay_small(folder, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(generation.time, "perf_counter", lambda: next(clock))
    model = FakeModel(folder, context_length=4096)
    list(generate(model, "?" * 1500, max_new_tokens=1))
    assert model.calls == [[512], [512], [476]]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MarlinError("driver")])
def test_a_prompt_that_is_interrupted(folder, error):
    """The sequence has the length that it had."""
    model = FakeModel(folder, context_length=4096)

    def fail(*arguments):
        raise error

    sequence = model.new_sequence()
    prefill(model, sequence, [1, 2, 3])
    with pytest.raises(BaseException) as raised:
        prefill(model, sequence, [0] * 1000, progress=fail)
    assert raised.value is error or raised.type is error
    assert sequence.tokens == [1, 2, 3]
    model.recurrent = True
    with pytest.raises(BaseException) as raised:
        prefill(model, sequence, [0] * 1000, progress=fail)
    assert raised.value is error or raised.type is error
    model.free(sequence)
    with pytest.raises(BaseException) as raised:
        list(generate(model, [0] * 1000, progress=fail))
    assert raised.value is error or raised.type is error
    assert model.open == []


def test_a_text_that_is_left(folder):
    model = says(folder, "abc")
    pieces = generate(model, "?")
    next(pieces)
    assert len(model.open) == 1
    pieces.close()
    assert model.open == []
    generate(model, "?")  # never iterated
    assert model.open == []


@pytest.mark.parametrize(
    ("prompt", "options", "error", "reason"),
    [
        ("", {}, ValueError, "prompt: got no tokens"),
        ([], {}, ValueError, "prompt: got no tokens"),
        ("a" * 64, {}, ValueError, "prompt: got 64 tokens, but the model has a context of 64"),
        ([1, 264], {}, ValueError, r"prompt: got the token 264 at \[1\], expected 0 to 263"),
        ([-1], {}, ValueError, r"prompt: got the token -1 at \[0\]"),
        ([1.5], {}, TypeError, r"prompt\[0\]: got 1.5, expected an int"),
        (["a"], {}, TypeError, r"prompt\[0\]: got 'a'"),
        (b"a", {}, TypeError, "prompt: got bytes, expected a str or token ids"),
        (None, {}, TypeError, "prompt: got NoneType"),
        ("a\udcff", {}, ValueError, "prompt: text: got a lone surrogate at character 1"),
        ("a", {"max_new_tokens": 0}, ValueError, "max_new_tokens: got 0"),
        ("a", {"max_new_tokens": 1.5}, TypeError, "max_new_tokens: got 1.5"),
        ("a", {"temperature": -1}, ValueError, "temperature: got -1"),
        ("a", {"warmth": 1}, TypeError, "warmth"),
    ],
)
def test_invalid_arguments(folder, prompt, options, error, reason):
    """They are refused at the call, before the model runs."""
    model = FakeModel(folder)
    with pytest.raises(error, match=reason):
        generate(model, prompt, **options)
    if not isinstance(prompt, str) or prompt:
        with pytest.raises(error, match=reason.replace("prompt", "prompts.1.", 1)):
            stream_batch(model, ["a", prompt], **options)
    assert (model.sequences, model.calls) == ([], [])


def test_a_model_whose_logits_are_not_numbers(folder):
    model = says(folder, "abc")
    logits = model.logits
    model.logits = lambda tokens: logits(tokens) if len(tokens) < 3 else np.full(264, math.nan, np.float32)
    pieces = generate(model, "?")
    assert [next(pieces).text, next(pieces).text] == ["a", "b"]
    with pytest.raises(MarlinError, match="position 3: the model's logits have nan"):
        next(pieces)
    assert model.open == []
    with pytest.raises(BatchError, match=r"prompts\[0\]: position 3: .* nan .*; prompts\[1\]: position 3: ") as raised:
        generate_batch(model, ["?", "?"])
    assert raised.value.texts == ["ab", "ab"]
    assert model.open == []


def test_a_prompt_without_numbers_ends_alone(folder):
    """The other prompts of the batch end as if they ran alone, those that begin later included."""
    model = FakeModel(folder, cache_tokens=128)
    expected = generate_batch(model, PROMPTS, max_new_tokens=20)
    logits = model.logits
    model.logits = lambda tokens: (
        logits(tokens) if tokens[0] != ord("b") or len(tokens) < 43 else np.full(264, math.nan, np.float32)
    )
    told = []
    with pytest.raises(BatchError, match=r"^prompts\[1\]: position 43: the model's logits have nan") as raised:
        generate_batch(model, PROMPTS, max_new_tokens=20, progress=lambda *state: told.append(state))
    texts = raised.value.texts
    assert expected[1].startswith(texts.pop(1)[:2])
    assert texts == [text for index, text in enumerate(expected) if index != 1]
    assert [done for done, _, _ in told] == [1, 2, 3, 4, 5]
    assert {index: str(error)[:12] for index, error in raised.value.errors.items()} == {1: "position 43:"}
    copy = pickle.loads(pickle.dumps(raised.value))
    assert (str(copy), copy.texts) == (str(raised.value), raised.value.texts)
    with pytest.raises(BatchError):
        list(stream_batch(model, PROMPTS, max_new_tokens=20))
    assert model.open == []


# ---------------------------------------------------------------------------------------------
# Several prompts

PROMPTS = ["a", "b" * 40, "some words", "x" * 17, "y", "z" * 30]


@pytest.mark.parametrize("cache_tokens", [64, 100, 128, 1000])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "stop": ["e", "\n"]}])
def test_texts_are_those_of_one_prompt(folder, cache_tokens, options):
    model = FakeModel(folder, cache_tokens=cache_tokens)
    expected = [text_of(generate(model, prompt, max_new_tokens=20, **options))[0] for prompt in PROMPTS]
    model.calls.clear()
    told = []
    texts = generate_batch(model, PROMPTS, max_new_tokens=20, progress=lambda *state: told.append(state), **options)
    assert texts == expected
    assert told == [(done, 6, "prompts") for done in range(1, 7)]
    assert model.open == []
    assert max(map(len, model.calls)) > 1 or cache_tokens == 64


def test_a_step_is_one_call(folder):
    """Texts of any lengths run together, and a prompt begins while others continue."""
    model = FakeModel(folder, context_length=2048, cache_tokens=1 << 14)
    list(stream_batch(model, ["a", "b" * 1100, "c"], max_new_tokens=4))
    assert model.calls[:4] == [[1, 512, 1], [1, 512, 1], [1, 76, 1], [1, 1, 1]]
    assert all(len(call) == 1 for call in model.calls[4:])


def test_prompts_share_a_step(folder):
    model = FakeModel(folder, context_length=2048, cache_tokens=1 << 14)
    list(stream_batch(model, ["b" * 400, "c" * 400, "d" * 400], max_new_tokens=1))
    assert model.calls == [[400, 112], [288, 224], [176]]


def test_pieces_come_as_they_are_produced(folder):
    model = FakeModel(folder, cache_tokens=256)
    pieces = stream_batch(model, ["a", "b"], max_new_tokens=3)
    assert [next(pieces)[0] for _ in range(6)] == [0, 1, 0, 1, 0, 1]
    pieces = stream_batch(model, ["a", "b"], max_new_tokens=3)
    next(pieces)
    assert len(model.open) == 2
    pieces.close()
    assert model.open == []


def test_batches_of_none_and_invalid_ones(folder):
    model = FakeModel(folder)
    assert generate_batch(model, []) == []
    for prompts in ("ab", 5, None):
        with pytest.raises(TypeError, match="prompts: got "):
            stream_batch(model, prompts)


# ---------------------------------------------------------------------------------------------
# Messages


def user(text):
    return {"role": "user", "content": text}


def test_an_answer(folder):
    model = says(folder, "Hello", prompt="u:Hi\na:")
    assert text_of(chat(model, [user("Hi")]))[0] == "Hello"
    assert model.open == []


def test_a_conversation_runs_only_what_is_new(folder):
    model = FakeModel(folder, context_length=1000)
    conversation, messages = Chat(model), []
    known = 0
    for question in ("Hi", "And now?", "Well."):
        messages.append(user(question))
        alone = text_of(chat(model, messages, max_new_tokens=9))
        model.calls.clear()
        answer = text_of(conversation.answer(messages, max_new_tokens=9))
        assert answer == alone
        prompt = "".join(f"{m['role'][0]}:{m['content']}\n" for m in messages) + "a:"
        assert model.calls[0] == [len(prompt.encode()) - known]
        # Answers of random bytes are not the same tokens again: a message of letters is.
        answer = "".join(chr(97 + token % 26) for token in answer[1])
        known = len(prompt.encode())
        messages.append({"role": "assistant", "content": answer})
    assert len(model.open) == 1
    conversation.free()
    conversation.free()
    assert model.open == []


def test_a_conversation_that_is_begun_again(folder):
    model = FakeModel(folder, context_length=1000)
    conversation = Chat(model)
    for messages in ([user("abc")], [user("abd")], [user("abd")], [user("x")]):
        expected = text_of(chat(model, messages, max_new_tokens=5))
        assert text_of(conversation.answer(messages, max_new_tokens=5)) == expected
    model.recurrent = True  # it cannot forget: the prompt runs from the start
    for messages in ([user("y")], [user("z")]):
        expected = text_of(chat(model, messages, max_new_tokens=5))
        assert text_of(conversation.answer(messages, max_new_tokens=5)) == expected
    assert len(model.open) == 1


def test_a_conversation_after_an_interruption(folder):
    model = FakeModel(folder, context_length=4096)
    conversation = Chat(model)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    text_of(conversation.answer([user("a")], max_new_tokens=3))
    with pytest.raises(KeyboardInterrupt):
        list(conversation.answer([user("a" * 2000)], progress=interrupt))
    answer = conversation.answer([user("b")])
    next(answer)
    answer.close()
    for text in ("a", "a" * 2000):
        expected = text_of(chat(model, [user(text)], max_new_tokens=5))
        assert text_of(conversation.answer([user(text)], max_new_tokens=5)) == expected


def test_defaults_of_the_folder(folder):
    model = FakeModel(folder, context_length=500)
    config = {"do_sample": True, "temperature": 0.8, "top_k": 30}
    (folder / "generation_config.json").write_text(json.dumps(config))
    drawn = text_of(chat(model, [user("Hi")], max_new_tokens=20))
    prompt = "u:Hi\na:"
    assert drawn == text_of(generate(model, prompt, max_new_tokens=20, temperature=0.8, top_k=30))
    assert drawn != text_of(generate(model, prompt, max_new_tokens=20))
    greedy = text_of(chat(model, [user("Hi")], max_new_tokens=20, temperature=0))
    assert greedy == text_of(generate(model, prompt, max_new_tokens=20))
    (folder / "generation_config.json").write_text('{"temperature": "warm"}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: temperature: got 'warm'"):
        chat(model, [user("Hi")])


def test_messages_that_are_refused(folder):
    model = FakeModel(folder)
    with pytest.raises(ValueError, match="messages: got 105 tokens, but the model has a context of 64"):
        chat(model, [user("a" * 100)])
    with pytest.raises(ValueError, match="messages: got no message"):
        chat(model, [])
    with pytest.raises(ValueError, match="max_new_tokens"):
        chat(model, [user("a")], max_new_tokens=-1)
    write_tokenizer(folder, chat_template="{{ raise_exception('never') }}")
    with pytest.raises(CheckpointError, match="the chat template fails: never"):
        chat(FakeModel(folder), [user("a")])
    assert (model.sequences, model.calls) == ([], [])
