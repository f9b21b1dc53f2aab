"""``marlin_cy.decoder.text``: tokens, characters that are never broken, special tokens, damaged files."""

import json

import pytest

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from fake_model import write_tokenizer  # noqa: E402
from tokenizers import decoders, models, normalizers, processors  # noqa: E402

from marlin_cy.decoder.detokenize import TextStream, read_decoding  # noqa: E402
from marlin_cy.decoder.text import Tokenizer  # noqa: E402
from marlin_cy.errors import BackendUnavailable, CheckpointError, UnsupportedError  # noqa: E402

TEXT = "Grüße, 世界! 👩‍🚀 e\u0301 \U0010ffff\n"
LEFTOVER = "\ufffd"


def write_sentencepiece(folder, *, strip=1):
    """A tokenizer like Llama's: ``▁`` for spaces, one token for each other character, bytes for unknown ones."""
    characters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"helowrd", "▁▁"]
    vocabulary = {token: index for index, token in enumerate(characters)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [("▁", "▁")], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", strip, 0)] * (strip > 0))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}')
    return folder


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer(write_tokenizer(tmp_path))


@pytest.fixture
def sentencepiece(tmp_path):
    return Tokenizer(write_sentencepiece(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer", "sentencepiece"])
def test_a_character_comes_when_it_is_complete(name, request):
    tokenizer = request.getfixturevalue(name)
    stream, pieces = tokenizer.stream(), []
    for token in tokenizer.encode(TEXT):
        pieces.append(stream.put(token))
    assert "".join(pieces) == TEXT
    assert stream.finish() == ""
    assert all(len(piece) <= 1 for piece in pieces)
    assert pieces.count("") > 10
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_text_is_that_of_the_package(tmp_path, rng):
    """For whole texts, valid or not."""
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    whole = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for length in range(40):
        tokens = rng.integers(0, 264, length).tolist()
        assert tokenizer.decode(tokens) == whole.decode(tokens)
        tokens = rng.choice(list(TEXT.encode()), length).tolist()
        assert tokenizer.decode(tokens) == whole.decode(tokens)


def test_bytes_that_never_become_a_character(tokenizer):
    """They come out as soon as it is sure that they are not the beginning of a character."""
    stream = tokenizer.stream()
    assert [stream.put(byte) for byte in (0xFF, 0x41, 0xE2, 0x82, 0x42, 0xF0)] == [LEFTOVER, "A", "", "", "\ufffdB", ""]
    assert stream.finish() == LEFTOVER
    assert stream.finish() == ""


def test_special_tokens_have_no_text(tokenizer, sentencepiece):
    assert tokenizer.decode([104, 256, 105]) == "hi"
    assert tokenizer.decode([0xC3, 256, 0xBC]) == "ü"
    assert tokenizer.decode([263, 10**6]) == ""  # padding of the model's vocabulary
    assert sentencepiece.decode([1, *sentencepiece.encode("hello", special=False), 2]) == "hello"


def test_added_tokens_that_are_not_special_have(tmp_path):
    write_tokenizer(tmp_path)
    changed = json.loads((tmp_path / "tokenizer.json").read_text())
    added = {**changed["added_tokens"][0], "id": 257, "content": "<ich denke – laut>", "special": False}
    changed["added_tokens"].append(added)
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("<ich denke – laut>a") == [257, 97]
    assert tokenizer.decode([257, 97]) == "<ich denke – laut>a"


def test_spaces_at_the_start(tmp_path):
    """SentencePiece puts one before a text. In the middle of a text it is a space."""
    tokenizer = Tokenizer(write_sentencepiece(tmp_path))
    tokens = tokenizer.encode("hello world")
    assert tokenizer.decode(tokens) == "hello world"
    assert tokenizer.decode(tokenizer.encode("  hello")) == "  hello"
    for continues, expected in ((True, " world"), (False, "world")):
        stream = tokenizer.stream(continues=continues)
        assert "".join(map(stream.put, tokens[7:])) == expected
    assert Tokenizer(write_sentencepiece(tmp_path, strip=0)).decode(tokens) == " hello world"


def test_a_stream_strips_spaces_across_tokens():
    stream = TextStream({0: b" ", 1: b"", 2: b" a", 3: b"\xc3"}.__getitem__, 2)
    assert [stream.put(token) for token in (0, 1, 2, 0, 3)] == ["", "", "a", " ", ""]
    assert stream.finish() == LEFTOVER


def test_tokens_at_the_start(tmp_path, sentencepiece):
    assert sentencepiece.encode("h")[0] == 1
    assert 1 not in sentencepiece.encode("h", special=False)
    write_tokenizer(tmp_path, bos_token="<eos>", add_bos_token=True)
    assert Tokenizer(tmp_path).encode("h") == [104]  # the post-processor of tokenizer.json decides
    changed = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**changed, "post_processor": None}))
    assert Tokenizer(tmp_path).encode("h") == [256, 104]
    assert Tokenizer(tmp_path).encode("h", special=False) == [104]
    for bos in (None, "<bos>"):
        write = {"add_bos_token": True, "bos_token": bos}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(write))
        with pytest.raises(CheckpointError, match=r"tokenizer_config.json: add_bos_token: got true, but bos_token"):
            Tokenizer(tmp_path)


def test_texts_are_neither_cut_nor_padded(tmp_path):
    write_tokenizer(tmp_path)
    whole = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    whole.enable_truncation(4)
    whole.enable_padding(length=8)
    whole.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer(tmp_path).encode("a" * 100)) == 100
    assert len(Tokenizer(tmp_path).encode("a")) == 1


def test_stop_ids(tmp_path):
    write_tokenizer(tmp_path)

    def stop_ids(**files):
        for name in ("generation_config", "config"):
            (tmp_path / f"{name}.json").write_text(json.dumps(files.get(name, {})))
        return Tokenizer(tmp_path).stop_ids

    assert stop_ids() == {256}  # that of tokenizer_config.json
    assert stop_ids(config={"eos_token_id": 7}) == {7}
    assert stop_ids(config={"text_config": {"eos_token_id": [7, 8]}}) == {7, 8}
    assert stop_ids(config={"eos_token_id": None}, generation_config={"eos_token_id": [3, 4]}) == {3, 4}
    assert stop_ids(config={"eos_token_id": 5}, generation_config={"eos_token_id": 3}) == {3, 5}
    for value in ("</s>", -1, [1.5], [True], {}):
        with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id: got "):
            stop_ids(generation_config={"eos_token_id": value})


def test_special_tokens(tmp_path):
    write_tokenizer(tmp_path, bos_token={"content": "<b>", "special": True}, extra_special_tokens={"image": "<i>"})
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<p>", "bos_token": "<other>"}')
    expected = {"bos_token": "<b>", "eos_token": "<eos>", "pad_token": "<p>", "image": "<i>"}
    assert Tokenizer(tmp_path).special_tokens == expected
    write_tokenizer(tmp_path, additional_special_tokens=["<a>", {"content": "<c>"}])
    assert Tokenizer(tmp_path).special_tokens["additional_special_tokens"] == ["<a>", "<c>"]
    for value in (5, {"text": "<b>"}, ["<b>"]):
        write_tokenizer(tmp_path, bos_token=value)
        with pytest.raises(CheckpointError, match=r"tokenizer_config.json: bos_token: got .*, expected a token"):
            Tokenizer(tmp_path)


def test_texts_that_are_not_unicode(tokenizer):
    with pytest.raises(ValueError, match="^text: got a lone surrogate at character 2"):
        tokenizer.encode("ab\udcff")
    with pytest.raises(TypeError, match="^text: got bytes"):
        tokenizer.encode(b"ab")


# ---------------------------------------------------------------------------------------------
# Files


def test_a_folder_without_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file") as raised:
        Tokenizer(tmp_path)
    assert raised.value.file == str(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UnsupportedError, match=r"got a tokenizer in tokenizer\.model, expected tokenizer\.json"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"[]", b"\xff\xfe", b'{"version": "1.0", "model": {"type": "X"}}']
)
def test_damaged_tokenizers(tmp_path, content):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        Tokenizer(tmp_path)
    assert raised.value.file == str(tmp_path / "tokenizer.json")


def test_tokenizers_that_are_cut_or_changed(tmp_path, rng):
    """A damaged file is refused with the file's name, or gives a tokenizer that works."""
    write_tokenizer(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_bytes()
    for _ in range(60):
        damaged = bytearray(whole[: int(rng.integers(1, len(whole)))] if rng.random() < 0.3 else whole)
        for position in rng.integers(0, len(damaged), 3):
            damaged[position] = int(rng.integers(32, 127))
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        try:
            assert isinstance(Tokenizer(tmp_path).decode([65, 256]), str)
        except (CheckpointError, UnsupportedError) as error:
            assert "tokenizer.json" in str(error)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "config.json"])
def test_damaged_configs(tmp_path, name):
    write_tokenizer(tmp_path)
    for content in ("{", "[1]", "\udcff"):
        (tmp_path / name).write_text(content, errors="surrogateescape")
        with pytest.raises(CheckpointError) as raised:
            Tokenizer(tmp_path)
        assert raised.value.file == str(tmp_path / name)


@pytest.mark.parametrize(
    "step",
    [
        None,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Replace", "pattern": {"Regex": "a+"}, "content": " "},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},  # of each token, not of the text
        {"type": "CTC"},
    ],
)
def test_decoders_that_are_not_known(step):
    for declaration in (step, {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, step]}):
        with pytest.raises(UnsupportedError, match=r"tokenizer\.json: decoder: got "):
            read_decoding(declaration)


@pytest.mark.parametrize(("scheme", "stripped"), [("always", 1), ("first", 1), ("never", 0)])
def test_metaspace(scheme, stripped):
    decoding = read_decoding({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme})
    assert (decoding.stripped, decoding.bytes_of("▁a▁"), decoding.bytes_of("<0x41>")) == (stripped, b" a ", b"<0x41>")


def test_without_the_packages(tmp_path, monkeypatch):
    write_tokenizer(tmp_path, chat_template="{{ messages }}")
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'marlin-cy\[text\]'"):
        Tokenizer(tmp_path)
