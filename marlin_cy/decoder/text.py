"""The tokenizer of a folder: from text to token ids and back, and from messages to a prompt.

The folder's ``tokenizer.json`` is run by the package ``tokenizers``, and its chat template by ``jinja2``. Both belong
to the extra ``text``; neither PyTorch nor transformers is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

from marlin_cy.checkpoints.gguf.documents import read_document
from marlin_cy.checkpoints.gguf.files import find_gguf
from marlin_cy.decoder.detokenize import TextStream, read_decoding
from marlin_cy.errors import CheckpointError, MarlinError, UnsupportedError
from marlin_cy.extras import needs
from marlin_cy.formats.json_fields import JsonObject, StrPath, optional

__all__ = ["Tokenizer", "needs_text"]

TOKENIZER, CONFIG, LEGACY = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
# Tokenizers in other forms, which transformers may convert.
OTHER_FORMS = ("tokenizer.model", "tiktoken.model", "vocab.json", "spiece.model")
SPECIAL_TOKENS = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    *("additional_special_tokens", "extra_special_tokens"),
)


class Tokenizer:
    """The tokenizer of a checkpoint's folder.

    Parameters
    ----------
    folder : path-like
        ``tokenizer.json`` is required. ``tokenizer_config.json``, ``special_tokens_map.json``,
        ``generation_config.json``, ``config.json`` and the files of chat templates are read where they exist. Or a GGUF
        file, which says the same.

    Attributes
    ----------
    folder : Path
    special_tokens : dict
        From names such as ``bos_token`` to the text of the token.
    stop_ids : frozenset of int
        The tokens with which the model ends a text.

    Raises
    ------
    CheckpointError
        A file is missing or damaged.
    UnsupportedError
        The folder has a tokenizer in another form than ``tokenizer.json``, or its decoder is not known.
    BackendUnavailable
        The package ``tokenizers`` is not installed.
    """

    def __init__(self, folder: StrPath) -> None:
        self.folder = Path(folder)
        self._tokenizer = _open(self.folder)
        decoder = self._tokenizer.decoder
        self._decoding = read_decoding(None if decoder is None else json.loads(decoder.__getstate__()))
        self._bytes = _BytesOfTokens(self._tokenizer, self._decoding.bytes_of)
        self._config = read_document(self.folder, CONFIG)
        self.special_tokens = _special_tokens(self.folder, self._config)
        self._first = self._first_tokens()
        self.stop_ids = self._read_stop_ids()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of a text.

        Parameters
        ----------
        text : str
        special : bool
            Add the tokens that begin or end every text of this model, such as that of ``bos_token``.

        Raises
        ------
        TypeError, ValueError
            ``text`` is not a str, or not valid Unicode.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: got {type(text).__name__}, expected a str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text: got a lone surrogate at character {error.start}, expected Unicode") from None
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return self._first + tokens if special else tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special tokens."""
        stream = self.stream()
        return "".join([*map(stream.put, tokens), stream.finish()])

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; those of its name for a special token."""
        return self._bytes[token] or (self._tokenizer.id_to_token(token) or "").encode()

    def stream(self, *, continues: bool = False) -> TextStream:
        """A stream from tokens to text, without special tokens.

        Parameters
        ----------
        continues : bool
            The tokens continue a text. A space at their start then belongs to the text. At the start of a whole text,
            some tokenizers put a space that does not.
        """
        return TextStream(self._bytes.__getitem__, 0 if continues else self._decoding.stripped)

    def chat_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The tokens of a prompt that asks for the answer to messages. The arguments are those of the chat template.

        Raises
        ------
        CheckpointError
            The folder has no chat template, or the template fails on these messages.
        """
        template = self._template
        return self.encode(template.render(messages, tools=tools, documents=documents, options=options), special=False)

    def check_chat(self) -> None:
        """Check that the folder has a chat template.

        Raises
        ------
        CheckpointError
            It has no chat template.
        """
        _ = self._template

    @cached_property
    def _template(self) -> Any:
        with needs_text():
            from marlin_cy.decoder.template import ChatTemplate
        return ChatTemplate(self.folder, self._config, self.special_tokens)

    def _first_tokens(self) -> list[int]:
        """The tokens before every text that ``tokenizer.json`` does not add: where it has no post-processor."""
        file = self.folder / CONFIG
        if self._tokenizer.post_processor is not None or not optional(
            self._config, ["add_bos_token"], bool, file, False
        ):
            return []
        bos = self.special_tokens.get("bos_token")
        if bos is None or (token := self._tokenizer.token_to_id(bos)) is None:
            raise CheckpointError(f"add_bos_token: got true, but bos_token {bos!r} is no token", file=file)
        return [token]

    def _read_stop_ids(self) -> frozenset[int]:
        ids = {token for name in ("generation_config.json", "config.json") for token in _end_ids(self.folder, name)}
        end = self.special_tokens.get("eos_token")
        if not ids and end is not None and (token := self._tokenizer.token_to_id(end)) is not None:
            ids.add(token)
        return frozenset(ids)


class _BytesOfTokens(dict[int, bytes]):
    """From each token id to its bytes, looked up once. Special tokens and unused ids have none."""

    def __init__(self, tokenizer: Any, bytes_of: Any) -> None:
        special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        super().__init__(dict.fromkeys(special, b""))
        self._token_of, self._bytes_of = tokenizer.id_to_token, bytes_of

    def __missing__(self, token: int) -> bytes:
        text = self._token_of(token)
        value = self[token] = b"" if text is None else self._bytes_of(text)
        return value


def needs_text() -> AbstractContextManager[None]:
    """Context for imports of the extra ``text``: :func:`marlin_cy.extras.needs`."""
    return needs("tokenizers and jinja2", "text")


def _open(folder: Path) -> Any:
    """The tokenizer of ``tokenizers``, which neither cuts nor pads texts."""
    with needs_text():
        from tokenizers import Tokenizer as FileTokenizer
    file = folder / TOKENIZER
    gguf = find_gguf(folder)
    if gguf is None and not file.is_file():
        others = [name for name in OTHER_FORMS if (folder / name).exists()]
        if others:
            raise UnsupportedError(f"{folder}: got a tokenizer in {', '.join(others)}, expected {TOKENIZER}")
        raise CheckpointError("no such file, expected the tokenizer", file=file)
    try:
        if gguf is None:
            tokenizer = FileTokenizer.from_file(str(file))
        else:
            tokenizer = FileTokenizer.from_str(json.dumps(read_document(gguf, TOKENIZER)))
    except (KeyboardInterrupt, SystemExit, MarlinError):
        raise
    except BaseException as error:  # a panic of the package does not derive from Exception
        raise CheckpointError(f"no tokenizer that the package tokenizers reads: {error}", file=gguf or file) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _special_tokens(folder: Path, config: JsonObject) -> dict[str, Any]:
    """The special tokens by name: of ``tokenizer_config.json``, else of ``special_tokens_map.json``."""
    tokens: dict[str, Any] = {}
    for file, fields in ((folder / LEGACY, read_document(folder, LEGACY)), (folder / CONFIG, config)):
        for name in SPECIAL_TOKENS:
            match fields.get(name):
                case None | []:
                    pass
                case dict() as named if name == "extra_special_tokens":
                    tokens |= {key: _token_text(key, value, file) for key, value in named.items()}
                case list() as several if name.endswith("tokens"):
                    tokens[name] = [_token_text(name, value, file) for value in several]
                case value:
                    tokens[name] = _token_text(name, value, file)
    return tokens


def _token_text(name: str, value: Any, file: Path) -> str:
    """The text of a special token, which a file gives as a string, or as an object with the key ``content``."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise CheckpointError(f"{name}: got {value!r}, expected a token", file=file)
    return text


def _end_ids(folder: Path, name: str) -> list[int]:
    """``eos_token_id`` of a file: a token, a list of tokens, or nothing."""
    file, config = folder / name, read_document(folder, name)
    value = config.get("eos_token_id")
    if value is None and isinstance(text := config.get("text_config"), dict):
        value = text.get("eos_token_id")
    tokens = [] if value is None else value if isinstance(value, list) else [value]
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise CheckpointError(f"eos_token_id: got {value!r}, expected a token id or a list of them", file=file)
    return tokens
