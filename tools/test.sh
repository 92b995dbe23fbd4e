#!/usr/bin/env bash
# Runs the tests; arguments go to pytest, for example: tools/test.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/env.sh
exec "$python" -m pytest "$@"
