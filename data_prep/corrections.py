"""What a label audit decided: images to leave out, and images of another class.

`python -m evaluation audit --apply review.csv` writes such a file; `prepare --corrections FILE` follows it. A
sample that is left out stands in `quarantine.jsonl` with the reason "label audit", so found is still prepared
+ quarantined. Splits stay as they were without corrections.

Example:
    >>> corrections = load_corrections(Path("corrections.json"))
    >>> source, lines = corrected(open_source("../shared/data/intel"), corrections)
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from data_prep.plain_json import read_json
from data_prep.sources import Source
from data_prep.sources.blobs import Blob
from data_prep.storage import write_atomically

LABEL_AUDIT = "label audit"  # the reason in quarantine.jsonl
MAX_CORRECTIONS_BYTES = 256 << 20


class Correction(BaseModel):
    """A verdict on one source file.

    Attributes:
        key: as in the sample index and `quarantine.jsonl`.
        given: the class it has in the source: a correction of another source is noticed by it.
        class_name: what it is in truth, for `relabel`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    given: str
    verdict: Literal["drop", "relabel"]
    class_name: str | None = None

    @model_validator(mode="after")
    def _has_class(self) -> Correction:
        if (self.verdict == "relabel") != (self.class_name is not None):
            raise ValueError("class_name goes with relabel, and only with it")
        return self


class CorrectionsFile(BaseModel):
    """The contents of `corrections.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    corrections: tuple[Correction, ...]


def save_corrections(path: Path, corrections: Sequence[Correction]) -> None:
    """Write a file that `load_corrections` reads."""
    content = CorrectionsFile(corrections=tuple(corrections)).model_dump_json(indent=1, exclude_none=True)
    write_atomically(path, (content + "\n").encode())


def load_corrections(path: Path) -> tuple[Correction, ...]:
    """Read a file of corrections. ValueError: it is missing, or none."""
    if not path.is_file():
        raise ValueError(f"--corrections {path} does not exist")
    try:
        return CorrectionsFile.model_validate(read_json(path, MAX_CORRECTIONS_BYTES)).corrections
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"--corrections {path} cannot be understood ({where}: {first['msg']})") from None
    except ValueError as error:
        raise ValueError(f"--corrections {path} cannot be understood ({error})") from None


@dataclass(frozen=True, slots=True)
class LeftOutBlob:
    """In place of the bytes of a sample that is left out: reading it gives the reason."""

    blob: Blob

    def read(self) -> bytes:
        raise ValueError(LABEL_AUDIT)

    def version(self) -> str:
        return f"{LABEL_AUDIT}|{self.blob.version()}"

    @property
    def unit(self) -> tuple[Any, ...] | None:
        return self.blob.unit

    # Where the file lies, for those who look whether that is a bucket, or holds their output.
    @property
    def root(self) -> str | None:
        return getattr(self.blob, "root", None)

    @property
    def location(self) -> str | None:
        return getattr(self.blob, "location", None)


def corrected(source: Source, corrections: Sequence[Correction]) -> tuple[Source, str]:
    """The source with corrections, and a sentence about what they changed.

    Raises:
        ValueError: two verdicts on one file that differ, a file of another class than the correction says, no
            such class, or not one of the files is in this source.
    """
    verdicts: dict[str, Correction] = {}
    for correction in corrections:
        if verdicts.setdefault(correction.key, correction) != correction:
            raise ValueError(f"--corrections: there are two verdicts on {correction.key!r}: keep one")
    labels = {name: label for label, name in enumerate(source.class_names)}
    samples, num_dropped, num_relabelled = [], 0, 0
    for sample in source.samples:
        found = verdicts.pop(sample.key, None)
        if found is not None:
            if found.given != sample.class_name:
                raise ValueError(
                    f"--corrections: {sample.key!r} is {sample.class_name!r} here, but {found.given!r} where "
                    "it was audited: these corrections are of another source"
                )
            if found.class_name is None:
                sample = replace(sample, blob=LeftOutBlob(sample.blob))
                num_dropped += 1
            else:
                label = _label_of(found.key, found.class_name, labels)
                sample = replace(sample, class_name=found.class_name, label=label)
                num_relabelled += 1
        samples.append(sample)
    if corrections and num_dropped + num_relabelled == 0:
        raise ValueError("--corrections: not one of the files is in this source: is it another one?")
    missing = f"; {len(verdicts)} files are not in this source" if verdicts else ""
    words = f"corrected: {num_dropped} left out, {num_relabelled} of another class{missing}"
    return replace(source, samples=tuple(samples)), words


def _label_of(key: str, class_name: str, labels: dict[str, int]) -> int:
    """ValueError: there is no such class."""
    if class_name in labels:
        return labels[class_name]
    near = difflib.get_close_matches(class_name, labels, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {len(labels)} classes"
    raise ValueError(f"--corrections: {key!r} becomes {class_name!r}, which is no class; {hint}")
