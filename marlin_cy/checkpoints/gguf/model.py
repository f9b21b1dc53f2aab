"""A GGUF model: configuration and tensors of one path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from marlin_cy.checkpoints.gguf.architectures import Architecture, find_architecture
from marlin_cy.checkpoints.gguf.metadata import Metadata
from marlin_cy.checkpoints.gguf.reader import Header, read_header
from marlin_cy.checkpoints.gguf.tensors import GgufTensors
from marlin_cy.formats.json_fields import JsonObject

__all__ = ["GgufModel", "open_gguf"]


@dataclass(frozen=True, eq=False)
class GgufModel:
    """A model.

    Attributes
    ----------
    header : Header
    architecture : Architecture
    config : dict
        What ``config.json`` would say.
    """

    header: Header
    architecture: Architecture
    config: JsonObject

    def tensors(self) -> GgufTensors:
        """The tensors, checked; the files are mapped."""
        return GgufTensors(self.header, self.architecture, self.config)


def open_gguf(path: Path) -> GgufModel:
    """Read a model's header and configuration.

    Raises
    ------
    CheckpointError
        A file is missing or damaged, or a field is missing or invalid.
    UnsupportedError
        A version, an architecture, a type or a setting that is not supported.
    BackendUnavailable
        The package ``gguf`` is not installed.
    """
    header = read_header(path)
    fields = Metadata(header)
    architecture = find_architecture(fields)
    return GgufModel(header, architecture, {"model_type": architecture.model_type, **architecture.read(fields)})
