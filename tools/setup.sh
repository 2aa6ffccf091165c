#!/bin/sh
# tools/setup.sh [EXTRA]: make .venv with the versions of constraints.txt and this package in it, editable. Called by the Makefile.
# PYTHON names the interpreter; without it, the first on the path that is new enough. A set-up that cannot work ends in one line.
set -eu
cd "$(dirname "$0")/.."

cpu_index=https://download.pytorch.org/whl/cpu

fail() {
    echo "minisd3: $*" >&2
    exit 1
}

find_python() {
    for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$python"
            return
        fi
    done
    fail "Python 3.11 or newer is needed, and ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>/dev/null || echo missing);" \
        "install one, or name it: make lab PYTHON=/path/to/python3.12"
}

need_space() { # GIB
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge "$1" ] || fail "PyTorch and JupyterLab need $1 GiB of free disk, and $(pwd) has $free; free some, or clone elsewhere"
}

answers() { # URL
    .venv/bin/python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$1" >/dev/null 2>&1
}

pip_install() {
    .venv/bin/python -m pip install --disable-pip-version-check $quiet -c constraints.txt "$@" ||
        fail "pip could not install the packages; its reason is above (no network? a proxy?). To go on from here, run make again"
}

python=$(find_python)
quiet=$([ -t 1 ] || echo -qq)
gpu=$(command -v nvidia-smi || true)

if ! .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
    need_space "$([ -n "$gpu" ] && echo 12 || echo 4)" # PyTorch with CUDA is the larger one
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments; on Debian and Ubuntu: sudo apt-get install python3-venv"
    "$python" -m venv --clear .venv || fail "$python could not make .venv; its reason is above"
fi

echo "minisd3: installing into .venv with $(.venv/bin/python --version); the first time takes minutes" >&2
if [ "$(uname)" = Linux ] && [ -z "$gpu" ] && answers $cpu_index/torch/; then
    pip_install --extra-index-url $cpu_index torch # without it, Linux gets gigabytes of CUDA
fi
pip_install --editable ".${1:+[$1]}"
