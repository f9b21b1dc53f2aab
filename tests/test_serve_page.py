"""The chat page in a browser: ``tests/browser.sh`` runs this."""

import os
import shutil
import time

import pytest

pytestmark = pytest.mark.browser

for name in ("tokenizers", "jinja2", "uvicorn", "starlette", "pydantic", "prometheus_client"):
    pytest.importorskip(name, reason=f"{name} is not installed")

from chromium import Chromium  # noqa: E402
from served import Serving, built_in, chat_folder  # noqa: E402

from marlin_cy.decoder.load import load_model  # noqa: E402

TEXTS = "[...document.querySelectorAll('article')].map((one) => one.textContent)"
IDLE = "!document.getElementById('send').disabled"
STATE = "document.getElementById('state').textContent"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_folder(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture
def browser():
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if program is None:
        pytest.skip("Chromium is not installed")
    with Chromium(program) as found:
        yield found


def start(browser, serving):
    browser.open(f"http://127.0.0.1:{serving.port}/")
    browser.value("document.getElementById('temperature').value = 0, document.getElementById('tokens').value = 40")


def answer(serving, *texts):
    """What the server answers to a conversation."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    document = serving.document("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 40})
    return document["choices"][0]["message"]["content"]


def test_a_conversation(browser, folder):
    with Serving(load_model(folder, num_threads=1), name="tiny <model>") as serving:
        start(browser, serving)
        browser.wait("document.title === 'tiny <model>'")
        browser.type("def f(x): <b>")
        browser.click("#send")
        browser.wait(f"{TEXTS}.length === 2 && {IDLE}")
        texts = browser.value(TEXTS)
        assert texts[0] == "def f(x): <b>", "text, not HTML"
        assert texts[1] == answer(serving, "def f(x): <b>")
        assert browser.value(STATE).startswith("40 tokens, ")
        browser.type("import")
        browser.press_enter()
        browser.wait(f"{TEXTS}.length === 4 && {IDLE}")
        assert browser.value(TEXTS)[3] == answer(serving, *texts, "import"), "with the messages before"
        browser.click("#new")
        browser.wait(f"{TEXTS}.length === 0")
        browser.value("document.getElementById('text').focus()")
        browser.type("import")
        browser.press_enter()
        browser.wait(f"{TEXTS}.length === 2 && {IDLE}")
        assert browser.value(TEXTS)[1] == answer(serving, "import"), "without them"
        own = f"http://127.0.0.1:{serving.port}/"
        assert all(url.startswith((own, "data:")) for url in browser.requested), browser.requested


def test_a_text_appears_while_it_is_written_and_stops(browser, folder):
    model = load_model(folder, num_threads=1)
    forward = model.forward_batch

    def slow(pairs):
        time.sleep(0.02)
        return forward(pairs)

    model.forward_batch = slow
    with Serving(model) as serving:
        start(browser, serving)
        browser.value(
            "document.getElementById('tokens').value = 900, document.getElementById('temperature').value = 1.5"
        )
        browser.type("class")
        browser.click("#send")
        browser.wait(f"{TEXTS}[1]?.length > 10")
        browser.click("#stop")
        browser.wait(IDLE)
        serving.wait(lambda counts: counts[:2] == (0, 0))
        assert browser.value(STATE) == "stopped"
        assert browser.value("document.querySelector('.error') === null")


def test_a_key_that_is_asked_for(browser, folder):
    with Serving(load_model(folder, num_threads=1), api_key="secret") as serving:
        start(browser, serving)
        browser.wait("!document.getElementById('key-label').hidden")
        assert "the key: missing" in browser.value(STATE)
        browser.type("Hi")
        browser.click("#send")
        browser.wait("document.querySelector('.error') !== null")
        assert browser.value("document.getElementById('text').value") == "Hi", "the message is not lost"
        browser.click("#key")
        browser.type("secret")
        browser.click("#send")
        browser.wait(f"document.querySelectorAll('.assistant').length === 1 && {IDLE}")
        assert browser.value("document.querySelector('.assistant').textContent")


def test_an_error_is_shown(browser, folder):
    with Serving(load_model(folder, num_threads=1, context_length=64)) as serving:
        start(browser, serving)
        browser.type("x" * 200)
        browser.click("#send")
        browser.wait("document.querySelector('.error') !== null")
        assert "the model has a context of 64" in browser.value("document.querySelector('.error').textContent")


def test_a_model_that_continues_texts(browser):
    with Serving(load_model(built_in(), num_threads=1)) as serving:
        start(browser, serving)
        browser.wait("document.getElementById('model').textContent.includes('not made to chat')")
        browser.type("def f(")
        browser.click("#send")
        browser.wait(f"{TEXTS}.length === 2 && {IDLE}")
        body = {"prompt": "def f(", "temperature": 0, "max_tokens": 40}
        assert browser.value(TEXTS)[1] == serving.document("/v1/completions", body)["choices"][0]["text"]
