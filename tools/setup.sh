#!/usr/bin/env bash
# Make everything that tests, demo and benchmarks need: the virtual environment .venv with all Python
# packages, and, when we may install them, the system's tools. Safe to run again; the Makefile runs it
# only when its inputs changed. Without root what is missing is named, and tests that need it say so.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/.ready
tools=(qemu-system-x86 qemu-utils nbdkit libnbd-bin python3-libnbd libisal2 fio nbd-client socat
       linux-image-cloud-amd64 busybox-static e2fsprogs xfsprogs cpio
       btrfs-progs dosfstools gdisk)
apt_updated=

note() { printf 'setup: %s\n' "$*" >&2; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -n "$@"; fi
}

may_install() {
    command -v apt-get >/dev/null && as_root true 2>/dev/null
}

# One `apt-get update`, and only if something is to be installed.
apt_install() {
    if [ -z "$apt_updated" ]; then
        as_root apt-get -qq update >&2 || note "apt-get update failed, going on with the lists at hand"
        apt_updated=yes
    fi
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq -y --no-install-recommends install "$@" >&2
}

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    note "no Python 3.11 or newer found; install one (Debian: apt-get install python3)"
    return 1
}

make_venv() {
    local python
    [ -x $venv/bin/python ] && $venv/bin/python -m pip --version >/dev/null 2>&1 && return
    python=$(find_python)
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
        may_install || { note "Python's venv module is missing; install python3-venv"; return 1; }
        apt_install "$("$python" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')"
    fi
    note "making $venv with $python"
    "$python" -m venv $venv
}

install_tools() {
    local package missing=()
    if ! command -v dpkg-query >/dev/null; then
        note "not a Debian system; guest, interoperability and benchmark parts need: ${tools[*]}"
        return
    fi
    for package in "${tools[@]}"; do
        installed "$package" || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return
    if may_install; then
        note "installing ${missing[*]}"
        apt_install "${missing[@]}" && return
        note "apt-get could not install them all, going on without"
    else
        note "missing, and neither root nor sudo at hand: apt-get install ${missing[*]}"
    fi
}

make_venv
note "installing Python packages"
PYTHONWARNINGS=ignore $venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,tls]'
install_tools
tools/link_libnbd.sh $venv
touch $stamp
note "ready"
