"""The JSON files of a checkpoint, for a folder that has them and for a GGUF file that says the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from marlin_cy.checkpoints.gguf.files import find_gguf
from marlin_cy.checkpoints.gguf.metadata import Metadata
from marlin_cy.checkpoints.gguf.model import GgufModel, open_gguf
from marlin_cy.checkpoints.gguf.tokenizer import generation_config, tokenizer_config, tokenizer_json
from marlin_cy.formats.json_fields import JsonObject, read_json

__all__ = ["TOKENIZER", "gguf_documents", "read_document"]

TOKENIZER = "tokenizer.json"

WRITERS: Mapping[str, Callable[[GgufModel], JsonObject]] = {
    "config.json": lambda model: model.config,
    "generation_config.json": lambda model: generation_config(Metadata(model.header)),
    "tokenizer_config.json": lambda model: tokenizer_config(Metadata(model.header)),
    TOKENIZER: lambda model: tokenizer_json(Metadata(model.header)),
}
"""What a GGUF model says in the place of each file."""


def read_document(path: Path, name: str) -> JsonObject:
    """The object that a JSON file of a checkpoint holds; an empty one where the checkpoint has no such file.

    Parameters
    ----------
    path : Path
        A folder, or a GGUF file.
    name : str
        ``"config.json"``, ``"generation_config.json"``, ...

    Raises
    ------
    CheckpointError, UnsupportedError
    """
    gguf = find_gguf(path)
    if gguf is None:
        file = path / name
        return read_json(file) if file.exists() else {}
    return WRITERS[name](open_gguf(gguf)) if name in WRITERS else {}


def gguf_documents(path: Path) -> dict[str, JsonObject]:
    """All files that a GGUF model stands for, but ``config.json``; without a tokenizer, no tokenizer's files."""
    model = open_gguf(path)
    fields = Metadata(model.header)
    names = ["generation_config.json"]
    if fields.strings("tokenizer.ggml.tokens") is not None:
        names += ["tokenizer_config.json", TOKENIZER]
    return {name: WRITERS[name](model) for name in names}
