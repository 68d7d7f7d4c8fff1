"""Run folders for the tests of the mirror, and what may be asked of a mirror at any time."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

from data_prep.storage import write_atomically
from tests.integration.s3_server import SECRET, Bucket
from train.checkpoint import CheckpointEntry, CheckpointManifest, CheckpointStore
from train.checkpoint.mirror_listing import Latest

SMALL = {"recipe.yaml": b"run: {}\n", "lr_finder.png": b"\x89PNG", "mlflow.json": b'{"run": "a"}'}


class FakeRun:
    """A run folder as training leaves it; a checkpoint is `num_bytes` of noise."""

    def __init__(self, folder: Path, num_bytes: int = 1000) -> None:
        self.folder, self.num_bytes = folder, num_bytes
        (folder / "checkpoints").mkdir(parents=True)
        for name, content in SMALL.items():
            (folder / name).write_bytes(content)

    @property
    def manifest(self) -> CheckpointManifest:
        return CheckpointStore(self.folder / "checkpoints").manifest()

    def save(self, step: int, is_best: bool = False, keep_last: int = 2) -> CheckpointManifest:
        content = random.Random(f"{self.folder} {step}").randbytes(self.num_bytes)
        name = f"step-{step:08d}.pt"
        (self.folder / "checkpoints" / name).write_bytes(content)
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "loss": 1 / (step + 1)}) + "\n")
        digest = hashlib.sha256(content).hexdigest()
        entry = CheckpointEntry(name=name, step=step, sha256=digest, bytes=len(content))
        entries = [*self.manifest.checkpoints, entry]
        best = name if is_best or self.manifest.best is None else self.manifest.best
        kept = [entry for entry in entries if entry in entries[-keep_last:] or entry.name == best]
        manifest = CheckpointManifest(checkpoints=tuple(kept), best=best)
        write_atomically(self.folder / "checkpoints" / "manifest.json", manifest.model_dump_json().encode())
        self.prune()
        return manifest

    def prune(self) -> None:
        for path in (self.folder / "checkpoints").glob("step-*.pt"):
            if self.manifest.entry(path.name) is None:
                path.unlink()


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def expected_of(run: FakeRun) -> dict[str, bytes]:
    """The files of a run that a fresh machine must get; the manifest aside."""
    manifest = run.manifest
    names = {manifest.checkpoints[-1].name, manifest.best}
    files = files_of(run.folder)
    return {
        name: content
        for name, content in files.items()
        if "/" not in name or name.removeprefix("checkpoints/") in names
    }


def whole_latest(bucket: Bucket, prefix: str) -> Latest:
    """What `latest.json` says, after a look at every object that it names."""
    while True:
        before = bucket.get(f"{prefix}/latest.json")
        latest = Latest.model_validate_json(before)
        faults = [fault for item in latest.objects if (fault := _fault(bucket, prefix, item))]
        if not faults:
            return latest
        # A writer may have moved on meanwhile, and deleted what was named.
        assert bucket.get(f"{prefix}/latest.json") != before, faults


def _fault(bucket: Bucket, prefix: str, item: object) -> str | None:
    key = item.key  # type: ignore[attr-defined]
    try:
        content = bucket.get(f"{prefix}/{key}")
    except bucket.s3.exceptions.NoSuchKey:
        return f"{key} is missing"
    is_right = hashlib.sha256(content).hexdigest() == item.sha256  # type: ignore[attr-defined]
    return None if is_right else f"{key} is damaged"


def assert_clean(bucket: Bucket, prefix: str) -> Latest:
    """Nothing is there but what `latest.json` names."""
    latest = whole_latest(bucket, prefix)
    assert set(bucket.files(prefix)) == {"latest.json"} | latest.keys
    assert bucket.uploads() == []
    return latest


def assert_no_secret(said: list[str]) -> None:
    text = "\n".join(said)
    assert SECRET not in text and "AWS4-HMAC" not in text and "dummy" not in text
