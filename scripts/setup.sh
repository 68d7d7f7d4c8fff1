#!/usr/bin/env bash
# Install what is missing: system packages, a virtual environment, pinned Python packages, FFCV.
# Run by make; a second run finds everything there and does nothing.
#
#   PYTHON=python3.12 VENV=.venv scripts/setup.sh
#   EXTRAS=node scripts/setup.sh       # on an instance: what training needs, without the tests' packages
#
# Without FFCV everything works on the reference loader, so its build may fail; SKIP_FFCV=1 leaves it out.
# PostgreSQL, Chromium, checkov and cloud-init are for tests only; SKIP_POSTGRES=1, SKIP_BROWSER=1 and
# SKIP_INFRA_CHECKS=1 leave them out.
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
  local try
  for try in 1 2 3 4 5 6; do
    if { as_root apt-get update && as_root env DEBIAN_FRONTEND=noninteractive \
      apt-get install -y --no-install-recommends "$@"; } >"$APT_LOG" 2>&1; then
      return 0
    fi
    # A machine that has just started is often updating itself.
    if [ "$try" = 6 ] || ! grep -qi 'could not get lock' "$APT_LOG"; then break; fi
    say "another program uses apt; waiting for it"
    sleep 20
  done
  say "apt could not install them:"
  tail -n 5 "$APT_LOG" >&2
  return 1
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
WANTED="$(cat pyproject.toml constraints.txt scripts/setup.sh scripts/infra-checks.txt | sha256sum | cut -c1-16)"
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
  # Most of what is installed is never imported, and what is compiles itself: not all of it beforehand.
  "$VENV/bin/pip" install --disable-pip-version-check --quiet --no-compile --constraint constraints.txt \
    --editable ".[${EXTRAS:-dev}]"
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

# The tests of web pages look at them in a browser.
BROWSER_STAMP="$VENV/.browser-$WANTED"
if [ "${EXTRAS:-dev}" = dev ] && [ ! -e "$BROWSER_STAMP" ] && [ -z "${SKIP_BROWSER:-}" ]; then
  if ! { command -v chromium && command -v chromedriver; } >/dev/null 2>&1 \
    && ! install_packages "tests in a browser" chromium chromium-driver; then
    say "tests in a browser will be skipped"
  fi
  touch "$BROWSER_STAMP"  # asked once a version
fi

# Terraform, where there is none: python -m infra needs it. A binary in the environment, no root; an instance has no use
# for it. No network is no error: what needs it says so.
TERRAFORM_VERSION=1.11.4
TERRAFORM_STAMP="$VENV/.terraform-$WANTED"
install_terraform() {
  local platform sha256 archive="$VENV/terraform.zip"
  case "$(uname -s) $(uname -m)" in
    "Linux x86_64") platform=linux_amd64 sha256=1ce994251c00281d6845f0f268637ba50c0005657eb3cf096b92f753b42ef4dc ;;
    "Darwin arm64") platform=darwin_arm64 sha256=867e0808fa971217043e25b7a792b10720c79b1546f8a68479b74f138be73e18 ;;
    *)
      say "Terraform is left out: get it for this machine from https://developer.hashicorp.com/terraform/install"
      return 0
      ;;
  esac
  local url="https://releases.hashicorp.com/terraform/$TERRAFORM_VERSION/terraform_${TERRAFORM_VERSION}_$platform.zip"
  say "installing Terraform $TERRAFORM_VERSION into $VENV/bin"
  if ! "$VENV/bin/python" - "$url" "$sha256" "$archive" "$VENV/bin/terraform" <<'EOF'; then
import hashlib, pathlib, shutil, sys, urllib.request, zipfile

url, sha256, archive, target = sys.argv[1:]
try:
    with urllib.request.urlopen(url, timeout=30) as answer, open(archive, "wb") as file:
        shutil.copyfileobj(answer, file)
except OSError as error:
    sys.exit(f"{url} did not come: {error}")
found = hashlib.sha256(pathlib.Path(archive).read_bytes()).hexdigest()
if found != sha256:
    sys.exit(f"{url} has SHA-256 {found}, not {sha256}")
part = pathlib.Path(target + ".part")
with zipfile.ZipFile(archive) as content:
    part.write_bytes(content.read("terraform"))
part.chmod(0o755)
part.replace(target)
EOF
    say "Terraform is left out: python -m infra needs it, and its tests will be skipped (remove $TERRAFORM_STAMP to try again)"
  fi
  rm -f "$archive"
}
if [ "${EXTRAS:-dev}" = dev ] && [ ! -e "$TERRAFORM_STAMP" ]; then
  if ! command -v terraform >/dev/null 2>&1 && [ ! -x "$VENV/bin/terraform" ]; then install_terraform; fi
  touch "$TERRAFORM_STAMP"
fi

# Static checks of infra/: checkov, whose versions go with nobody else's, in an environment of its own; and cloud-init,
# unpacked beside it, since installed it would configure this machine.
CHECKS="$VENV/infra-checks"
CHECKS_STAMP="$VENV/.infra-checks-$WANTED"
download_cloud_init() {
  local folder
  command -v apt-get >/dev/null 2>&1 && command -v dpkg >/dev/null 2>&1 || return 1
  folder="$(mktemp -d)"
  (cd "$folder" && apt-get download cloud-init && dpkg -x cloud-init_*.deb unpacked) \
    && rm -rf "$CHECKS/cloud-init" && mv "$folder/unpacked/usr/lib/python3/dist-packages" "$CHECKS/cloud-init"
  local status=$?
  rm -rf "$folder"
  return "$status"
}
if [ "${EXTRAS:-dev}" = dev ] && [ ! -e "$CHECKS_STAMP" ] && [ -z "${SKIP_INFRA_CHECKS:-}" ]; then
  say "installing the checks of infra/ into $CHECKS"
  if ! { { [ -x "$CHECKS/bin/pip" ] || "$VENV/bin/python" -m venv --clear "$CHECKS"; } && "$CHECKS/bin/pip" install \
    --disable-pip-version-check --quiet --no-compile --no-deps --requirement scripts/infra-checks.txt; } >"$APT_LOG" 2>&1; then
    rm -rf "$CHECKS"
    say "they are left out, and their tests will be skipped: $(tail -n 1 "$APT_LOG")"
  elif [ ! -d "$CHECKS/cloud-init" ] && ! download_cloud_init >"$APT_LOG" 2>&1 \
    && ! { can_be_root && as_root apt-get update && download_cloud_init; } >"$APT_LOG" 2>&1; then
    say "user data will not be checked against cloud-init's schema: its package did not come"
  fi
  touch "$CHECKS_STAMP"  # asked once a version
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
