"""What a path holds: a quantiser's folder, a packed folder, or a GGUF model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from marlin_cy.checkpoints.calls import ForEach
from marlin_cy.checkpoints.families import Family, MoeSpec
from marlin_cy.checkpoints.gguf.files import find_gguf
from marlin_cy.checkpoints.gguf.model import open_gguf
from marlin_cy.checkpoints.gguf.source import GgufSource
from marlin_cy.checkpoints.gguf.tensors import GgufTensors
from marlin_cy.checkpoints.packed import PackedSource, is_packed
from marlin_cy.checkpoints.quantised import QuantizedSource
from marlin_cy.checkpoints.safetensors import SafetensorsFolder
from marlin_cy.checkpoints.scaled import ScaledLayers
from marlin_cy.errors import UnsupportedError
from marlin_cy.formats.deepseek_fp4 import DeepSeekFp4Scheme
from marlin_cy.formats.json_fields import JsonObject, read_json
from marlin_cy.formats.registry import read_scheme
from marlin_cy.formats.scheme import Scheme

__all__ = ["Contents", "Source", "Tensors", "new_source", "open_contents"]

Tensors: TypeAlias = SafetensorsFolder | GgufTensors
Source: TypeAlias = QuantizedSource | PackedSource | GgufSource


@dataclass(frozen=True, eq=False)
class Contents:
    """What a path holds.

    Attributes
    ----------
    path : Path
        The folder, or the GGUF file.
    config_file : Path
        The file that the configuration is from, for messages.
    config : dict
    scheme : Scheme or None
        Of a quantiser's folder.
    open_tensors : callable
        ``open_tensors()`` maps the files and checks their headers.
    """

    path: Path
    config_file: Path
    config: JsonObject
    scheme: Scheme | None
    open_tensors: Callable[[], Tensors]


def open_contents(path: Path) -> Contents:
    """Read what a path holds, without its tensors.

    Raises
    ------
    CheckpointError, UnsupportedError, BackendUnavailable
        As :func:`~marlin_cy.checkpoints.checkpoint.open_checkpoint`.
    """
    file = find_gguf(path)
    if file is not None:
        model = open_gguf(file)
        return Contents(file, model.header.files[0], model.config, None, model.tensors)
    config_file = path / "config.json"
    config = read_json(config_file)
    scheme = None if is_packed(config) else read_scheme(path, config)
    return Contents(path, config_file, config, scheme, partial(SafetensorsFolder, path))


def new_source(
    contents: Contents,
    tensors: Tensors,
    family: Family,
    spec: MoeSpec,
    for_each: ForEach,
    verify: bool,
    scaled: ScaledLayers,
) -> Source:
    """The quantised layers. The parameters are those of the sources' classes.

    Raises
    ------
    CheckpointError, UnsupportedError
    """
    if isinstance(tensors, GgufTensors):
        return GgufSource(tensors, family, spec, for_each)
    if contents.scheme is None:
        return PackedSource(contents.path, contents.config, tensors, spec, verify)
    source = QuantizedSource(tensors, contents.scheme, family, spec, contents.config_file, for_each, scaled)
    if isinstance(contents.scheme, DeepSeekFp4Scheme) and not source.has_modules:
        raise UnsupportedError(
            f"{tensors.source}: no expert has 4-bit weights; models whose experts are in FP8 are not supported"
        )
    return source
