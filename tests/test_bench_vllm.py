"""``python -m bench vllm``: bars are judged. ``tests/test_vllm.py`` runs the command."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # bench is not installed

from bench.models.vllm import CASES, judge  # noqa: E402


def test_bars():
    figure = {"median": 1.3, "p10": 1.2, "p90": 1.4}
    lines = judge({name: {"ratios": {"load": figure}} for name in CASES})
    assert [line["passed"] for line in lines] == [True] * 3 + [None] * 3
    assert {line["skipped"] for line in lines[3:]} == {"not measured"}
    slow = judge({"1 sequence": {"ratios": {"load": {**figure, "median": 1.1}, "bfloat16": figure}}})
    assert [line["passed"] for line in slow] == [False, False]
