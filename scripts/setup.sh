#!/usr/bin/env bash
# Install what is missing: system packages, a virtual environment, pinned Python packages, FFCV.
# Run by make; a second run finds everything there and does nothing.
#
#   PYTHON=python3.12 VENV=.venv scripts/setup.sh
#   EXTRAS=node scripts/setup.sh       # on an instance: what training needs, without the tests' packages
#
# Without FFCV everything works on the reference loader, so its build may fail; SKIP_FFCV=1 leaves it out.
# PostgreSQL is for tests only; SKIP_POSTGRES=1 leaves it out.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-python3}"
VENV="${VENV:-.venv}"
APT_LOG="$(mktemp)"
trap 'rm -f "$APT_LOG"' EXIT

say() { printf '%s\n' "$*" >&2; }

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

can_be_root() {
  [ "$(id -u)" = 0 ] || { command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; }
}

# install_packages WHY PACKAGE...: through apt where that is allowed, else the command to type. 1 if not done.
install_packages() {
  local why="$1"
  shift
  if ! command -v apt-get >/dev/null 2>&1; then
    say "$why needs these system packages (Debian names): $*"
    return 1
  fi
  if ! can_be_root; then
    say "$why needs system packages; please run:"
    say "  sudo apt-get update && sudo apt-get install -y --no-install-recommends $*"
    return 1
  fi
  say "installing system packages for $why: $*"
  if ! { as_root apt-get update && as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y --no-install-recommends "$@"; } >"$APT_LOG" 2>&1; then
    say "apt could not install them:"
    tail -n 5 "$APT_LOG" >&2
    return 1
  fi
}

# Which Python: 3.11 to 3.13.
python_fits() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}
if [ ! -x "$VENV/bin/pip" ]; then
  for candidate in "$PYTHON" python3.12 python3.13 python3.11; do
    if command -v "$candidate" >/dev/null 2>&1 && python_fits "$candidate"; then
      FOUND="$candidate"
      break
    fi
  done
  if [ -z "${FOUND:-}" ]; then
    say "error: Python 3.11, 3.12 or 3.13 is needed and was not found; set PYTHON=/path/to/python"
    exit 1
  fi
fi

# What is installed is named by a digest of what asks for it.
WANTED="$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -c1-16)"
STAMP="$VENV/.setup-$WANTED"
FFCV_STAMP="$VENV/.ffcv-$WANTED"

if [ ! -e "$STAMP" ]; then
  if [ ! -x "$VENV/bin/pip" ]; then
    if ! "$FOUND" -c 'import ensurepip' 2>/dev/null; then
      version="$("$FOUND" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
      install_packages "the virtual environment" "python$version-venv" || exit 1
    fi
    say "creating $VENV with $("$FOUND" --version)"
    # A half-made one of an earlier, interrupted start has no pip; it is made anew.
    "$FOUND" -m venv --clear "$VENV"
  fi
  say "installing Python packages into $VENV (some 3 GB the first time; pip's cache helps the second)"
  "$VENV/bin/pip" install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[${EXTRAS:-dev}]"
  touch "$STAMP"
fi

# Some tests put MLflow's server on a PostgreSQL of their own; without it, they are skipped.
POSTGRES_STAMP="$VENV/.postgres-$WANTED"
if [ ! -e "$POSTGRES_STAMP" ] && [ -z "${SKIP_POSTGRES:-}" ]; then
  if command -v initdb >/dev/null 2>&1 || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null; then
    touch "$POSTGRES_STAMP"
  elif install_packages "tests on PostgreSQL" postgresql; then
    # The package starts a server of its own, which nobody asked for.
    as_root service postgresql stop >/dev/null 2>&1 || true
    touch "$POSTGRES_STAMP"
  else
    touch "$POSTGRES_STAMP"  # asked once a version
    say "tests on PostgreSQL will be skipped"
  fi
fi

# FFCV compiles against the system's libjpeg-turbo and OpenCV. Tried once a version; its lack costs speed only.
if [ ! -e "$FFCV_STAMP" ] && [ -z "${SKIP_FFCV:-}" ]; then
  turbojpeg=libturbojpeg0-dev
  if [ -r /etc/os-release ] && grep -qi '^ID=ubuntu' /etc/os-release; then turbojpeg=libturbojpeg-dev; fi
  python_version="$("$VENV/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
  packages=(build-essential pkg-config "$turbojpeg" libopencv-dev)
  if ! "$VENV/bin/python" -c 'import os, sysconfig; raise SystemExit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))'; then
    packages+=("python$python_version-dev")
  fi
  reason=""
  if ! { command -v g++ && command -v pkg-config && pkg-config --exists opencv4 libturbojpeg; } >/dev/null 2>&1 \
    || [ "${#packages[@]}" -gt 4 ]; then
    install_packages "FFCV" "${packages[@]}" || reason="its system packages are missing (see above)"
  fi
  if [ -z "$reason" ]; then
    say "building FFCV"
    if ! "$VENV/bin/pip" install --disable-pip-version-check --quiet --constraint constraints.txt \
      --editable '.[ffcv]' >"$APT_LOG" 2>&1; then
      reason="its build failed: $(grep -E 'error|Error' "$APT_LOG" | tail -n 1)"
    elif ! "$VENV/bin/python" -c 'import ffcv._libffcv' >"$APT_LOG" 2>&1; then
      reason="it does not import: $(tail -n 1 "$APT_LOG")"
    fi
  fi
  if [ -z "$reason" ]; then
    touch "$FFCV_STAMP"
  else
    # No stamp: the next start tries again, when the packages may be there.
    say "FFCV is left out: $reason"
    say "everything works without it, on the slower reference loader"
  fi
fi
