"""Checkpoints: what a run needs to go on, written so that no death of a process or machine loses it."""

from train.checkpoint.cadence import Cadence
from train.checkpoint.manifest import CheckpointEntry, CheckpointManifest
from train.checkpoint.mirror import CheckpointMirror, mirror_fault
from train.checkpoint.store import (
    BEST_NAME,
    BEST_WEIGHTS_NAME,
    CHECKPOINT_KEYS,
    CHECKPOINT_VERSION,
    MANIFEST_NAME,
    CheckpointStore,
    load_checkpoint,
    missing_keys,
    state_sha256,
)
from train.checkpoint.untrusted import UnsafeFile, content_fault, read_checkpoint_file, read_torch_file
from train.checkpoint.writer import CheckpointWriter

__all__ = [
    "BEST_NAME",
    "BEST_WEIGHTS_NAME",
    "CHECKPOINT_KEYS",
    "CHECKPOINT_VERSION",
    "MANIFEST_NAME",
    "Cadence",
    "CheckpointEntry",
    "CheckpointManifest",
    "CheckpointMirror",
    "CheckpointStore",
    "CheckpointWriter",
    "UnsafeFile",
    "content_fault",
    "load_checkpoint",
    "mirror_fault",
    "missing_keys",
    "read_checkpoint_file",
    "read_torch_file",
    "state_sha256",
]
