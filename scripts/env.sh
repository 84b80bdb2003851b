# Sourced by the other scripts: creates .venv once, installs a list of requirements, and activates it.
#
#   source scripts/env.sh requirements.txt
#
# VENV=DIR puts the environment elsewhere, PYTHON=python3.12 chooses the interpreter. VENV=none installs nothing and uses the
# `python` of the caller.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}
if [ "$VENV" = none ]; then
    return 0
fi

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo 'error: no Python 3.11 or newer was found; install one, or name it: PYTHON=/path/to/python3' >&2
    return 1
}

if [ ! -x "$VENV/bin/python" ]; then
    python=$(find_python) || exit 1
    echo "making a virtual environment in $VENV ($("$python" --version))"
    "$python" -m venv "$VENV" || { echo "error: '$python -m venv' failed; on Debian: apt install python3-venv" >&2; exit 1; }
fi
source "$VENV/bin/activate"

# Install again only when the lists have changed.
stamp="$VENV/installed-$1"
wanted=$(cat requirements*.txt constraints.txt | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing $1 (PyTorch is large: this takes a few minutes once)"
    python -m pip install --quiet --disable-pip-version-check -r "$1" -c constraints.txt
    echo "$wanted" > "$stamp"
fi
