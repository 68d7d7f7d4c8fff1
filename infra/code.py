"""The project as the instances get it: the checkout's files in a tar that depends on their contents alone.

Files that git ignores are left out, and so is what no instance needs (tests, pages). The tar's SHA-256 is its
name, so what runs is what was here, whatever happens to the checkout later.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

from infra.errors import UserError
from infra.layout import MAX_CODE_BYTES

ROOT = Path(__file__).parent.parent
LEFT_OUT = ("tests", "docs", "notebooks", ".ci", ".github")
NEEDED = ("pyproject.toml", "constraints.txt", "infra", "train", "data_prep", "evaluation")
PREFIX = "imagenet-sprint"


def pack_code(root: Path = ROOT) -> tuple[bytes, str]:
    """The gzipped tar, and its SHA-256.

    Raises:
        UserError: this is no checkout, or it is far too large.
    """
    missing = [name for name in NEEDED if not (root / name).exists()]
    if missing:
        raise UserError(
            f"{root} is no checkout of the project ({', '.join(missing)} missing): start from a clone of it"
        )
    names = [name for name in _names(root) if name.split("/")[0] not in LEFT_OUT]
    if sum((root / name).stat().st_size for name in names) > MAX_CODE_BYTES:
        raise UserError(
            f"{root} holds more than {MAX_CODE_BYTES >> 20} MiB beside what git ignores: move data out"
        )
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            path = root / name
            entry = tarfile.TarInfo(f"{PREFIX}/{name}")
            entry.size = path.stat().st_size
            entry.mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
            with path.open("rb") as file:
                tar.addfile(entry, file)
    packed = gzip.compress(raw.getvalue(), compresslevel=6, mtime=0)
    return packed, hashlib.sha256(packed).hexdigest()


def _names(root: Path) -> list[str]:
    """Of regular files, sorted; what git knows or would add, or without git all but hidden ones."""
    try:
        listed = subprocess.run(
            ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            capture_output=True,
            check=True,
        ).stdout.decode()
        names = [name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError, UnicodeDecodeError):
        found = (path.relative_to(root) for part in root.iterdir() for path in _below(part))
        names = [path.as_posix() for path in found if not _is_private(path)]
    regular = (name for name in set(names) if (root / name).is_file() and not (root / name).is_symlink())
    return sorted(regular)


def _below(path: Path) -> list[Path]:
    skipped = ("runs", "data", "build", "dist")
    if path.name.startswith(".") or path.name in skipped:
        return []
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def _is_private(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)
