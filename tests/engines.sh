#!/usr/bin/env bash
# Programs of others that run this library's models: lm-eval, and transformers' server.
#
#     tests/engines.sh [PYTHON [PYTEST ARGUMENTS]]
#
# PYTHON (.venv/bin/python unless given) has the project with its extras "test" and "transformers". The programs are
# installed into the same environment. The time limit is ENGINES_SECONDS (900 unless set).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${1:-.venv/bin/python}
shift || true

"$python" -c "import lm_eval, fastapi, openai, accelerate" 2>/dev/null ||
    "$python" -m pip install 'lm-eval[hf]' 'transformers[serving]'
timeout "${ENGINES_SECONDS:-900}" "$python" -m pytest -q -n 0 -p no:cacheprovider -m engines \
    tests/test_transformers_lm_eval.py tests/test_transformers_serve.py "$@"
