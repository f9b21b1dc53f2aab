"""Chat templates: as transformers renders them, and those that fail or do not end."""

import sys
import time

import pytest

jinja2 = pytest.importorskip("jinja2", reason="jinja2 is not installed")

from fake_model import write_tokenizer  # noqa: E402

from marlin_cy.decoder import template  # noqa: E402
from marlin_cy.decoder.text import Tokenizer  # noqa: E402
from marlin_cy.errors import BackendUnavailable, CheckpointError  # noqa: E402
from marlin_cy.formats.json_fields import read_json  # noqa: E402

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<b>&amp; 世界"},
    {"role": "assistant", "content": "Yes.", "tool_calls": [{"name": "f", "arguments": {"x": [1, 2.5, None]}}]},
    {"role": "user", "content": "Why?"},
]
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
TEMPLATES = {
    "chatml": CHATML,
    "loop controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% elif m.role == 'assistant' %}"
    "{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "tojson": "{{ messages | tojson }}\n{{ messages[2].tool_calls | tojson(indent=2, sort_keys=true) }}",
    "namespace": "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.last = m.role %}{% endfor %}{{ ns.n }}{{ ns.last }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ nothing }}",
    "not given": "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ x is defined }}",
    "macros": "{% macro say(m) %}[{{ m.role }}: {{ m.content }}]{% endmacro %}"
    "{% for m in messages %}{{ say(m) }}{% endfor %}",
    "trim": "  {% if true %}\n  a\n  {% endif %}\n b\n",
    "python": "{{ messages[1].content.split('&')[0] * 2 }}{{ 'a' ~ 2 ** 10 }}{{ messages[::-1][0].content.upper() }}"
    "{{ dict(a=1) | tojson }}{{ range(3) | list }}{{ '%s' | format('x') }}{{ strftime_now('%Y')[:2] }}",
}


def render(folder, source, messages=MESSAGES, **arguments):
    write_tokenizer(folder, chat_template=source, bos_token="<b>", pad_token="<eos>")
    tokenizer = Tokenizer(folder)
    return tokenizer.decode(tokenizer.chat_tokens(messages, **arguments))


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")
    write_tokenizer(tmp_path, chat_template=TEMPLATES[name], bos_token="<b>", pad_token="<eos>")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    ours = Tokenizer(tmp_path)
    found = template.ChatTemplate(tmp_path, read_json(tmp_path / "tokenizer_config.json"), ours.special_tokens)
    assert found.render(MESSAGES) == expected
    assert ours.chat_tokens(MESSAGES) == ours.encode(expected, special=False)


def test_the_prompt(tmp_path):
    assert render(tmp_path, CHATML, MESSAGES[:1]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_it_is_given(tmp_path):
    source = "{{ tools[0].name }}{{ documents[0].text }}{{ enable_thinking }}{{ messages[0].get('name', '-') }}"
    messages = [{"role": "user", "content": ("a", "b"), "name": None}]
    options = {"enable_thinking": False}
    tools, documents = [{"name": "f"}], ({"text": "t"},)
    assert render(tmp_path, source, messages, tools=tools, documents=documents, options=options) == "ftFalse-"
    assert messages[0]["name"] is None


def test_where_templates_are(tmp_path):
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    assert render(tmp_path, named) == "one"
    assert render(tmp_path, named, tools=[]) == "two"
    assert render(tmp_path, named[:1], tools=[]) == "one"
    (tmp_path / "chat_template.jinja").write_text("from the file: ü")
    assert render(tmp_path, named) == "from the file: ü"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: cannot be read"):
        render(tmp_path, None)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "no chat template here or in chat_template.jinja"),
        (5, "expected a text or a list of objects with name and template"),
        ([{"name": "default"}], "chat_template: got {'name': 'default'}"),
        ([{"name": "rag", "template": ""}], "got templates rag, expected one with the name 'default'"),
        ([], "got templates , expected one"),
        ("{% if %}", "line 1: "),
        ("\n{{ a b }}", "line 2: "),
        ("{{ messages[0].name.first }}", "it needs what was not given: "),
        ("{{ answer() }}", "it needs what was not given: 'answer' is undefined"),
        ("{{ raise_exception('Roles must alternate') }}", "fails: Roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError: "),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself without end"),
        ("{% for i in range(1000000000) %}a{% endfor %}", "Range too big"),
        ("{{ 'a' * 10 ** 10 }}", "a size of 10000000000"),
        ("{{ [1] * 10 ** 9 }}", "a size of 1000000000"),
        ("{{ 9 ** 999999999 }}", "a size of"),
        ("{{ messages.__class__.__mro__ }}", "is unsafe"),
        ("{% do messages.append(1) %}", "line 1: "),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{{ messages[0].update(role='x') }}", "'update' of 'dict' object is unsafe"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "cannot have the name '_x'"),
        ("{% include 'other' %}", "no loader for this environment"),
    ],
)
def test_templates_that_fail(tmp_path, source, reason):
    with pytest.raises(CheckpointError) as raised:
        render(tmp_path, source)
    assert reason in str(raised.value)
    assert raised.value.file == str(tmp_path / "tokenizer_config.json")


@pytest.mark.parametrize(
    "source",
    [
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}"
        "{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ lipsum(n=100000000) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
    ],
)
def test_templates_that_do_not_end(tmp_path, monkeypatch, source):
    monkeypatch.setattr(template, "MAX_SECONDS", 0.3)
    monkeypatch.setattr(template, "MAX_CHARACTERS", 10**6)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"it has not ended after 0\.3 seconds|more than 1000000 characters"):
        render(tmp_path, source)
    assert time.monotonic() - start < 30


def test_ctrl_c_in_a_template(tmp_path, monkeypatch):
    def interrupt(message):
        raise KeyboardInterrupt

    monkeypatch.setattr(template, "_raise_exception", interrupt)
    with pytest.raises(KeyboardInterrupt):
        render(tmp_path, "{{ raise_exception('') }}")


@pytest.mark.parametrize(
    ("messages", "error", "reason"),
    [
        ([], ValueError, "messages: got no message"),
        ("Hello", TypeError, "messages: got str, expected a list of dicts"),
        ({"role": "user"}, TypeError, "messages: got dict"),
        (5, TypeError, "messages: got int"),
        (["Hello"], TypeError, r"messages\[0\]: got str, expected a dict"),
        ([{"content": "a"}], ValueError, r"messages\[0\]\['role'\]: got None"),
        ([{"role": "user"}, {"role": 3}], ValueError, r"messages\[1\]\['role'\]: got 3"),
        ([{"role": "user", "content": b"a"}], TypeError, r"messages\[0\]: .*bytes"),
        ([{"role": "user", "content": "\udcff"}], ValueError, "lone surrogate"),
    ],
)
def test_invalid_messages(tmp_path, messages, error, reason):
    with pytest.raises(error, match=reason) as raised:
        render(tmp_path, CHATML, messages)
    assert not isinstance(raised.value, CheckpointError)


def test_invalid_options(tmp_path):
    for arguments in ({"tools": [print]}, {"documents": [{1, 2}]}, {"options": {"f": print}}):
        with pytest.raises(TypeError, match=rf"^{list(arguments)[0]}.*expected data that JSON can hold"):
            render(tmp_path, CHATML, **arguments)


def test_without_jinja2(tmp_path, monkeypatch):
    tokenizer = Tokenizer(write_tokenizer(tmp_path, chat_template=CHATML))
    monkeypatch.delitem(sys.modules, "marlin_cy.decoder.template")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'marlin-cy\[text\]'"):
        tokenizer.chat_tokens(MESSAGES)
