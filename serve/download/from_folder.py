"""A run from another folder: a network disk, a stick."""

from __future__ import annotations

from pathlib import Path

from data_prep.progress import progress_bar
from data_prep.storage import sha256_file
from serve.download.marker import is_of, mark
from serve.download.resumable import bring_file
from train.checkpoint import BEST_NAME, BEST_WEIGHTS_NAME, MANIFEST_NAME, CheckpointStore
from train.run_folder import METRICS_NAME, RECIPE_NAME, STATUS_NAME, SUMMARY_NAME

ROOT_FILES = (RECIPE_NAME, SUMMARY_NAME, STATUS_NAME, METRICS_NAME, "damaged.jsonl", "lr_finder.png")


def bring(source: Path, folder: Path) -> Path:
    """Copy a run's figures, report, newest and best checkpoint to `folder`.

    Raises:
        ValueError: it is no run, a file of it is damaged, or `folder` holds another run.
    """
    store = CheckpointStore(source / "checkpoints")
    manifest = store.manifest()
    if not manifest.checkpoints:
        raise ValueError(f"{source} holds no checkpoint: name a run's folder, runs/NAME")
    if source.resolve() == folder.resolve():
        raise ValueError(f"{folder} is the run itself: choose another folder with --out")
    origin = str(source.resolve())
    if not is_of(folder, "folder", origin):
        _refuse_another(folder, {entry.sha256 for entry in manifest.checkpoints})
    _refuse_newer(folder, manifest.checkpoints[-1].step)
    mark(folder, "folder", origin)
    newest, best = manifest.checkpoints[-1], manifest.entry(manifest.best)
    kept = [entry for entry in manifest.checkpoints if entry in (newest, best)]
    # Path below the run → SHA-256 as it was saved, or None: then what is read now.
    files: dict[str, str | None] = {f"checkpoints/{entry.name}": entry.sha256 for entry in kept}
    if best is not None:
        files[f"checkpoints/{BEST_NAME}"] = best.sha256
        files[f"checkpoints/{BEST_WEIGHTS_NAME}"] = None
    files |= dict.fromkeys(ROOT_FILES)
    files |= {f"report/{path.name}": None for path in sorted((source / "report").glob("*")) if path.is_file()}
    there = {name: digest for name, digest in files.items() if (source / name).is_file()}
    with progress_bar(sum((source / name).stat().st_size for name in there), "download", unit="B") as bar:
        for name, digest in there.items():
            _copy(source / name, folder / name, digest or sha256_file(source / name), bar)
    # Last: without it, nothing here claims to be complete.
    listing = manifest.model_copy(update={"checkpoints": tuple(kept)})
    (folder / "checkpoints" / MANIFEST_NAME).write_text(listing.model_dump_json(indent=2) + "\n")
    return folder


def _copy(source: Path, target: Path, digest: str, bar: object) -> None:
    with source.open("rb") as file:

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        bring_file(read, target, source.stat().st_size, digest, bar)


def _refuse_another(folder: Path, known: set[str]) -> None:
    there = CheckpointStore(folder / "checkpoints").manifest().checkpoints
    if there and not any(entry.sha256 in known for entry in there):
        raise ValueError(f"{folder} holds checkpoints of another run: choose another folder with --out")


def _refuse_newer(folder: Path, step: int) -> None:
    """A copy that was trained on is not put back."""
    there = CheckpointStore(folder / "checkpoints").manifest().checkpoints
    if there and there[-1].step > step:
        raise ValueError(
            f"{folder} is at step {there[-1].step:,}, the run at {step:,}: choose another folder with --out"
        )
