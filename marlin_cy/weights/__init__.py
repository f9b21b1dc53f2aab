"""Quantised weights in canonical form, and how a backend may lay them out.

::

    code_types.py    one row per code type
    scale_records.py one row per scale record: what a group stores beside its codes
    canonical.py          CanonicalWeight, the canonical form that every checkpoint format is converted to
    sizes.py         checks of K, N, group sizes and g_idx
    arrays.py        checks of a caller's or a file's arrays
    order.py         the order in which rows of K are packed when g_idx permutes them
    packed_tiles.py  PackedTiles, a stack in the tile layout that packed folders store
    stored.py        StoredWeight: a weight in a checkpoint's own form, which a backend may pack directly
    _nibbles.pyx     conversions to canonical words at memory speed

Nothing here depends on formats, checkpoints, stacks or a backend.
"""
