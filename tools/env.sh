# Sourced from the repository root by the scripts beside it: makes .venv ready, or stops with one line.
# Sets $python to the environment's interpreter. Installs only when its inputs have changed.

python=.venv/bin/python
env_stamp=.venv/shardq-installed

env_fail() {
    echo "tools/env.sh: $1" >&2
    exit 1
}

# What the environment was made from. The folder counts too: an editable install points at it.
env_inputs() {
    pwd
    cat pyproject.toml tools/constraints.txt
}

# A half-made environment has no working pip; venv repairs it in place.
env_make() {
    local base
    base=$(command -v python3.11 || command -v python3) ||
        env_fail "no python3 on PATH; install Python 3.11 or newer"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        env_fail "$base is older than Python 3.11; install Python 3.11 or newer"
    "$base" -m venv .venv || env_fail "$base could not make .venv; install its venv module"
}

env_install() {
    local torch pip
    torch=$(grep '^torch==' tools/constraints.txt) || env_fail "tools/constraints.txt pins no torch; add torch==VERSION"
    pip=("$python" -m pip install --quiet --disable-pip-version-check -c tools/constraints.txt)
    echo "installing into .venv (minutes the first time)" >&2
    rm -f "$env_stamp"
    # torch goes first so that nothing else decides which build of it is taken
    "${pip[@]}" "$torch" || env_fail "installing $torch failed; see pip's message above"
    "${pip[@]}" -e '.[test,demo]' || env_fail "installing shardq failed; see pip's message above"
    # written last: without it an interrupted install starts again
    env_inputs > "$env_stamp.part"
    mv "$env_stamp.part" "$env_stamp"
}

if ! env_inputs | cmp -s - "$env_stamp"; then
    "$python" -m pip --version > /dev/null 2>&1 || env_make
    env_install
fi
