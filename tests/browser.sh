#!/usr/bin/env bash
# The chat page of `marlin-cy serve` in a browser: Chromium without a screen, as the distribution ships it.
#
#     tests/browser.sh [PYTHON [PYTEST ARGUMENTS]]
#
# PYTHON (.venv/bin/python unless given) has the project with its extra "test". Where Chromium is missing it is installed
# by apt-get, if this is run as root on a system that has it; nothing else is installed. The time limit is
# BROWSER_SECONDS (300 unless set).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${1:-.venv/bin/python}
shift || true

find_chromium() { command -v chromium || command -v chromium-browser || command -v google-chrome || true; }
chromium=${CHROMIUM:-$(find_chromium)}
if [ -z "$chromium" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -q
    apt-get install -qy --no-install-recommends chromium
    chromium=$(find_chromium)
fi
if [ -z "$chromium" ]; then
    echo "no Chromium: install the package chromium" >&2
    exit 1
fi

CHROMIUM=$chromium timeout "${BROWSER_SECONDS:-300}" \
    "$python" -m pytest -q -n 0 -p no:cacheprovider -m browser tests/test_serve_page.py "$@"
