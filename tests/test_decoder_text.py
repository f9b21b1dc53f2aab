"""Text from the built-in model: ``Model.generate``, ``generate_batch`` and ``chat`` from end to end."""

import shutil
import threading
from importlib.resources import files

import pytest

from marlin_cy import load_model
from marlin_cy.commands.run import BUILT_IN
from marlin_cy.decoder.cache import CacheFull
from marlin_cy.decoder.chat import Chat
from marlin_cy.decoder.perplexity import perplexity
from marlin_cy.errors import BackendUnavailable, CheckpointError, ContextInUse

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

FOLDER = files("marlin_cy") / BUILT_IN
PROMPTS = ["def quicksort(", "import ", "x", "class A:\n    def __init__(self, name):\n        self.", "# é"]
SAMPLING = [{}, {"temperature": 0.8, "seed": 5}, {"temperature": 1.2, "top_p": 0.9, "repetition_penalty": 1.1}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The built-in model with a chat template."""
    folder = shutil.copytree(FOLDER, tmp_path_factory.mktemp("chat") / "checkpoint")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, cache_tokens=2048, num_threads=1)


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_a_batch_has_the_texts_of_its_prompts(model, options):
    free = model.free_tokens
    expected = [text_of(model.generate(prompt, max_new_tokens=40, **options)) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    assert model.generate_batch(PROMPTS, max_new_tokens=40, **options) == expected
    assert model.free_tokens == free


def test_more_prompts_than_the_cache_has_room_for(folder, model):
    small = load_model(folder, cache_tokens=160, num_threads=1)
    expected = model.generate_batch(PROMPTS * 3, max_new_tokens=40)
    assert small.generate_batch(PROMPTS * 3, max_new_tokens=40) == expected
    assert small.free_tokens == 160


def test_texts_do_not_depend_on_threads(folder, model):
    other = load_model(folder, num_threads=3)
    for options in SAMPLING:
        expected = list(model.generate(PROMPTS[0], max_new_tokens=30, **options))
        assert list(other.generate(PROMPTS[0], max_new_tokens=30, **options)) == expected


def test_a_long_prompt(model):
    prompt = (FOLDER / "validation.txt").read_text()[:1000]
    told = []
    pieces = list(model.generate(prompt, progress=lambda *state: told.append(state)))
    assert (len(pieces), pieces[-1].finish_reason) == (24, "context")
    assert told == [(512, 1000, "prompt of 1000 tokens")]


def test_a_conversation(model):
    conversation, messages = Chat(model), []
    for question in ("import os", "def f(x):", "return"):
        messages.append({"role": "user", "content": question})
        expected = text_of(model.chat(messages, max_new_tokens=20, temperature=0))
        answer = text_of(conversation.answer(messages, max_new_tokens=20, temperature=0))
        assert answer == expected
        messages.append({"role": "assistant", "content": answer})
    conversation.free()


def test_a_cache_that_others_hold(folder):
    """The error is that of the model, and nothing is lost."""
    model = load_model(folder, cache_tokens=64, num_threads=1)
    sequence = model.new_sequence()
    logits = model.forward([1] * 40, sequence=sequence)
    with pytest.raises(CacheFull):
        list(model.generate("x" * 30))
    assert model.free_tokens == 16
    with pytest.raises(CacheFull):
        model.generate_batch(["x" * 30])
    assert (model.free_tokens, sequence.length) == (16, 40)
    model.truncate(sequence, 39)
    assert (model.forward([1], sequence=sequence) == logits).all()


def test_two_threads(model):
    pieces = model.generate("x")
    next(pieces)
    errors = []

    def other():
        try:
            with model._exclusive():
                next(pieces)
        except ContextInUse as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(errors) == 1


def test_perplexity_in_parts(model, monkeypatch):
    tokens = list((FOLDER / "validation.txt").read_bytes())[:200]
    whole = perplexity(model, tokens, 100, 2)
    monkeypatch.setattr("marlin_cy.decoder.perplexity.LOGITS", 264 * 7)
    assert perplexity(model, tokens, 100, 2) == pytest.approx(whole, rel=1e-12)


def test_folders_without_tokenizer(folder, tmp_path, monkeypatch):
    """They have logits, but no text."""
    bare = shutil.copytree(FOLDER, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("tokenizer*"))
    model = load_model(bare, num_threads=1)
    assert model.forward([1, 2]).shape == (264,)
    for call in (lambda: model.generate("x"), lambda: model.generate_batch(["x"]), lambda: model.chat([{}])):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
            call()
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'marlin-cy\[text\]'"):
        load_model(folder, num_threads=1).generate("x")
