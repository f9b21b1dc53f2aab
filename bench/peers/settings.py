"""The settings of a pair's process. Importing this module loads no OpenMP runtime and no peer."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from bench.common.shapes import ModelShape

__all__ = ["PARTS", "PairSettings"]

PARTS = ("projection", "routed", "layer")


@dataclass(frozen=True)
class PairSettings:
    """What to measure, and how carefully.

    Attributes
    ----------
    peer : str
        Name of one of ``bench.peers.PEERS``; empty for this library alone.
    model : ModelShape
    cases : dict of str to list of int
        Rows or tokens of each part.
    num_experts : int
        How many experts every side loads.
    threads : int
    isa : str
        Of this library.
    repeats : int
        Most rounds of a case.
    min_seconds, pause_seconds : float
        Least length of a block, and sleep before it.
    case_seconds : float
        Time of a case, after which no further rounds are measured; at least 3 rounds are.
    quick : bool
    """

    peer: str
    model: ModelShape
    cases: dict[str, list[int]]
    num_experts: int
    threads: int
    isa: str
    repeats: int
    min_seconds: float
    pause_seconds: float
    case_seconds: float
    quick: bool

    @classmethod
    def from_json(cls, text: str) -> PairSettings:
        """The settings that :meth:`to_json` wrote."""
        fields = json.loads(text)
        return cls(**fields | {"model": ModelShape(**fields["model"])})

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))
