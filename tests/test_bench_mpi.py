"""``python -m bench mpi``: bars are judged, and a missing launcher is named. tests/test_mpi.py measures."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
sys.path.append(str(Path(__file__).parents[1]))  # bench is not installed

from bench.models import mpi  # noqa: E402

SETTINGS = {"hosts": 2, "tokens": 256}


def test_bars():
    figures = {
        name: {"median": median, "p10": median, "p90": median}
        for name, median in (("speedup", 1.9), ("exchange", 1.2), ("memory", 1.05))
    }
    lines = mpi.judge(figures, SETTINGS)
    assert [line["passed"] for line in lines] == [True, False, True]
    assert lines[0]["what"] == "one host's time ÷ that of 2 hosts, 256 tokens"


def test_no_launcher(monkeypatch, tmp_path):
    monkeypatch.setattr(mpi.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="--mpiexec: found no mpiexec beside this Python or on PATH"):
        mpi.mpiexec_of(None)
    assert mpi.mpiexec_of(Path("given")) == Path("given")
