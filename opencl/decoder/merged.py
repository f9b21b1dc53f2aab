"""Quantised layers that read the same rows, copied into one store: one product takes the place of several.

A launch takes longer than one token's product with a key or value projection. The copies take device memory that the
layers' own stores, which belong to the plan, take too: so there is a limit on them all together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyopencl as cl

from marlin_cy.opencl.arguments import rescale_values
from marlin_cy.opencl.layout import STRIP_N
from marlin_cy.opencl.memory import live_stores, memory_errors
from marlin_cy.opencl.store import OpenClGptqStore, pack_launch
from marlin_cy.weights.sizes import StackSizes

if TYPE_CHECKING:
    from marlin_cy.opencl.stack import OpenClLinear, Runtime

__all__ = ["Merger"]

LEAST_LIMIT = 64 << 20
SHARE = 32
MOST_EXPONENT = 8
"""Scales of layers that are merged are brought to one power of two. float16 holds them exactly if the powers of two
differ by at most this, except scales that are 2**-6 of a layer's largest."""


class Merger:
    """Merges layers as long as the copies take less than a 32nd of the packed weights, or 64 MiB if that is more.

    Attributes
    ----------
    nbytes : int
        Bytes of the copies.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._limit = max(LEAST_LIMIT, live_stores.nbytes(runtime.device) // SHARE)
        self.nbytes = 0

    def __call__(self, layers: Sequence[OpenClLinear]) -> OpenClGptqStore | None:
        """One store of one expert with the layers' columns side by side; None if they cannot be merged."""
        stores = [layer.store for layer in layers]
        needed = sum(store.nbytes for store in stores)
        if len(layers) < 2 or self.nbytes + needed > self._limit or not all(map(is_whole, layers)):
            return None
        first = stores[0]
        exponents = [round(math.log2(store.weight_factor)) for store in stores]
        alike = all(kind_of(store) == kind_of(first) for store in stores)
        if not alike or max(exponents) - min(exponents) > MOST_EXPONENT:
            return None
        merged = OpenClGptqStore(
            self._runtime,
            StackSizes(
                num_experts=1,
                k=first.k,
                n_per_expert=sum(store.n for store in stores),
                group_size=first.weight_group_size,
                g_idx=[None],
                codes=first.codes,
                scales=first.scales,
            ),
        )
        merged.symmetric = all(store.symmetric for store in stores)
        merged.weight_factor = 2.0 ** max(exponents)
        self.nbytes += merged.nbytes
        self._copy(merged, stores, [exponent - max(exponents) for exponent in exponents])
        return merged

    def _copy(self, merged: OpenClGptqStore, stores: Sequence[OpenClGptqStore], exponents: Sequence[int]) -> None:
        """Copy the sections of each store's only expert to their places, and rescale where the powers of two differ."""
        runtime, target = self._runtime, merged.layout
        rescale = pack_launch(runtime, "rescale", merged)
        strip = 0
        with runtime.loading_lock, memory_errors(runtime, merged.nbytes, "merging of layers"):
            for store, exponent in zip(stores, exponents, strict=True):
                layout = store.layout
                for (source, words), (begin, _) in zip(layout.sections, target.sections, strict=True):
                    # Every section has as many words for each strip.
                    place = begin + words // layout.strips * strip
                    cl.enqueue_copy(
                        runtime.loading_queue,
                        merged.parts[0],
                        store.parts[0],
                        byte_count=4 * words,
                        src_offset=4 * source,
                        dst_offset=4 * place,
                    )
                if exponent:
                    scale_words = layout.zero_offset - layout.scale_offset
                    rescale(
                        runtime.loading_queue,
                        (2 * scale_words, 1),
                        None,
                        rescale_values(
                            packed=merged.parts[0],
                            expert_words=merged.expert_words,
                            scale_base=target.scale_offset + scale_words // layout.strips * strip,
                            exponent=exponent,
                            bfloat16=0,
                        ),
                    )
                strip += layout.strips
            runtime.loading_queue.finish()


def is_whole(layer: OpenClLinear) -> bool:
    """Whether a layer is all of a stack of one expert, in K's own order, and ends with a whole strip."""
    store = layer.store
    return (
        store.num_experts == 1
        and layer.offset == 0
        and layer.out_features == store.n
        and store.n % STRIP_N == 0
        and store.order is None
    )


def kind_of(store: OpenClGptqStore) -> tuple[object, ...]:
    """What stores that are merged have in common."""
    return store.k, store.packed_k, store.group_shift, store.weight_group_size, store.codes, store.scales
