"""The choice of tokens on the device: ``decoder_sample.cl``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pyopencl as cl

from marlin_cy.decoder.draw import TABLES
from marlin_cy.opencl.decoder.step import Description
from marlin_cy.opencl.memory import uploaded

if TYPE_CHECKING:
    from marlin_cy.decoder.sampling import Sampler
    from marlin_cy.opencl.decoder.maker import Maker
    from marlin_cy.opencl.stack import Runtime

__all__ = ["Choices", "TokenChooser", "describe_choices", "draws"]

ROW_INTS, ENTRY_INTS = 24, 3  # of decoder_sample.cl
MOST_ITEMS, CPU_ITEMS = 1024, 16
LEAST_INTS = 1 << 12

# A row of decoder_sample.cl.
ROW = np.dtype(
    [
        ("draws", "i4"),
        ("rate", "i4", 2),
        ("top_k", "i4"),
        ("limit", "u8"),
        ("min_limit", "u8"),
        ("share", "u8"),
        ("random", "u8"),
        ("entries", "i4", 2),
        ("above", "i4", 2),
        ("below", "i4", 2),
        ("unused", "i4", 6),
    ]
)


class Choices(NamedTuple):
    """What chooses tokens, as the device reads it.

    Attributes
    ----------
    ints : int32 array
    most_entries : int
        The length of the longest list of tokens with penalties.
    """

    ints: npt.NDArray[np.int32]
    most_entries: int


def describe_choices(choices: Sequence[tuple[Sampler, int] | None], rows: int) -> Choices:
    """What ``choices`` (samplers, and positions of tokens) are for the first of ``rows`` rows; None: the largest logit.

    The other rows take the largest logit.
    """
    if not any(choices):
        return Choices(np.zeros(rows * ROW.itemsize // 4, np.int32), 0)
    records = np.zeros(rows, ROW)
    entries, first, most = [records.view(np.int32).reshape(-1)], 0, 0
    for record, choice in zip(records, choices, strict=False):
        if choice is None:
            continue
        sampler, position = choice
        settings, penalties = sampler.settings, sampler.penalties
        if settings is not None:
            record["draws"], record["top_k"] = 1, min(settings.top_k, 2**31 - 1)
            record["rate"] = settings.rate.mantissa, settings.rate.shift
            record["limit"], record["min_limit"] = settings.limit, settings.min_limit
            record["share"], record["random"] = settings.share, sampler.random(position)
        if penalties is not None:
            tokens, amounts = penalties.tokens()
            listed = np.empty((len(tokens), ENTRY_INTS), np.int32)
            listed[:, 0] = tokens
            listed[:, 1:] = amounts.reshape(-1, 1).view(np.int32)
            record["entries"] = first, len(tokens)
            for name in ("above", "below"):
                factor = getattr(penalties, name)
                record[name] = factor.mantissa, factor.shift
            entries.append(listed.reshape(-1))
            first, most = first + len(tokens), max(most, len(tokens))
    return Choices(np.concatenate(entries), most)


class TokenChooser:
    """The buffers that the choice of tokens needs, and its launches.

    Parameters
    ----------
    runtime : Runtime
    """

    def __init__(self, runtime: Runtime) -> None:
        self._tables = uploaded(runtime, TABLES, "powers of two")
        self._ints = Description(runtime, LEAST_INTS, "choices of tokens")
        device = runtime.capabilities
        most = 1 << (min(MOST_ITEMS, device.max_work_group_size).bit_length() - 1)
        self._items = CPU_ITEMS if device.is_cpu else most

    def reserve(self, ints: int) -> bool:
        """Make room for choices of so many ints. Returns whether recordings refer to a buffer that was too small."""
        return self._ints.grow(ints)

    def write(self, queue: cl.CommandQueue, choices: Choices) -> None:
        """Enqueue a write of choices. There is room for them."""
        self._ints.write(queue, choices.ints)

    def record(self, maker: Maker, logits: cl.Buffer, width: int) -> cl.Buffer:
        """Record the launches for rows of ``width`` logits. Returns the buffer of the tokens, int32 ``[rows, 2]``.

        The launches are enqueued with ``most_entries`` of the choices.
        """
        tokens = maker.ctx.reserve("decoder tokens", 8 * maker.rows)
        macros, rows, items = {"SAMPLE_ITEMS": self._items}, maker.rows, self._items

        def size(most_entries: int) -> tuple[int, ...] | None:
            return (most_entries, rows) if most_entries else None

        maker.record(
            "decoder_sample",
            "penalise_rows",
            macros,
            size,
            None,
            "penalise_rows",
            sampling=self._ints.buffer,
            logits=logits,
            width=width,
        )
        maker.record(
            "decoder_sample",
            "sample_rows",
            macros,
            (rows * items,),
            (items,),
            "sample_rows",
            sampling=self._ints.buffer,
            logits=logits,
            width=width,
            tables=self._tables,
            tokens=tokens,
        )
        return tokens


def draws(sampler: Sampler) -> bool:
    """Whether a sampler does not just take the largest logit."""
    return sampler.settings is not None or sampler.penalties is not None
