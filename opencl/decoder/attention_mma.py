"""Attention by tensor cores, in tier "mma": builds of two kernels, checked before their first use.

``decoder_attention_tiles_mma.cl`` is for tiles of several rows, and ``decoder_attention_rows_mma.cl`` for single rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from marlin_cy.opencl.arguments import arguments_of
from marlin_cy.opencl.checks.builds import first_right
from marlin_cy.opencl.tiers.configuration import BFLOAT16, FLOAT16

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend
    from marlin_cy.opencl.decoder.attention import Shape
    from marlin_cy.opencl.recording import RecordingContext

__all__ = ["Kernel", "RowsKernel", "TilesKernel", "chosen", "rows_kernels", "tiles_kernels"]

LANES = 32
STRIP = 16  # queries, the rows of an operand
WIDEST = 256
MOST_HEADS = 32
"""Heads of a tile, at most. The rows of a tile are its queries divided by its heads."""
OPERAND_HEADS = 16
"""Heads of a single row, at most."""
MOST_SPLITS = 256
"""The factors of all splits are in local memory while the splits are joined."""
K = TypeVar("K", bound="Kernel")


@dataclass(frozen=True)
class Kernel:
    """A build of a kernel; the kernel's file explains the numbers.

    Attributes
    ----------
    head_dim, value_dim, heads, waves : int
    cache_type : int
    segments : int
        Of the cache.
    """

    file: ClassVar[str]
    name: ClassVar[str]
    head_dim: int
    value_dim: int
    heads: int
    waves: int
    cache_type: int
    segments: int = field(default=1, kw_only=True)

    @property
    def items(self) -> int:
        """Work-items of a work-group."""
        return LANES * self.waves

    @property
    def macros(self) -> dict[str, int]:
        """The kernel's macros, except the type of the output."""
        return {
            "HEAD_DIM": self.head_dim,
            "VALUE_DIM": self.value_dim,
            "HEADS": self.heads,
            "WAVES": self.waves,
            "CACHE_TYPE": self.cache_type,
            "SEGMENTS": self.segments,
        }

    @property
    def local_bytes(self) -> int:
        """Local memory of a work-group."""
        raise NotImplementedError

    def record(
        self,
        ctx: RecordingContext,
        output_type: int,
        groups: Callable[[Any], tuple[int, int, int] | None],
        values: Mapping[str, Any],
    ) -> None:
        """Record a launch. ``groups``: work-groups, from what is known of a step; ``values``: the arguments."""

        def size(known: Any) -> tuple[int, ...] | None:
            found = groups(known)
            return None if found is None else (found[0] * self.items, *found[1:])

        macros = {**self.macros, "OUTPUT_TYPE": output_type}
        options = ctx.backend.tier.options(ctx.backend.runtime.capabilities)
        table = arguments_of(self.name, macros)
        ctx.record(self.file, self.name, macros, size, (self.items, 1, 1), table, values, "attend", options)


@dataclass(frozen=True)
class TilesKernel(Kernel):
    """A build of ``attend_tiles``. Work-groups: blocks of heads, tiles, 1.

    Attributes
    ----------
    wave_strips, keys : int
    queries_local : bool
    split : bool
        Whether the positions of a tile are cut into splits: the third number of the work-groups.
    """

    file = "decoder_attention_tiles_mma"
    name = "attend_tiles"
    wave_strips: int
    keys: int
    queries_local: bool
    split: bool = field(default=False, kw_only=True)

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
        """Two stages of keys and values, and the queries."""
        stages = 2 * 2 * self.keys * (self.head_dim + self.value_dim)
        return stages + (2 * self.queries * self.head_dim if self.queries_local else 0)

    @property
    def macros(self) -> dict[str, int]:
        own = {"WAVE_STRIPS": self.wave_strips, "KEYS": self.keys, "QUERIES_LOCAL": int(self.queries_local)}
        return {**super().macros, **own, **({"SPLIT_TILES": 1} if self.split else {})}


@dataclass(frozen=True)
class RowsKernel(Kernel):
    """A build of ``attend_rows``. Work-groups: blocks of heads, rows, splits."""

    file = "decoder_attention_rows_mma"
    name = "attend_rows"

    @property
    def local_bytes(self) -> int:
        """The sums of all waves."""
        return self.waves * -(-self.heads // 8) * 8 * (4 * (self.value_dim + 4) + 8)


def tiles_kernels(shape: Shape, cache_type: int, segments: int = 1) -> list[TilesKernel]:
    """Builds of ``attend_tiles`` for a shape, the largest tile first; none for shapes that it does not support.

    A lane has 255 registers. Sums take ``value_dim / 2`` of them for each strip, and scores ``keys / 2``. Two strips
    halve what each wave reads from local memory. Measured on an H200, 32 heads of 128: 1024 rows after 3072 take 232 µs
    in two strips and 329 µs in one; 512 rows, of which two strips make a tile for each compute unit, take 31 and 24 µs.
    """
    if not supported(shape, cache_type, STRIP):
        return []
    heads = largest_divisor(shape, MOST_HEADS)
    widest = max(shape.head_dim, shape.value_dim)
    sizes = [(4, 1, 32, True)]
    if widest <= 128:
        sizes = [(4, 2, 64, False) if widest <= 64 else (4, 2, 32, True), (4, 1, 32, False)]
    return [
        TilesKernel(
            *(shape.head_dim, shape.value_dim, heads, waves, cache_type, strips, keys, queries_local), segments=segments
        )
        for waves, strips, keys, queries_local in sizes
    ]


def rows_kernels(shape: Shape, cache_type: int, segments: int = 1) -> list[RowsKernel]:
    """Builds of ``attend_rows`` for a shape, best first; none for shapes that it does not support.

    Sums take ``value_dim / 4`` registers of a lane for every eight heads.
    """
    if not supported(shape, cache_type, 64):
        return []
    heads = largest_divisor(shape, OPERAND_HEADS if max(shape.head_dim, shape.value_dim) <= 128 else 8)
    return [
        RowsKernel(shape.head_dim, shape.value_dim, heads, waves, cache_type, segments=segments) for waves in (8, 4)
    ]


def supported(shape: Shape, cache_type: int, column_unit: int) -> bool:
    """Whether operands hold the cache's values, and registers the sums of a row."""
    return (
        cache_type in (FLOAT16, BFLOAT16)
        and max(shape.head_dim, shape.value_dim) <= WIDEST
        and shape.head_dim % 32 == 0
        and shape.value_dim % column_unit == 0
    )


def largest_divisor(shape: Shape, most: int) -> int:
    """The most heads, up to ``most``, of which the heads that read the same keys are a multiple."""
    per_kv = shape.num_heads // shape.num_kv_heads
    return max(number for number in range(1, most + 1) if per_kv % number == 0)


def chosen(kernels: Sequence[K], output_type: int, backend: OpenClBackend) -> K | None:
    """The first build that gives correct results on the backend's device.

    None where the portable kernel is used: see :func:`~marlin_cy.opencl.checks.builds.first_right`.
    """
    from marlin_cy.opencl.checks.attention import reason_wrong  # it imports modules of the decoder

    return first_right(
        backend,
        kernels,
        "attention by tensor cores",
        lambda kernel: reason_wrong(backend, kernel, output_type),
        output_type,
    )
