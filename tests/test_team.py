"""Teams of threads: no thread passes a barrier before all threads have arrived."""

import os
import subprocess
import sys

import numpy as np
import pytest

from marlin_cy.cpu._team import count_faults


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_no_thread_passes_a_barrier_early(num_threads):
    marks = np.zeros(num_threads, np.int64)
    assert count_faults(num_threads, 300, marks) == 0
    assert marks.max() == 300


def test_fewer_threads_than_asked_for():
    """OpenMP may run fewer threads than a region asks for; the team's barriers then wait for those that run."""
    code = (
        "import numpy as np; from marlin_cy.cpu._team import count_faults; marks = np.zeros(7, np.int64); "
        "assert count_faults(7, 100, marks) == 0; print(np.count_nonzero(marks))"
    )
    environment = os.environ | {"OMP_THREAD_LIMIT": "2"}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) <= 2
