"""Models of the decoder for the commands: loading, and what a model takes."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from marlin_cy.checkpoints.gguf.documents import read_document
from marlin_cy.commands.options import argument_errors, open_backend, positive_argument
from marlin_cy.commands.output import LoadProgress, megabytes
from marlin_cy.decoder.options import CACHE_DTYPE
from marlin_cy.errors import MarlinError
from marlin_cy.formats.json_fields import optional

if TYPE_CHECKING:
    from marlin_cy.decoder.model import Model
    from marlin_cy.distributed import Group

__all__ = [
    "Loaded",
    "add_context_option",
    "context_of",
    "declared_context",
    "load_decoder",
    "memory_line",
    "resident_bytes",
    "weight_bytes",
]

CONTEXT = 16384
"""The default context of conversations: that of some models is so long that its cache does not fit into memory."""


class Loaded(NamedTuple):
    """A model that is ready.

    Attributes
    ----------
    model : Model
    device : str
        In words.
    seconds : float
        The time of loading.
    """

    model: Model
    device: str
    seconds: float


def load_decoder(
    folder: Path,
    arguments: argparse.Namespace,
    *,
    context_length: int | None = None,
    cache_tokens: int | None = None,
    backend: str | None = None,
    group: Group | None = None,
    **options: Any,
) -> Loaded:
    """Load a folder with the decoder, as the options say. ``options`` replace options of the backend's contexts.

    ``group`` is that of ``--mpi``.

    Raises
    ------
    UnsupportedError
        The decoder does not have the model's family, or the backend has no decoder.
    MarlinError
        The folder is damaged, or an option has an invalid value.
    """
    from marlin_cy.decoder.load import load_model

    opened = open_backend(backend or arguments.backend, arguments)
    start = time.perf_counter()
    try:
        with argument_errors(), LoadProgress() as bar:
            bar.parts = _declared(folder, "num_hidden_layers") or 1

            def progress(done: int, total: int, description: str) -> None:
                bar(done, total, description)
                bar.finished += done == total  # of the layers

            model = load_model(
                folder,
                opened,
                context_length=context_length,
                cache_tokens=cache_tokens,
                cache_dtype=arguments.cache_dtype or CACHE_DTYPE,
                lm_head=arguments.lm_head,
                group=group,
                progress=progress,
                **{**opened.context_from_arguments(arguments), **options},
            )
    except MemoryError as error:
        raise MarlinError(str(error) or "too little memory for the model") from error
    device = opened.describe(model.context)
    if arguments.lm_head is not None:
        device += f", head in {arguments.lm_head}"
    if group is not None:
        device += f", {group.size} hosts"
    return Loaded(model, device, time.perf_counter() - start)


def add_context_option(parser: argparse.ArgumentParser, words: str) -> None:
    """Declare ``--context-length``; ``words`` say what it is the length of."""
    parser.add_argument(
        "--context-length",
        type=positive_argument,
        metavar="N",
        help=f"{words}; default: that of the model, at most {CONTEXT}",
    )


def context_of(folder: Path, arguments: argparse.Namespace) -> int:
    """The value of ``--context-length``, or its default for a folder."""
    given: int | None = arguments.context_length
    return given or min(declared_context(folder) or CONTEXT, CONTEXT)


def declared_context(folder: Path) -> int | None:
    """The context that ``config.json`` declares, in tokens; None where it does not."""
    return _declared(folder, "max_position_embeddings")


def _declared(folder: Path, name: str) -> int | None:
    """A number in ``config.json`` or its ``text_config``; None where there is none."""
    file = folder / "config.json"
    config = read_document(folder, file.name)
    inner = config.get("text_config")
    return optional(inner if isinstance(inner, dict) else config, [name], int, file)


def weight_bytes(plan: object) -> tuple[int, int]:
    """``(packed, others)``: bytes of a plan's packed weights and of all its other weights. Shared ones count once."""
    import numpy as np

    from marlin_cy.decoder.plan import RopeTable
    from marlin_cy.interface import Linear
    from marlin_cy.moe.layer import MoeLayer

    packed = 0
    others: dict[int, int] = {}
    left: list[Any] = [plan]
    while left:
        part = left.pop()
        match part:
            case Linear():
                packed += part.metadata.packed_bytes
            case MoeLayer():
                packed += part.gate_up.metadata.packed_bytes + part.down.metadata.packed_bytes
                if part.shared_expert is not None:
                    stacks = part.shared_expert.gate_up, part.shared_expert.down
                    packed += sum(stack.metadata.packed_bytes for stack in stacks)
            case np.ndarray():
                others[part.__array_interface__["data"][0]] = part.nbytes
            case RopeTable():
                pass
            case list() | tuple():
                left += part
            case _ if dataclasses.is_dataclass(part):
                left += [getattr(part, field.name) for field in dataclasses.fields(part)]
    return packed, sum(others.values())


def resident_bytes() -> int | None:
    """Resident memory of this process, mapped files included; None where the system does not report it."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def memory_line(report: Mapping[str, Any]) -> str:
    """What a model takes, in words, from a report's ``resident_bytes``, ``packed_bytes`` and ``other_weight_bytes``."""
    resident = report["resident_bytes"]
    return (
        "" if resident is None else f"Memory: {megabytes(resident)} resident. "
    ) + f"Weights: {megabytes(report['packed_bytes'])} packed, {megabytes(report['other_weight_bytes'])} others."
