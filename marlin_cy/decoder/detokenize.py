"""From token ids to text, one token at a time: bytes first, characters when they are complete.

A tokenizer's vocabulary holds pieces of UTF-8, and a character may be spread over several tokens. The text of a token
is therefore looked up as bytes, and an incremental decoder holds back the bytes of a character that is not complete::

    token id ── vocabulary ── "Ġhello" ── bytes of the declaration ── b" hello" ── UTF-8 decoder ── " hello"

Two kinds of vocabularies are read: byte-level ones, in which each character stands for a byte (source: GPT-2,
``encoder.py``), and those of SentencePiece, in which ``▁`` stands for a space and ``<0xE2>`` for a byte.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marlin_cy.errors import UnsupportedError

__all__ = ["Decoding", "TextStream", "read_decoding"]

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def read_decoding(declaration: Mapping[str, Any] | None) -> Decoding:
    """What ``decoder`` in ``tokenizer.json`` declares.

    Raises
    ------
    UnsupportedError
        The declaration has a step that is not a byte-level vocabulary's or SentencePiece's.
    """
    steps: Sequence[Mapping[str, Any] | None] = (
        declaration["decoders"] if declaration and declaration.get("type") == "Sequence" else [declaration]
    )
    byte_level = byte_tokens = fused = False
    replaced: list[tuple[str, str]] = []
    stripped = 0
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                byte_level = True
            case {"type": "ByteFallback"}:
                byte_tokens = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replaced.append((old, new))
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if fused:
                stripped = start
            case {"type": "Metaspace", "replacement": str(old), **others}:
                replaced.append((old, " "))
                stripped = int(others.get("prepend_scheme") != "never")
            case _:
                raise UnsupportedError(
                    f"tokenizer.json: decoder: got {step!r}, expected a byte-level decoder or one of "
                    "SentencePiece (Replace, ByteFallback, Fuse, Strip, Metaspace)"
                )
    return Decoding(byte_level, byte_tokens, tuple(replaced), stripped)


@dataclass(frozen=True)
class Decoding:
    """How a token of the vocabulary becomes bytes.

    Attributes
    ----------
    byte_level : bool
        Each character stands for a byte.
    byte_tokens : bool
        ``<0xE2>`` stands for a byte.
    replaced : tuple of (str, str)
        Replacements in a token's text, in order.
    stripped : int
        Spaces that a whole text has too many at its start.
    """

    byte_level: bool
    byte_tokens: bool
    replaced: tuple[tuple[str, str], ...]
    stripped: int

    def bytes_of(self, token: str) -> bytes:
        """The bytes that a token of the vocabulary stands for."""
        if self.byte_level:
            try:
                return bytes([BYTES_OF_CHARACTERS[character] for character in token])
            except KeyError:  # an added token, which is written as it is
                return token.encode()
        if self.byte_tokens and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in self.replaced:
            token = token.replace(old, new)
        return token.encode()


class TextStream:
    """The text of tokens that come one at a time. A character is given when it is complete.

    Bytes that are not UTF-8 become U+FFFD.

    Parameters
    ----------
    bytes_of : callable
        From a token id to the bytes that it stands for.
    stripped : int
        Spaces that are left out at the start.
    """

    def __init__(self, bytes_of: Callable[[int], bytes], stripped: int = 0) -> None:
        self._bytes_of = bytes_of
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._stripped = stripped

    def put(self, token: int) -> str:
        """The text that is complete with this token, which may be empty."""
        return self._without_spaces(self._decode(self._bytes_of(token)))

    def finish(self) -> str:
        """The rest: U+FFFD for a character that is not complete, else an empty text."""
        return self._without_spaces(self._decode(b"", True))

    def _without_spaces(self, text: str) -> str:
        while self._stripped and text:
            if text[0] != " ":
                self._stripped = 0
            else:
                text = text[1:]
                self._stripped -= 1
        return text


def _bytes_of_characters() -> dict[str, int]:
    """The alphabet of byte-level vocabularies: a printable byte is its character in Latin-1, others begin at U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES_OF_CHARACTERS = _bytes_of_characters()
