#!/usr/bin/env bash
# Tests of the 512-bit instruction sets, AVX-512 and AMX, on machines that lack them: on Linux, x86-64 with AVX2, by GCC.
#
#     tests/emulated.sh [PYTHON [PYTEST ARGUMENTS]]
#
# PYTHON (.venv/bin/python unless given) has the project, compiled in place, with its extra "test". The C files of both
# instruction sets are compiled with headers that emulate them, into a library that takes the place of the package's own
# kernels in the tests' processes. Processes that a test starts use the package's own. The time limit is
# EMULATED_SECONDS (600 unless set).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${1:-.venv/bin/python}
shift || true

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
ukernels=marlin_cy/cpu/ukernels
# Vectors of 512 bits are in memory here, where unrolled loops gain nothing: they take three quarters of the time to compile.
flags=(-O1 -fdisable-tree-cunroll -fdisable-tree-cunrolli -ffp-contract=off -fno-math-errno -Wall -Wno-psabi -fPIC
    "-I$ukernels" -include tests/avx512_emulation.h)
gcc "${flags[@]}" -c "$ukernels/avx512vnni.c" -o "$folder/avx512vnni.o" &
gcc "${flags[@]}" -include tests/amx_emulation.h -c "$ukernels/amx.c" -o "$folder/amx.o"
wait $!
package=$("$python" -c "from marlin_cy.cpu import _dispatch; print(_dispatch.__file__)")
gcc -shared "$folder"/*.o -o "$folder/kernels.so" "$package" -lm
export MARLIN_CY_TEST_EMULATED=$folder/kernels.so

if [ $# = 0 ]; then
    # Products and row operations. Left out: slow tests of what other tests compute too, and of inherited kernels.
    set -- tests/test_amx_emulated.py tests/test_numerics_cpu.py tests/test_numerics_records.py \
        tests/test_row_operations.py tests/test_row_attention.py -k "(amx or avx512vnni) and not (products or widened or narrowed)"
fi
timeout "${EMULATED_SECONDS:-600}" "$python" -m pytest -q -p no:cacheprovider "$@"
