"""The predictions of a model on a split as a file: `predictions.npz`, beside a report.

So that two models can be compared image by image without running either again. A plain npz: anybody's
`numpy.load(path, allow_pickle=False)` reads it.

    logits             float16 or float32 (samples, classes): float16 where that loses nothing
    labels, sample_ids int64 (samples,)
    class_names        text (classes,), in label order
    data_index_sha256  text: SHA-256 of the split's sample index, so the same images have the same
    checkpoint_sha256  text: SHA-256 of the checkpoint file; empty where unknown
    split, view        text: "val"; "96 px, crop 1"

Example:
    >>> saved = load_predictions(Path("runs/demo/report/predictions.npz"))
    >>> topk_accuracy(saved, 1), saved.data_index_sha256
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from evaluation.metrics import Predictions

PREDICTIONS_NAME = "predictions.npz"
MAX_FILE_BYTES = 16 << 30  # 50,000 images of 21,841 classes are 4.4 GB
MAX_NAME_CHARS = 1000
ARRAYS = {"logits": ("f", 2), "labels": ("i", 1), "sample_ids": ("i", 1), "class_names": ("U", 1)}
TEXTS = ("data_index_sha256", "checkpoint_sha256", "split", "view")  # as the fields below


def report_folder(split: str) -> str:
    """Where a run's report on a split goes: that on the validation split is the run's own."""
    return "report" if split == "val" else f"report-{split}"


@dataclass(frozen=True, eq=False)
class SavedPredictions(Predictions):
    """Predictions that know of which images and of which checkpoint they are; empty text where unknown.

    Two files are of the same images where `data_index_sha256` and the sample ids are equal.
    """

    data_index_sha256: str = ""
    checkpoint_sha256: str = ""
    split: str = ""
    view: str = ""


def predictions_bytes(predictions: Predictions) -> bytes:
    """The file's content; equal predictions give equal bytes. The texts are those of SavedPredictions."""
    half = predictions.logits.astype(np.float16) if np.abs(predictions.logits).max() < 65504 else None
    # Rounded logits would have ties that the model did not have, and with them another accuracy.
    is_exact = half is not None and np.array_equal(half.astype(np.float32), predictions.logits)
    arrays: dict[str, NDArray[Any]] = {
        "logits": half if half is not None and is_exact else predictions.logits,
        "labels": predictions.labels,
        "sample_ids": predictions.sample_ids,
        "class_names": np.array([name[:MAX_NAME_CHARS] for name in predictions.class_names], dtype=np.str_),
    }
    arrays |= {name: np.array(getattr(predictions, name, ""), dtype=np.str_) for name in TEXTS}
    buffer = io.BytesIO()
    # Not compressed: logits are noise in their lower bits, and a stored array is as large as it says.
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def load_predictions(path: Path) -> SavedPredictions:
    """Read a predictions file, which may come from anybody: nothing runs, nothing grows beyond the file.

    Raises:
        ValueError: missing, damaged, or no predictions of this project; one sentence.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: python -m evaluation RUN --data DIR writes it")
    try:
        arrays = read_stored_arrays(path, ARRAYS | dict.fromkeys(TEXTS, ("U", 0)))
    except DamagedFile as error:
        raise ValueError(f"{path} is damaged ({error}): evaluate again") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a predictions file of this project: {error}") from None
    logits, names = arrays["logits"], arrays["class_names"]
    if len(names) != logits.shape[1]:  # before there is an object for each name
        raise ValueError(f"{path} cannot be used: {len(names):,} class names, {logits.shape[1]:,} classes")
    try:
        return SavedPredictions(
            logits,
            arrays["labels"],
            arrays["sample_ids"],
            tuple(str(name) for name in names),
            *(str(arrays[name]) for name in TEXTS),
        )
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from None


class DamagedFile(ValueError):
    """No whole zip archive."""


def read_stored_arrays(path: Path, kinds: Mapping[str, tuple[str, int]]) -> dict[str, NDArray[Any]]:
    """Arrays of an .npz that may come from anybody: nothing runs, no array is larger than the file.

    Args:
        kinds: for each name, the kind of its numpy type ("f") and its number of dimensions.

    Raises:
        ValueError: it is damaged (DamagedFile), compressed, too large, or holds something else; the reason
            alone, without the path.
    """
    try:
        file_bytes = path.stat().st_size
        if file_bytes > MAX_FILE_BYTES:
            raise ValueError(f"it is larger than {MAX_FILE_BYTES >> 30} GiB")
        with zipfile.ZipFile(path) as archive:
            return {name: _read_array(archive, file_bytes, name, *kind) for name, kind in kinds.items()}
    # An encrypted member is a RuntimeError.
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError) as error:
        raise DamagedFile(str(error) or "it ends too early") from None


def _read_array(
    archive: zipfile.ZipFile, file_bytes: int, name: str, kind: str, num_dimensions: int
) -> NDArray[Any]:
    try:
        member = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise ValueError(f"it has no {name}") from None
    # What is stored is as large as in the file; a compressed member could be a thousand times that.
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
        raise ValueError(f"its {name} is compressed")
    with archive.open(member) as file:
        shape, dtype = _read_header(file, name)
        if dtype.kind != kind or len(shape) != num_dimensions or not dtype.itemsize:
            raise ValueError(f"its {name} is {dtype} {shape}")
        # Before numpy makes room for what the header claims; also a directory of a zip can claim anything.
        room = min(member.file_size, file_bytes)
        claimed = dtype.itemsize * math.prod(shape)
        if claimed > room or not all(0 <= size <= room for size in shape):
            raise ValueError(f"its {name} claims {claimed:,} bytes, of shape {shape}, and has {room:,}")
    with archive.open(member) as file:
        return np.asarray(npy_format.read_array(file, allow_pickle=False))


def _read_header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = npy_format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = npy_format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = npy_format.read_array_header_2_0(file)
    else:
        raise ValueError(f"its {name} is of version {version}")
    return shape, dtype
