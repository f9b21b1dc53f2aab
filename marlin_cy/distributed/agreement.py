"""Whether all hosts of a group have the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from marlin_cy.distributed.group import checksum
from marlin_cy.distributed.shard import Shard
from marlin_cy.errors import UnsupportedError

if TYPE_CHECKING:
    from marlin_cy.checkpoints.checkpoint import Checkpoint

__all__ = ["open_share"]

SAMPLES = 64
"""Tensors of which some bytes are compared. To read all weights would take minutes."""

SAMPLE_BYTES = 4096


def open_share(shard: Shard, open_folder: Callable[[], Checkpoint]) -> Checkpoint:
    """Open a checkpoint on every host, and compare what the hosts have.

    Raises
    ------
    GroupError
        Another host has other files, or its checkpoint cannot be opened.
    UnsupportedError
        The backend cannot share out layers.
    """
    group = shard.group
    with group.together("open_checkpoint"):
        checkpoint = open_folder()
        if not checkpoint.backend.has_shards:
            raise UnsupportedError(f"shard: the {checkpoint.backend.name} backend has none, use the CPU backend")
        names = checkpoint.tensor_names
        infos = [(name, checkpoint.tensor_info(name)) for name in names]
        samples = [checkpoint.raw_tensor(name)[:SAMPLE_BYTES] for name in names[:: max(1, len(names) // SAMPLES)]]
        fields = {
            "config.json": checksum(json.dumps(checkpoint.config, sort_keys=True)),
            "names of tensors": checksum(*((name, info.dtype, info.shape) for name, info in infos)),
            "bytes of tensors": checksum(*samples),
        }
    group.agree("open_checkpoint", fields)
    return checkpoint
