"""Label audit: planted wrong labels come first, clean labels stay in peace, reviews change what they say."""

from __future__ import annotations

import builtins
import csv
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.corrections import Correction
from evaluation.audit.page import AuditContent, audit_page
from evaluation.audit.review import (
    Suspect,
    corrected_accuracy,
    corrections_of,
    read_review,
    suspects_csv,
)
from evaluation.audit.sheet import SuspectImage, plot_suspects
from evaluation.audit.suspects import (
    before_and_after,
    duplicates_of_other_labels,
    find_suspects,
    second_opinion,
)
from evaluation.kfold.results import OutOfFold, load_out_of_fold, save_out_of_fold

HOSTILE = '<script>alert("x")</script>'
NAMES = ("plain", HOSTILE, '=HYPERLINK("x")', "quote, comma")


def planted(
    num_samples: int = 600, num_classes: int = 4, share: float = 0.1, sharpness: float = 5.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities of a good model, given labels of which a share is wrong, and which ones those are."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, num_classes, num_samples)
    logits = rng.normal(size=(num_samples, num_classes)) + sharpness * np.eye(num_classes)[true]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    is_wrong = np.zeros(num_samples, bool)
    is_wrong[rng.permutation(num_samples)[: round(share * num_samples)]] = True
    shifts = rng.integers(1, num_classes, num_samples)
    return probabilities.astype(np.float32), np.where(is_wrong, (true + shifts) % num_classes, true), is_wrong


def test_planted_wrong_labels_come_first() -> None:
    probabilities, labels, is_wrong = planted()
    audit = find_suspects(probabilities, labels)
    first = audit.ranking[:60]
    assert is_wrong[first].mean() >= 0.95  # precision among as many as were planted
    assert is_wrong[audit.is_suspect].sum() >= 54  # recall: of 60
    assert audit.num_suspects <= 66
    assert 0.07 < audit.estimated_wrong_fraction < 0.14
    assert audit.pair_counts.sum() == audit.num_suspects and not audit.pair_counts.diagonal().any()
    assert np.array_equal(audit.is_suspect[audit.ranking], np.sort(audit.is_suspect)[::-1])
    suggested = probabilities.argmax(1)
    for given, true in np.argwhere(audit.pair_counts):
        of_pair = audit.is_suspect & (labels == given) & (suggested == true)
        assert audit.pair_counts[given, true] == of_pair.sum()


def test_clean_labels_give_few_suspects() -> None:
    probabilities, labels, _ = planted(share=0.0)
    audit = find_suspects(probabilities, labels)
    assert audit.num_suspects <= 6 and audit.estimated_wrong_fraction < 0.02


def test_a_class_without_images() -> None:
    probabilities, labels, is_wrong = planted(num_classes=3)
    wider = np.hstack([probabilities, np.zeros((600, 1), np.float32)])
    audit = find_suspects(wider, labels)
    assert is_wrong[audit.ranking[:60]].mean() >= 0.95 and audit.pair_counts.shape == (4, 4)
    with pytest.raises(ValueError, match="at least two classes"):
        find_suspects(probabilities, np.zeros(600, np.int64))


def test_missing_cleanlab_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: object, **keywords: object) -> object:
        if name.startswith("cleanlab"):
            raise ImportError(name)
        return original(name, *arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[audit\]"'):
        find_suspects(*planted()[:2])


def test_accuracy_without_suspects_is_higher_by_construction() -> None:
    probabilities, labels, _ = planted(sharpness=2.5)
    audit = find_suspects(probabilities, labels)
    figures = before_and_after(audit, labels)
    num_right = int((probabilities.argmax(1) == labels).sum())
    assert figures.all_images.top1 == num_right / 600
    # No suspect is right: as many of any errors left out give this figure.
    assert figures.without_suspects.num_right == num_right
    assert figures.without_suspects.num_samples == 600 - audit.num_suspects


def test_a_second_model_tells_wrong_labels_from_hard_images() -> None:
    probabilities, labels, _ = planted(sharpness=2.5, seed=1)
    audit = find_suspects(probabilities, labels)
    true_but_noisy = planted(sharpness=2.5, seed=1)[0].argmax(1)
    rng = np.random.default_rng(5)
    # It knows the true class of most, and where it errs, it errs in its own way.
    own = np.where(rng.random(600) < 0.9, true_but_noisy, rng.integers(0, 4, 600))
    other_errors = ~audit.is_suspect & (audit.suggested != labels)
    own[other_errors] = labels[other_errors]
    opinion = second_opinion(audit, labels, own)
    assert opinion.agrees_on_other_errors.num_right == 0
    assert opinion.agrees_on_other_errors.num_samples == other_errors.sum() > 0
    assert (opinion.agrees_on_suspects.top1 or 0) > 0.85
    assert opinion.kept.num_samples + opinion.suspects.num_samples == 600
    assert opinion.all_images.num_right == opinion.kept.num_right + opinion.suspects.num_right


def test_duplicates_are_named_only_where_labels_differ() -> None:
    crc = np.array([7, 8, 7, 9, 9, 7], np.uint32)
    lengths = np.array([5, 5, 5, 6, 6, 4], np.uint32)
    assert duplicates_of_other_labels(crc, lengths, np.array([0, 0, 1, 2, 2, 1])) == [[0, 2]]


def suspect(rank: int, key: str, given: int = 0, suggested: int = 1, sample_id: int | None = None) -> Suspect:
    return Suspect(
        rank, rank * 10 if sample_id is None else sample_id, "val", key, given, suggested, 0.01, True
    )


SUSPECTS = [
    suspect(1, "=cmd|' /C calc'!A0", given=0),
    suspect(2, "@SUM(1)", given=1, suggested=2),
    suspect(3, "-2+3.jpg", given=2, suggested=0),
    suspect(4, "+1.jpg", given=3),
    suspect(5, 'val/a, b\n"c".jpg'),
    suspect(6, "\tx.jpg"),
]


def test_no_cell_is_a_formula() -> None:
    for for_review in (False, True):
        rows = list(csv.reader(io.StringIO(suspects_csv(SUSPECTS, NAMES, for_review), newline="")))
        assert len(rows) == 7 and len({len(row) for row in rows}) == 1
        assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert rows[0][-1] == "verdict" and {row[-1] for row in rows[1:]} == {""}


def reviewed(tmp_path: Path, verdicts: list[str], delimiter: str = ",") -> Path:
    rows = list(csv.reader(io.StringIO(suspects_csv(SUSPECTS, NAMES, for_review=True), newline="")))
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter)
    writer.writerow(rows[0])
    writer.writerows([*row[:-1], verdict] for row, verdict in zip(rows[1:], verdicts, strict=True))
    path = tmp_path / "review.csv"
    path.write_text("\ufeff" + buffer.getvalue(), encoding="utf-8")  # as Excel saves it
    return path


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_spreadsheet_may_choose_its_delimiter(tmp_path: Path, delimiter: str) -> None:
    words = ["drop", "keep", "", "relabel: quote, comma", "keep", ""]
    expected = read_review(reviewed(tmp_path, words), SUSPECTS, NAMES)
    assert read_review(reviewed(tmp_path, words, delimiter), SUSPECTS, NAMES) == expected


def test_verdicts_become_corrections_and_accuracies(tmp_path: Path) -> None:
    words = ["drop", f"relabel:{HOSTILE}", " Keep ", "relabel: quote, comma", "", 'relabel:=HYPERLINK("x")']
    verdicts, num_empty = read_review(reviewed(tmp_path, words), SUSPECTS, NAMES)
    assert num_empty == 1
    # What is "relabelled" to the class it has is kept.
    assert [verdict.kind for verdict in verdicts] == ["drop", "keep", "keep", "keep", "relabel"]
    assert corrections_of(verdicts, NAMES) == [
        Correction(key=SUSPECTS[0].key, given="plain", verdict="drop"),
        Correction(key="\tx.jpg", given="plain", verdict="relabel", class_name=NAMES[2]),
    ]
    labels = np.array([0, 1, 2, 3, 0, 0, 1])
    predicted = np.array([1, 1, 0, 3, 1, 2, 1])  # wrong on the suspects 1, 3, 5, 6
    before, after = corrected_accuracy(verdicts, predicted, labels, np.array([10, 20, 30, 40, 50, 60, 99]))
    assert (before.num_right, before.num_samples) == (3, 7)
    assert (after.num_right, after.num_samples) == (4, 6)


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        ("maybe", "line 3: verdict 'maybe' is none of keep, drop and relabel:CLASS"),
        ("relabel", "verdict 'relabel' is none of"),
        ("relabel:plane", "there is no class 'plane'; did you mean 'plain'?"),
    ],
)
def test_verdicts_that_are_none(tmp_path: Path, verdict: str, words: str) -> None:
    path = reviewed(tmp_path, ["keep", verdict, "burn", "", "", ""])
    with pytest.raises(ValueError) as error:
        read_review(path, SUSPECTS, NAMES)
    assert words in str(error.value) and "line 4: verdict 'burn'" in str(error.value)


def test_a_review_of_something_else(tmp_path: Path) -> None:
    path = reviewed(tmp_path, ["keep"] * 6)
    others = [suspect(row.rank, "elsewhere.jpg") for row in SUSPECTS]
    with pytest.raises(ValueError, match=r"sample 10 is 'elsewhere\.jpg' in this audit"):
        read_review(path, others, NAMES)
    path.write_text(path.read_text() + "1,10,val,x,,,0,keep\n")
    with pytest.raises(ValueError, match="sample_id '10' is not in this audit, or has a verdict already"):
        read_review(path, SUSPECTS, NAMES)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="lacks one of the columns"):
        read_review(path, SUSPECTS, NAMES)
    with pytest.raises(ValueError, match="does not exist"):
        read_review(tmp_path / "none.csv", SUSPECTS, NAMES)


def test_page_shows_names_as_text_and_warns() -> None:
    probabilities, labels, _ = planted()
    audit = find_suspects(probabilities, labels)
    picture = Image.new("RGB", (40, 30), "green")
    item = SuspectImage(suspect(1, HOSTILE, given=1, suggested=2), picture, NAMES[1], NAMES[2])
    content = AuditContent(
        title=HOSTILE,
        class_names=NAMES,
        num_samples=600,
        num_suspects=audit.num_suspects,
        estimated_wrong_fraction=audit.estimated_wrong_fraction,
        figures=before_and_after(audit, labels),
        second=second_opinion(audit, labels, labels),
        pair_counts=audit.pair_counts,
        images=[item],
        facts=[("data set", HOSTILE)],
        method="by hand",
    )
    page = audit_page(content)
    assert HOSTILE not in page and "&lt;script&gt;alert" in page
    assert "http://" not in page and "https://" not in page and page.count("<script>") == 1
    assert page.count("data:image/jpeg;base64,") == 1 and "higher by construction" in page
    assert f"{audit.num_suspects} labels of 600 are contradicted" in page
    assert plot_suspects([item] * 9).axes  # two rows


def test_predictions_come_back_and_nothing_else_is_read(tmp_path: Path) -> None:
    probabilities, labels, _ = planted(num_samples=12)
    ids = np.arange(12)
    path = tmp_path / "oof.npz"
    save_out_of_fold(path, OutOfFold(probabilities, labels, ids, ids % 3, NAMES))
    again = load_out_of_fold(path, NAMES)
    assert np.array_equal(again.probabilities, probabilities) and again.fold.tolist() == [0, 1, 2] * 4
    with pytest.raises(ValueError, match="predictions for 3 classes"):
        load_out_of_fold(path, NAMES[:3])
    arrays = {"probabilities": probabilities, "labels": labels, "sample_ids": ids, "fold": ids}
    hostile = {
        "pickled": {"labels": np.array([{"a": 1}] * 12, object)},
        "no labels": {"labels": labels + 7},
        "no probabilities": {"probabilities": probabilities * np.nan},
        "shorter": {"fold": ids[:5]},
        "text": {"sample_ids": ids.astype(str)},
    }
    for changes in hostile.values():
        np.savez(path, **(arrays | changes))
        with pytest.raises(ValueError, match=r"oof\.npz"):
            load_out_of_fold(path, NAMES)
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ValueError, match="no file of out-of-fold predictions"):
        load_out_of_fold(path, NAMES)
    np.savez_compressed(path, **arrays)  # as small as it is, it could be anything
    with pytest.raises(ValueError, match="its probabilities is compressed"):
        load_out_of_fold(path, NAMES)
    with path.open("wb") as file:
        np.save(file, probabilities)
    with pytest.raises(ValueError, match="no file of out-of-fold predictions"):
        load_out_of_fold(path, NAMES)
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f4", "fortran_order": False, "shape": (10**13, 4)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("probabilities.npy", buffer.getvalue())
    with pytest.raises(ValueError, match="claims 160,000,000,000,000 bytes"):
        load_out_of_fold(path, NAMES)
