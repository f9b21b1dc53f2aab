"""Tokenizers, chat templates and settings of generation that GGUF files have."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf", reason="gguf is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from gguf_files import Entry, tokenizer_fields, write_gguf  # noqa: E402

from marlin_cy.checkpoints.gguf.documents import read_document  # noqa: E402
from marlin_cy.checkpoints.gguf.pretokenizers import CUTTINGS  # noqa: E402
from marlin_cy.decoder.sampling import read_sampling  # noqa: E402
from marlin_cy.decoder.text import Tokenizer  # noqa: E402
from marlin_cy.errors import CheckpointError, UnsupportedError  # noqa: E402

BUILT_IN = Path(__file__).parents[1] / "marlin_cy/data/tiny-qwen3-moe-gptq-int4"
TEXTS = (
    "Hello world, it's 12345 o'clock.\n\n  It'LL be  fine\t!\r\n",
    "naïve café ÅÅ e\u0301 日本語のテキスト한국어 ελληνικά кириллица",
    "fn main() { let x = vec![1, 2, 3]; }  // ok?!?",
    "🚀 (normal) 😶\u200d🌫️ <|im_start|>user<think>x</think><|im_end|>",
    " leading and trailing ",
    "",
)
TRAINING = [*TEXTS, "the quick brown fox jumps over the lazy dog " * 3, "Hello hello world world 123 123 12 12"] * 4
CONFIG = {
    "qwen3moe.block_count": 1,
    "qwen3moe.context_length": 64,
    "qwen3moe.embedding_length": 32,
    "qwen3moe.attention.head_count": 2,
    "qwen3moe.attention.layer_norm_rms_epsilon": 1e-6,
    "qwen3moe.expert_count": 2,
    "qwen3moe.expert_used_count": 1,
    "qwen3moe.expert_feed_forward_length": 32,
}


def write(folder, fields, rows=1000):
    """A file with a tokenizer, and with the tensor that says how many tokens there are."""
    path = folder / "model.gguf"
    tensors = {"token_embd.weight": Entry(np.zeros((rows, 32)))}
    write_gguf(path, {"general.architecture": "qwen3moe"} | CONFIG | fields, tensors)
    return path


def byte_level(cutting, *, special=("<|im_start|>", "<|im_end|>"), added=("<think>", "</think>")):
    """A trained byte-level BPE of the package tokenizers, which cuts texts as a row says."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trained

    trained = Trained(models.BPE(ignore_merges=cutting.ignore_merges))
    trained.normalizer = normalizers.NFC() if cutting.nfc else None
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cutting.patterns]
    trained.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), min_frequency=2
    )
    trained.train_from_iterator(TRAINING, trainer)
    trained.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    trained.add_tokens([AddedToken(token, normalized=False) for token in added])
    return trained


# ---------------------------------------------------------------------------------------------
# Tokens


@pytest.mark.parametrize("name", CUTTINGS)
def test_tokens_are_those_of_the_source(tmp_path, name):
    source = byte_level(CUTTINGS[name])
    fields = tokenizer_fields(json.loads(source.to_str()), {}, name, **{"tokenizer.ggml.add_bos_token": False})
    tokenizer = Tokenizer(write(tmp_path, fields))
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert tokens == source.encode(text).ids
        assert tokenizer.decode(tokens) == source.decode(source.encode(text).ids)


PIECES = {
    "gpt-2": ["Hello", " world", "'s", " 12345", "!?"],
    "qwen2": ["Hello", " world", "'S", " ", "1", "2", "3", "!?"],
    "llama-bpe": ["Hello", " world", "'S", " ", "123", "45", "!?"],
    "gpt-4o": ["Hello", "World's", " ", "123", "45", "!?/"],
    "deepseek-v3": ["123", "45", "日本", " Hello", " world", "!?"],
    "tekken": ["Hello", "World", " ", "1", "2"],
    "kimi-k2": ["日本", "Hello", "World's", "123", "45"],
    "glm4": ["Hello", "'S", "123", "4"],
    "qwen35": ["e\u0301", " e", "1", "2"],
    "deepseek-llm": ["Hello", " world", "12345", "!?", "\n"],
}


@pytest.mark.parametrize("name", PIECES)
def test_how_texts_are_cut(name):
    """Pieces that each way of cutting is known to make."""
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in CUTTINGS[name].patterns]
    found = [piece for piece, _ in pre_tokenizers.Sequence(splits).pre_tokenize_str("".join(PIECES[name]))]
    assert found == PIECES[name]


def test_the_built_in_model(tmp_path):
    document, config = (
        json.loads((BUILT_IN / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")
    )
    ours, source = Tokenizer(write(tmp_path, tokenizer_fields(document, config))), Tokenizer(BUILT_IN)
    for text in (*TEXTS, "a<eos>b"):
        assert ours.encode(text) == source.encode(text)
        assert ours.decode(ours.encode(text)) == source.decode(source.encode(text))
    assert (ours.stop_ids, ours.special_tokens["eos_token"]) == (source.stop_ids, "<eos>")


SENTENCEPIECE = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
WORDS = ["▁", *"helowrd", "he", "ll", "llo", "hello", "▁hello", "wor", "ld", "world", "▁world", "or", "▁w", "▁h"]


def sentencepiece_fields(**others):
    tokens = SENTENCEPIECE + WORDS
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(SENTENCEPIECE) + [-float(index) for index in range(len(WORDS))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(WORDS),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | others


def by_scores(text, tokens, scores):
    """SentencePiece's BPE, slow and obvious: of all neighbours, join the two whose result has the highest score."""
    pieces = list(text)
    while True:
        joined = [
            (scores[a + b], -i) for i, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False)) if a + b in scores
        ]
        if not joined:
            break
        place = -max(joined)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    ids = []
    for piece in pieces:
        found = [tokens.index(piece)] if piece in tokens else [tokens.index(f"<0x{b:02X}>") for b in piece.encode()]
        ids += found
    return ids


@pytest.mark.parametrize("text", ["hello world", "helloworld", "  hello", "wörld ☃", "", "hellohello world world"])
@pytest.mark.parametrize("prefix", [None, True, False])
def test_sentencepiece(tmp_path, text, prefix):
    others = {} if prefix is None else {"tokenizer.ggml.add_space_prefix": prefix}
    fields = sentencepiece_fields(**others)
    tokenizer = Tokenizer(write(tmp_path, fields))
    tokens = fields["tokenizer.ggml.tokens"]
    scores = dict(zip(WORDS, fields["tokenizer.ggml.scores"][-len(WORDS) :], strict=True))
    prepared = text.replace(" ", "▁")
    if prefix is not False and text:
        prepared = f"▁{prepared}"
    assert tokenizer.encode(text) == [1, *by_scores(prepared, tokens, scores)]
    assert tokenizer.encode(text, special=False) == by_scores(prepared, tokens, scores)
    assert tokenizer.decode(tokenizer.encode(text)) == text


# ---------------------------------------------------------------------------------------------
# First and last tokens, ends, templates, sampling


@pytest.fixture(scope="module")
def fields():
    return tokenizer_fields(json.loads(byte_level(CUTTINGS["qwen2"]).to_str()), {}, "qwen2")


@pytest.mark.parametrize(
    ("pre", "added", "expected"),
    [
        ("qwen2", {}, (False, False)),
        ("llama-bpe", {}, (True, False)),
        ("llama-bpe", {"add_bos_token": False}, (False, False)),
        ("qwen2", {"add_bos_token": True, "add_eos_token": True}, (True, True)),
        ("tekken", {"add_eos_token": True}, (True, True)),
    ],
)
def test_the_first_and_the_last_token(tmp_path, fields, pre, added, expected):
    first, last = (fields["tokenizer.ggml.tokens"].index(name) for name in ("<|im_start|>", "<|im_end|>"))
    others = {f"tokenizer.ggml.{name}": value for name, value in added.items()}
    ids = {"tokenizer.ggml.bos_token_id": first, "tokenizer.ggml.eos_token_id": last, "tokenizer.ggml.pre": pre}
    tokenizer = Tokenizer(write(tmp_path, fields | ids | others))
    bare = tokenizer.encode("hello", special=False)
    assert tokenizer.encode("hello") == [first] * expected[0] + bare + [last] * expected[1]


def test_tokens_that_end_a_text(tmp_path, fields):
    tokens, kinds = list(fields["tokenizer.ggml.tokens"]), list(fields["tokenizer.ggml.token_type"])
    tokens += ["<|endoftext|>", "<|end|>", "<|return|>", "<|call|>", "<|eot_id|>", "[EOT]"]
    kinds += [3, 3, 3, 3, 1, 3]  # one of them is a token of the text
    id_of = tokens.index
    changes = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.eos_token_id": 5,
        "tokenizer.ggml.eot_token_id": 6,
    }
    tokenizer = Tokenizer(write(tmp_path, fields | changes))
    named = {"<|endoftext|>", "<|return|>", "<|call|>", "[EOT]", "<|im_end|>"}
    assert tokenizer.stop_ids == {5, 6, *map(id_of, named)}
    without = fields | changes | {"tokenizer.ggml.tokens": [token.replace("<|call|>", "x") for token in tokens]}
    assert id_of("<|end|>") in Tokenizer(write(tmp_path, without)).stop_ids


def test_chat_templates(tmp_path, fields):
    template = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    path = write(tmp_path, fields | {"tokenizer.chat_template": template})
    tokenizer = Tokenizer(path)
    expected = tokenizer.encode("<|im_start|>user hello<|im_end|>", special=False)
    assert tokenizer.chat_tokens([{"role": "user", "content": "hello"}]) == expected
    named = {"tokenizer.chat_template.tool_use": "tools", "tokenizer.chat_template": template}
    tokenizer = Tokenizer(write(tmp_path, fields | named))
    assert tokenizer.chat_tokens([{"role": "user", "content": "hello"}]) == expected
    assert tokenizer.decode(tokenizer.chat_tokens([{"role": "user", "content": "x"}], tools=[{}])) == "tools"
    with pytest.raises(CheckpointError, match="no chat template"):
        Tokenizer(write(tmp_path, fields)).check_chat()


def test_settings_of_sampling(tmp_path, fields):
    given = {"temp": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "penalty_repeat": 1.1}
    path = write(tmp_path, fields | {f"general.sampling.{name}": value for name, value in given.items()})
    params = read_sampling(path)
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.7, 20, 0.8, 0.05)
    assert params.repetition_penalty == 1.1
    assert read_sampling(write(tmp_path, fields)).temperature is None
    with pytest.raises(CheckpointError, match="top_p"):
        read_sampling(write(tmp_path, fields | {"general.sampling.top_p": 3.0}))


def test_documents(tmp_path, fields):
    path = write(tmp_path, fields)
    assert read_document(path, "config.json")["model_type"] == "qwen3_moe"
    assert read_document(tmp_path, "config.json") == read_document(path, "config.json")
    assert read_document(path, "special_tokens_map.json") == {}
    path.unlink()
    assert read_document(tmp_path, "config.json") == {}
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert read_document(tmp_path, "config.json") == {"a": 1}


# ---------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokenizer.ggml.model": "none"}, CheckpointError, "the file has no tokenizer"),
        ({"tokenizer.ggml.model": "t5"}, UnsupportedError, "a tokenizer of kind 't5', supported: gpt2, llama"),
        ({"tokenizer.ggml.model": 3}, CheckpointError, "tokenizer.ggml.model: got '3', expected a string"),
        ({"tokenizer.ggml.pre": "unheard"}, UnsupportedError, "tokenizer.ggml.pre: 'unheard' is not known"),
        (
            {"tokenizer.ggml.tokens": ["a"] * 1001},
            CheckpointError,
            "got 1001 tokens, but token_embd.weight has 1000 rows",
        ),
        ({"tokenizer.ggml.tokens": 1}, CheckpointError, "expected an array of strings"),
        ({"tokenizer.ggml.tokens": None}, CheckpointError, "tokenizer.ggml.tokens: missing"),
        ({"tokenizer.ggml.token_type": [1]}, CheckpointError, "token_type: got .* expected .* integers"),
        (
            {"tokenizer.ggml.merges": ["ab"]},
            CheckpointError,
            "merges: got 'ab', expected two tokens with a space between",
        ),
        ({"tokenizer.ggml.merges": ["nope nope"]}, CheckpointError, "no tokenizer that the package tokenizers reads"),
        ({"tokenizer.ggml.merges": None}, CheckpointError, "tokenizer.ggml.merges: missing"),
        ({"tokenizer.ggml.eos_token_id": 5000}, CheckpointError, "eos_token_id: got 5000, expected 0 to"),
        ({"tokenizer.ggml.bos_token_id": "x"}, CheckpointError, "bos_token_id: got 'x', expected an integer"),
        ({"tokenizer.ggml.add_bos_token": True}, CheckpointError, "tokenizer.ggml.bos_token_id: missing"),
        ({"tokenizer.ggml.add_bos_token": 1}, CheckpointError, "expected a truth value"),
    ],
)
def test_damaged_tokenizers(tmp_path, fields, changes, error, message):
    changed = {name: value for name, value in (fields | changes).items() if value is not None}
    with pytest.raises(error, match=message) as caught:
        Tokenizer(write(tmp_path, changed))
    assert "model.gguf" in str(caught.value)


@pytest.mark.parametrize("scores", [None, [0.0], "x"])
def test_damaged_scores(tmp_path, scores):
    changed = sentencepiece_fields(**{"tokenizer.ggml.scores": scores})
    with pytest.raises(CheckpointError, match="tokenizer.ggml.scores: got .* numbers"):
        Tokenizer(write(tmp_path, {name: value for name, value in changed.items() if value is not None}))
