#!/usr/bin/env bash
# Models on several hosts, by a real MPI: processes of mpiexec on this machine.
#
#     tests/mpi.sh [PYTHON [PYTEST ARGUMENTS]]
#
# PYTHON (.venv/bin/python unless given) has the project with its extra "test". mpi4py and the wheel of MPICH are installed
# into the same environment, unless it has mpi4py. The time limit is MPI_SECONDS (300 unless set).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${1:-.venv/bin/python}
shift || true

"$python" -c "import mpi4py" 2>/dev/null || "$python" -m pip install mpi4py mpich
timeout "${MPI_SECONDS:-300}" "$python" -m pytest -q -n 0 -p no:cacheprovider -m mpi tests/test_mpi.py "$@"
