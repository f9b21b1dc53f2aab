"""Attention by tensor cores, in tier "mma": builds of ``decoder_attention_mma.cl``, checked before their first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from marlin_cy.errors import BuildError
from marlin_cy.opencl.arguments import arguments_of
from marlin_cy.opencl.tiers.configuration import BFLOAT16, FLOAT16
from marlin_cy.opencl.tiers.mma import local_limit

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend
    from marlin_cy.opencl.decoder.attention import Shape
    from marlin_cy.opencl.recording import RecordingContext

__all__ = ["TilesKernel", "candidates", "tiles_kernel"]

LANES = 32
STRIP = 16  # queries, the rows of an operand
WIDEST = 256
MOST_HEADS = 32
"""Heads of a tile, at most. The rows of a tile are its queries divided by its heads."""


@dataclass(frozen=True)
class TilesKernel:
    """A build of ``attend_tiles``; the kernel's file explains the numbers.

    Attributes
    ----------
    head_dim, value_dim, heads, waves, wave_strips, keys : int
    queries_local : bool
    cache_type : int
    """

    head_dim: int
    value_dim: int
    heads: int
    waves: int
    wave_strips: int
    keys: int
    queries_local: bool
    cache_type: int

    @property
    def items(self) -> int:
        """Work-items of a work-group."""
        return LANES * self.waves

    @property
    def queries(self) -> int:
        """Queries of a tile."""
        return STRIP * self.waves * self.wave_strips

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return self.queries // self.heads

    @property
    def local_bytes(self) -> int:
        """Local memory of a work-group: two stages of keys and values, and the queries."""
        stages = 2 * 2 * self.keys * (self.head_dim + self.value_dim)
        return stages + (2 * self.queries * self.head_dim if self.queries_local else 0)

    @property
    def macros(self) -> Mapping[str, int]:
        """The kernel's macros, except the type of the output."""
        return {
            "HEAD_DIM": self.head_dim,
            "VALUE_DIM": self.value_dim,
            "HEADS": self.heads,
            "WAVES": self.waves,
            "WAVE_STRIPS": self.wave_strips,
            "KEYS": self.keys,
            "QUERIES_LOCAL": int(self.queries_local),
            "CACHE_TYPE": self.cache_type,
        }

    def record(
        self,
        ctx: RecordingContext,
        output_type: int,
        groups: Callable[[Any], tuple[int, int] | None],
        **values: Any,
    ) -> None:
        """Record the launch. ``groups``: work-groups, from what is known of a step; ``values``: the arguments."""

        def size(known: Any) -> tuple[int, ...] | None:
            found = groups(known)
            return None if found is None else (found[0] * self.items, found[1])

        macros = {**self.macros, "OUTPUT_TYPE": output_type}
        ctx.record(
            "decoder_attention_mma",
            "attend_tiles",
            macros,
            size,
            (self.items, 1),
            arguments_of("attend_tiles", macros),
            values,
            "attend",
            ctx.backend.tier.options(ctx.backend.runtime.capabilities),
        )


def candidates(shape: Shape, cache_type: int) -> list[TilesKernel]:
    """Builds for a shape, best first; none for shapes that the kernel does not support.

    A lane has 255 registers. Sums take ``value_dim / 2`` of them for each strip, and scores ``keys / 2``. Two strips
    halve what each wave reads from local memory.
    """
    if cache_type not in (FLOAT16, BFLOAT16) or max(shape.head_dim, shape.value_dim) > WIDEST:
        return []
    if shape.head_dim % 32 or shape.value_dim % STRIP:
        return []
    per_kv = shape.num_heads // shape.num_kv_heads
    heads = max(number for number in range(1, MOST_HEADS + 1) if per_kv % number == 0)
    widest = max(shape.head_dim, shape.value_dim)
    sizes = [(4, 2, 64, False)] if widest <= 64 else [(4, 2, 32, True)] if widest <= 128 else []
    return [
        TilesKernel(shape.head_dim, shape.value_dim, heads, *size, cache_type) for size in (*sizes, (4, 1, 32, True))
    ]


def tiles_kernel(shape: Shape, cache_type: int, output_type: int, backend: OpenClBackend) -> TilesKernel | None:
    """The first build that gives correct results on the backend's device.

    None if the tier has none for the shape, or none is correct: then the portable kernel is used, with a warning.
    """
    from marlin_cy.opencl.checks.attention import reason_wrong  # it imports modules of the decoder

    if backend.tier.name != "mma":
        return None
    device, verdicts = backend.runtime.capabilities, backend.runtime.verdicts
    for kernel in candidates(shape, cache_type):
        if kernel.local_bytes > local_limit(device):
            continue
        if verdicts is None:
            return kernel
        try:
            reason = verdicts.reason_wrong(
                f"attention: {kernel} {output_type}", partial(reason_wrong, backend, kernel, output_type)
            )
        except BuildError as error:
            reason = f"its program does not compile: {error}"
        if reason is None:
            return kernel
        verdicts.warn(f"{device.name}, attention by tensor cores: {kernel}", reason, stacklevel=5)
    return None
