# Sourced by server/run, tests/run and .ci/run: sets up .venv, once for each state of pyproject.toml.
# After `promptd_setup EXTRA`, $PROMPTD_ROOT/.venv holds the project, editable, with that extra (server or dev).
# PROMPTD_PYTHON names the Python to use; it must be 3.11 or newer.

PROMPTD_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PROMPTD_VENV="$PROMPTD_ROOT/.venv"
TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"

say() { printf '\033[1mpromptd:\033[0m %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

promptd_setup() {
    local extra="$1"
    promptd_is_set_up "$extra" && return
    # Two starts at once must not install into the same folder: the second waits here.
    exec 9<"$PROMPTD_ROOT"
    ! command -v flock >/dev/null || flock 9
    if ! promptd_is_set_up "$extra"; then
        promptd_make_venv
        promptd_install_torch
        say "[3/3] Installing promptd[$extra] and what it needs"
        promptd_pip install --editable "$PROMPTD_ROOT[$extra]" || die "the installation failed; run it again to go on"
        promptd_stamp >"$PROMPTD_VENV/.promptd-$extra"
        say "Ready: $PROMPTD_VENV"
    fi
    exec 9<&-
}

# Succeed where this state of the project was installed before; dev contains server.
promptd_is_set_up() {
    local stamp each
    "$PROMPTD_VENV/bin/python" -c '' 2>/dev/null || return
    stamp="$(promptd_stamp)"
    for each in "$1" dev; do
        [ "$(cat "$PROMPTD_VENV/.promptd-$each" 2>/dev/null)" = "$stamp" ] && return
    done
    return 1
}

# The console's tests need a browser. Where this user may install packages, it is installed once; where not, they skip.
promptd_setup_browser() {
    local each stamp="$PROMPTD_VENV/.promptd-browser"
    [ -z "${PROMPTD_BROWSER:-}" ] && [ ! -e "$stamp" ] || return 0
    for each in chromium-headless-shell chromium google-chrome google-chrome-stable chromium-browser; do
        ! command -v "$each" >/dev/null || return 0
    done
    touch "$stamp"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "Installing a browser for the console's tests"
        (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
            chromium-headless-shell fonts-dejavu-core) >"$PROMPTD_VENV/browser.log" 2>&1 && return
    fi
    say "No browser: the console's tests skip (apt-get install chromium-headless-shell)"
}

# What decides the content of .venv: the requirements, and where an editable install points to.
promptd_stamp() {
    (cat "$PROMPTD_ROOT/pyproject.toml" "$PROMPTD_ROOT/server/constraints.txt" && echo "$PROMPTD_ROOT") | cksum
}

promptd_pip() {
    "$PROMPTD_VENV/bin/python" -m pip --disable-pip-version-check "$@" --constraint "$PROMPTD_ROOT/server/constraints.txt"
}

promptd_python() {
    local each
    for each in "${PROMPTD_PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11; do
        [ -n "$each" ] || continue
        if "$each" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$each"
            return
        fi
    done
    return 1
}

promptd_make_venv() {
    local python
    "$PROMPTD_VENV/bin/python" -m pip --version >/dev/null 2>&1 && return
    python="$(promptd_python)" || die "no Python 3.11 or newer found. Install one, for example:
    sudo apt-get update && sudo apt-get install -y python3 python3-venv"
    say "[1/3] Making .venv with $("$python" --version) ($python)"
    rm -rf "$PROMPTD_VENV"
    "$python" -m venv "$PROMPTD_VENV" >/dev/null 2>&1 && return
    # Debian and Ubuntu keep ensurepip in a package of its own.
    rm -rf "$PROMPTD_VENV"
    "$python" -m venv --without-pip "$PROMPTD_VENV" && promptd_bootstrap_pip "$python" && return
    rm -rf "$PROMPTD_VENV"
    die "this Python cannot make a virtual environment with pip. Install the missing part, then run this again:
    sudo apt-get update && sudo apt-get install -y python3-venv"
}

# Put pip into a .venv made without it: by a pip of this machine, by Debian's wheel of it, or from the package index.
promptd_bootstrap_pip() {
    local wheel
    "$1" -m pip --python "$PROMPTD_VENV/bin/python" install --quiet pip 2>/dev/null && return
    for wheel in /usr/share/python-wheels/pip-*.whl; do
        [ -f "$wheel" ] && PYTHONPATH="$wheel" "$PROMPTD_VENV/bin/python" -m pip install --quiet pip && return
    done
    say "      No pip on this machine: fetching it"
    "$PROMPTD_VENV/bin/python" "$PROMPTD_ROOT/server/fetch_pip.py"
}

# The CPU build is a tenth of the size of the CUDA build, which is what the default index has.
promptd_install_torch() {
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        say "[2/3] Installing torch (CUDA build: $(nvidia-smi -L | head -n 1 | cut -d '(' -f 1))"
    elif promptd_reaches "$TORCH_CPU_INDEX/torch/"; then
        say "[2/3] Installing torch (CPU build: no GPU found)"
        promptd_pip install torch --index-url "$TORCH_CPU_INDEX" && return
        say "      $TORCH_CPU_INDEX did not deliver: taking the default index"
    else
        say "[2/3] Installing torch (no GPU found, but $TORCH_CPU_INDEX cannot be reached: default index, a large download)"
    fi
    promptd_pip install torch || die "torch could not be installed"
}

# The tests run against real servers, from Debian's packages; where one is missing its tests are skipped and say so.
promptd_install_services() {
    local missing=()
    PATH="$PATH:/usr/sbin" command -v redis-server >/dev/null || missing+=(redis-server)
    PATH="$PATH:/usr/sbin" command -v haproxy >/dev/null || missing+=(haproxy)
    PATH="$PATH:/usr/sbin" command -v nginx >/dev/null || missing+=(nginx)
    command -v promtool >/dev/null || missing+=(prometheus)
    command -v cc >/dev/null || missing+=(gcc libc6-dev)
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        say "Some tests need ${missing[*]}, and installing needs root. They are skipped; to run them:
    sudo apt-get update && sudo apt-get install -y --no-install-recommends ${missing[*]}"
        return 0
    fi
    say "Installing ${missing[*]} for the tests"
    # RUNLEVEL=1: the packages' own services are not started.
    (export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
        apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}") >/dev/null 2>&1 ||
        say "apt-get could not install ${missing[*]}: the tests that need them are skipped"
}

promptd_reaches() {
    "$PROMPTD_VENV/bin/python" - "$1" 2>/dev/null <<'PYTHON'
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=5).close()
PYTHON
}
