#!/usr/bin/env bash
# Runs ruff, mypy, a strict build of the documents, and the tests, two files at a time. Arguments go to pytest, which
# then runs one file at a time: tools/test.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/env.sh
"$python" -m ruff check .
"$python" -m ruff format --check shardq tests tools
"$python" -m mypy
NO_MKDOCS_2_WARNING=1 "$python" -m mkdocs build --strict --quiet  # in .cache/site; a warning ends it
if [[ $# -eq 0 ]]; then
    # one thread each: the tests' tensors are small, and threads beyond the cores wait for one another
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    # in the order of the files: by their number of tests, the longest, of few tests each, would come last
    set -- --numprocesses 2 --dist loadfile --no-loadscope-reorder
fi
exec "$python" -m pytest "$@"
