#!/bin/sh
# install.sh PYTHON FOLDER [EXTRA]: makes the virtual environment in which the Makefile's targets run, with what the
# extra in pyproject.toml names (dev, if none is given).
# A run that was stopped is taken up where it ended; what goes wrong is said with what to do about it.

python=$1
folder=$2
extra=${3:-dev}

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

is_new() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

check_python() {
    name="Name one with: make PYTHON=/path/to/python3.12 (or whichever you have)."
    command -v "$python" >/dev/null || fail "there is no $python here, but recon needs Python 3.10 or newer. $name"
    version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])') || fail "$python does not run. $name"
    is_new "$python" || fail "$python is Python $version, but recon needs 3.10 or newer. $name"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments: it lacks the modules venv and ensurepip." \
            "On Debian and Ubuntu they are the package python${version%.*}-venv."
}

pip() {
    "$folder/bin/python" -m pip "$@"
}

is_made() {
    test -x "$folder/bin/python" && is_new "$folder/bin/python" && pip --version >/dev/null 2>&1
}

is_made || check_python
case $extra in
    dev) echo "Installing recon and PyTorch into $folder: about 5 GB and some minutes, the first time only." >&2 ;;
    *) echo "Installing what '$extra' needs beside recon into $folder: a minute, the first time only." >&2 ;;
esac
is_made || "$python" -m venv --clear "$folder" ||
    fail "$python could not make the virtual environment $folder (see above). Is the disk full, or the folder not yours?"
pip install --quiet --disable-pip-version-check --editable ".[$extra]" ||
    fail "pip could not install what recon needs (see above). It downloads from PyPI, or from where PIP_INDEX_URL" \
        "points to: check the network, proxies (HTTPS_PROXY) and the free disk space, then run make again; it goes on" \
        "with what it has."
