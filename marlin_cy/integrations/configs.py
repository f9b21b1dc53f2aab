"""The configs and classes of transformers that belong to a checkpoint folder."""

from __future__ import annotations

from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlin_cy.checkpoints.gguf.documents import read_document
from marlin_cy.checkpoints.gguf.files import find_gguf
from marlin_cy.errors import CheckpointError, MarlinError, UnsupportedError
from marlin_cy.integrations import needs_extra
from marlin_cy.integrations.derived_family import Described, derived_family

with needs_extra():
    import torch
    import transformers

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "check_device_map",
    "describe_of",
    "model_class_of",
    "model_on_meta",
    "read_config",
    "read_generation_config",
]

MODEL_TYPE_ALIASES = {"kimi_k2": "deepseek_v3"}
"""The ``model_type`` in transformers of models that come with code of their own for the same architecture."""


def read_config(path: Path) -> Any:
    """The folder's config as transformers reads it, without its quantisation. A GGUF file says the same.

    Raises
    ------
    CheckpointError
        transformers cannot read the config.
    """
    try:
        stored = read_document(path, "config.json")
        known = with_known_types(stored)
        if known == stored and find_gguf(path) is None:
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        else:
            config = transformers.AutoConfig.for_model(**known)
    except MarlinError:
        raise
    except Exception as error:  # transformers raises many types; all concern the file
        raise CheckpointError(f"transformers {transformers.__version__}: {error}", file=path / "config.json") from error
    # With this entry, transformers would load the model with its own quantiser.
    for part in (config, config.get_text_config()):
        part.__dict__.pop("quantization_config", None)
    return config


def check_device_map(device_map: Any) -> None:
    """Refuse devices other than the host.

    Raises
    ------
    UnsupportedError
    """
    places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if others := [place for place in places if place not in (None, "auto") and torch.device(place).type != "cpu"]:
        raise UnsupportedError(
            f"device_map: got {others[0]!r}, expected 'cpu': packed layers run on the backend of MarlinCyConfig"
        )


def with_known_types(config: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` with the ``model_type`` of transformers where a model's makers have another name for it."""
    known = {
        key: with_known_types(value) if key == "text_config" and isinstance(value, dict) else value
        for key, value in config.items()
    }
    alias = MODEL_TYPE_ALIASES.get(str(known.get("model_type")))
    return known if alias is None else {**known, "model_type": alias}


def read_generation_config(path: Path) -> Any:
    """The folder's ``generation_config.json`` as transformers reads it; None without one.

    Raises
    ------
    CheckpointError
        The file has an invalid value.
    """
    stored = read_document(path, "generation_config.json")
    if not stored:
        return None
    try:
        return transformers.GenerationConfig.from_dict(stored)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(str(error), file=path / "generation_config.json") from error


def model_class_of(config: Any) -> tuple[Any, Any]:
    """``(class, config)``: the class for causal language models, and the part of the config that it takes.

    A model of text and images that has no such class gets the class for both.
    """
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            model_class = mapping[type(config)]
            break
    else:
        raise UnsupportedError(
            f"model_type {config.model_type!r}: transformers {transformers.__version__} has no causal language model"
        )
    # A multimodal model: use its text config.
    if model_class.config_class is config.sub_configs.get("text_config"):
        config = config.get_text_config()
    return model_class, config


def model_on_meta(path: Path) -> Any:
    """A folder's model on the meta device, which allocates no memory for weights."""
    model_class, config = model_class_of(read_config(path))
    with torch.device("meta"):
        return model_class(config)


def describe_of(path: str | PathLike[str]) -> Callable[[list[str]], Described]:
    """The ``describe`` of :func:`~marlin_cy.open_checkpoint`: what transformers' class says about a new family."""
    return partial(_described, Path(path))


def _described(path: Path, tensor_names: list[str]) -> Described:
    return derived_family(model_on_meta(path), tensor_names)
