#!/usr/bin/env bash
# OpenCL tests on rusticl, Mesa's OpenCL, as the distribution ships it: on the CPU, by llvmpipe, so no GPU is needed.
#
#     tests/rusticl.sh [PYTHON [PYTEST ARGUMENTS]]
#
# PYTHON (.venv/bin/python unless given) has the project with its extra "test". Where Mesa's driver is missing it is
# installed by apt-get, if this is run as root on a system that has it; nothing else is installed. The time limit is
# RUSTICL_SECONDS (600 unless set).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${1:-.venv/bin/python}
shift || true

find_icd() {
    # A folder that does not exist is no error.
    { find /etc/OpenCL/vendors /usr/share/OpenCL/vendors -name rusticl.icd 2>/dev/null || true; } | head -n 1
}
icd=${RUSTICL_ICD:-$(find_icd)}
if [ -z "$icd" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -q
    apt-get install -qy --no-install-recommends mesa-opencl-icd
    icd=$(find_icd)
fi
if [ -z "$icd" ]; then
    echo "no rusticl.icd: install the package mesa-opencl-icd" >&2
    exit 1
fi

# A folder with this driver alone: others in the system's folder are not tested here.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp "$icd" "$folder/"
export RUSTICL_ENABLE=llvmpipe OCL_ICD_VENDORS=$folder MARLIN_CY_OPENCL_DEVICE=llvmpipe MARLIN_CY_CACHE_DIR=$folder/cache
export XDG_CACHE_HOME=$folder/xdg

if [ $# = 0 ]; then
    # Queues that wait for each other, and a configuration that Mesa 22.3 compiles wrongly.
    set -- tests/test_opencl_flush.py tests/test_opencl_stack.py -k \
        "llvmpipe and (flush or caller or other_queues or without_times or test_portable)"
fi
limit=${RUSTICL_SECONDS:-600}
# The command that never returned on Mesa 22.3 while queues were not flushed.
timeout "$limit" "$python" -m marlin_cy run --backend opencl --tokens 1
timeout "$limit" "$python" -m pytest -q -p no:cacheprovider "$@"
