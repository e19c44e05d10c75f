#!/usr/bin/env bash
# Makes $VENV with this package, its tests' needs and the CPU platform; system packages too, where it may install them.
# Reads nothing from stdin. On failure: one sentence that says what to do.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3.11}
VENV=${VENV:-.venv}
export PATH="$PATH:/usr/sbin:/sbin" DEBIAN_FRONTEND=noninteractive

fail() {
    echo "set-up: $*" >&2
    exit 1
}

apt_updated=no
install_packages() { # PACKAGE...; true if they are installed now
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    if [ "$apt_updated" = no ]; then
        apt-get update -qq </dev/null >/dev/null || return 1
        apt_updated=yes
    fi
    echo "set-up: apt-get install $*"
    # dpkg's chatter is shown only when something goes wrong.
    local log
    log=$(mktemp)
    if ! apt-get install -y -qq --no-install-recommends "$@" </dev/null >"$log" 2>&1; then
        tail -n 5 "$log" >&2
        rm -f "$log"
        return 1
    fi
    rm -f "$log"
}

has_library() { ldconfig -p | grep -qF "$1"; }

# Mooncake's engine and store are linked against these. The tools shape and cut links and need root anyway.
libraries=()
has_library libibverbs.so.1 || libraries+=(libibverbs1)
has_library librdmacm.so.1 || libraries+=(librdmacm1)
has_library libnuma.so.1 || libraries+=(libnuma1)
has_library liburing.so.2 || libraries+=(liburing2)
has_library libcurl.so.4 || libraries+=(libcurl4)
tools=()
if [ "$(id -u)" = 0 ]; then
    command -v ip >/dev/null && command -v tc >/dev/null || tools+=(iproute2)
    command -v nft >/dev/null || tools+=(nftables)
    command -v ps >/dev/null || tools+=(procps)
fi
missing=("${libraries[@]}" "${tools[@]}")
if [ ${#missing[@]} -gt 0 ]; then
    install_packages "${missing[@]}" || fail "install these Debian packages first: ${missing[*]}"
fi

# Run, not only looked up: a version manager's shim may exist for a Python that does not, and Debian's Python comes
# without ensurepip unless its venv package is there.
can_make_venv() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    if ! can_make_venv "$PYTHON"; then
        if [ "$PYTHON" = python3.11 ] && can_make_venv /usr/bin/python3.11; then
            PYTHON=/usr/bin/python3.11
        elif [ "$PYTHON" = python3.11 ] && install_packages python3.11 python3.11-venv; then
            PYTHON=/usr/bin/python3.11
        fi
    fi
    can_make_venv "$PYTHON" || fail "$PYTHON with its venv module is needed: install python3.11 and python3.11-venv, or set PYTHON to a Python of at least 3.11"
    echo "set-up: making $VENV with $PYTHON"
    "$PYTHON" -m venv --clear "$VENV" || fail "$PYTHON -m venv $VENV failed"
fi

echo "set-up: installing SGLang, Mooncake and the test tools into $VENV (about 11 GB the first time, some minutes)"
# Twice quiet: errors only. Warnings of pip are about mirrors and editable installs, not about what is installed.
pip=("$VENV/bin/python" -m pip -qq --disable-pip-version-check --no-input)
export PIP_ROOT_USER_ACTION=ignore PIP_PROGRESS_BAR=off
"${pip[@]}" install --upgrade pip </dev/null || fail "pip cannot reach a package index"
"${pip[@]}" install -e '.[mooncake-cpu,test,bench]' -e platforms/cpu </dev/null ||
    fail "pip could not install what pyproject.toml names: see its message above"
echo "set-up: done"
