"""Loading whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from marlin_cy.arguments import integer
from marlin_cy.checkpoints.checkpoint import open_checkpoint
from marlin_cy.decoder.build import build_plan, read_config
from marlin_cy.decoder.head import with_head
from marlin_cy.decoder.model import Model
from marlin_cy.decoder.options import CACHE_DTYPE, CACHE_DTYPES
from marlin_cy.distributed.group import Group, checksum
from marlin_cy.formats.json_fields import StrPath
from marlin_cy.interface import Backend

__all__ = ["load_model"]


def load_model(
    path: StrPath,
    backend: str | Backend = "cpu",
    *,
    context_length: int | None = None,
    cache_tokens: int | None = None,
    cache_dtype: str = CACHE_DTYPE,
    lm_head: str | None = None,
    group: Group | None = None,
    progress: Callable[[int, int, str], object] | None = None,
    **context_options: Any,
) -> Model:
    """Load a checkpoint folder as a model that turns tokens into logits.

    Parameters
    ----------
    path : path-like
        A folder that :func:`~marlin_cy.open_checkpoint` takes.
    backend : str or Backend
    context_length : int, optional
        Positions of one sequence; by default the model's own limit.
    cache_tokens : int, optional
        Positions of all sequences together; by default ``context_length``.
    cache_dtype : {"float16", "bfloat16", "float32"}
        What keys and values are kept in.
    lm_head : {"int8"}, optional
        Round the head to 8 bits when loading: half the bytes of bfloat16, and logits within a percent. By default the
        head is used as it is in the file.
    group : Group, optional
        Hosts that share out the model. Each has some heads and columns of all weights, and its heads' part of the
        cache. Every host makes the same calls, and gets the same logits, those of a single host.
    progress : callable, optional
        As in :func:`~marlin_cy.open_checkpoint`.
    **context_options
        Those of the backend's ``new_context``: ``num_threads`` and ``compute_dtype`` on the CPU.

    Raises
    ------
    CheckpointError, UnsupportedError, TypeError, ValueError
        As :func:`~marlin_cy.open_checkpoint`; also if the decoder does not support the model, or the backend has no
        decoder.
    MemoryError
        The cache does not fit into memory. The message has its size, and the number of tokens that would fit.
    GroupError
        With ``group``: another host has other files or arguments, has failed, or is lost.
    """
    options: dict[str, Any] = {
        "context_length": context_length,
        "cache_tokens": cache_tokens,
        "cache_dtype": cache_dtype,
        "lm_head": lm_head,
    }
    if group is None:
        return _load(path, backend, None, progress, context_options, **options)
    with group.together("load_model"):
        group.agree("load_model", {name: checksum(value) for name, value in options.items()})
        model = _load(path, backend, group, progress, context_options, **options)
    group.agree("load_model, at its end", {})
    return model


def _load(
    path: StrPath,
    backend: str | Backend,
    group: Group | None,
    progress: Callable[[int, int, str], object] | None,
    context_options: dict[str, Any],
    *,
    context_length: int | None,
    cache_tokens: int | None,
    cache_dtype: str,
    lm_head: str | None,
) -> Model:
    if not isinstance(cache_dtype, str) or cache_dtype not in CACHE_DTYPES:
        raise ValueError(f"cache_dtype: got {cache_dtype!r}, expected one of {', '.join(CACHE_DTYPES)}")
    checkpoint = open_checkpoint(path, backend, progress=progress, shard=None if group is None else group.shard())
    config = read_config(checkpoint)
    context_length = config.context_length if context_length is None else integer("context_length", context_length)
    cache_tokens = context_length if cache_tokens is None else integer("cache_tokens", cache_tokens)
    if cache_tokens < 1:
        raise ValueError(f"cache_tokens: got {cache_tokens}, expected at least 1")
    ctx = checkpoint.backend.new_context(**context_options)
    plan = with_head(build_plan(checkpoint, config, context_length), lm_head)
    return Model(checkpoint, config, plan, ctx, cache_tokens, cache_dtype)
