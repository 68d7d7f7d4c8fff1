"""`python -m serve predict`: many files, some of them broken."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pytest

from data_prep.manifest import Manifest
from evaluation.stored_images import StoredImages
from serve.__main__ import main
from serve.classifier import TorchClassifier


@pytest.fixture
def photos(prepared: tuple[Path, Manifest], tmp_path: Path) -> Path:
    stored = StoredImages(prepared[0], "val")
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for sample_id in range(5):
        (folder / "more" / f"{sample_id}.jpg").write_bytes(stored.jpeg(9 * sample_id))
    (folder / "cut.jpg").write_bytes(stored.jpeg(0)[:400])
    (folder / "text.png").write_text("no image")
    (folder / "notes.txt").write_text("no image's name")
    return folder


def test_json_has_the_classifiers_answers_and_names_what_is_broken(
    timm_run: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", str(timm_run), str(photos), "--json", "--top", "3", "--batch-size", "2"]
    assert main(words) == 0
    printed = capsys.readouterr()
    rows = json.loads(printed.out)["predictions"]
    broken = [row["file"] for row in rows if "error" in row]
    assert broken == [str(photos / "cut.jpg"), str(photos / "text.png")]
    assert "5 of 7 files classified, 2 could not be; 1 files without" in printed.err
    whole = {row["file"]: row["top"] for row in rows if "top" in row}
    classifier = TorchClassifier(timm_run)
    for file, top in whole.items():
        wanted = classifier.classify([Path(file).read_bytes()], 3)[0]
        assert [entry["name"] for entry in top] == list(wanted.names)
        assert top[0]["probability"] == pytest.approx(wanted.probabilities[0], abs=1e-4)


def test_csv_and_table(timm_run: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(timm_run / "checkpoints" / "best.pt"), str(photos), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 7 and sum(row["error"] != "" for row in rows) == 2
    whole = next(row for row in rows if row["file"].endswith("0.jpg"))
    assert sum(float(whole[f"probability{rank}"]) for rank in range(1, 5)) == pytest.approx(1, abs=1e-3)
    assert main(["predict", str(timm_run), str(photos / "more" / "1.jpg"), "--top", "2"]) == 0
    assert capsys.readouterr().out.count("class_") == 2


def test_only_broken_files_and_wrong_words_are_an_error(
    timm_run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(timm_run), str(photos / "cut.jpg")]) == 1
    assert main(["predict", str(timm_run), str(tmp_path / "nowhere")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert main(["predict", str(timm_run), str(photos), "--top", "0"]) == 1
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(timm_run), str(tmp_path / "empty")]) == 1
    assert "no image files" in capsys.readouterr().err


def test_hostile_names_of_files_reach_no_terminal_and_no_spreadsheet(
    timm_run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    names = [b"=cmd.jpg", b"bad\xff.jpg", b"esc\x1b[31m\n.jpg"]
    monkeypatch.chdir(photos)
    for name in names:
        Path(os.fsdecode(name)).write_bytes((photos / "more" / "0.jpg").read_bytes())
    words = ["predict", str(timm_run), *map(os.fsdecode, names), "--top", "1"]
    assert main(words) == 0
    lines = capsysbinary.readouterr().out.decode().splitlines()
    assert [line.split()[0] for line in lines] == ["=cmd.jpg", "bad\\udcff.jpg", "esc?[31m?.jpg"]
    assert main([*words, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsysbinary.readouterr().out.decode(), newline="")))
    assert [row["file"] for row in rows] == ["'=cmd.jpg", "bad\\udcff.jpg", "esc\x1b[31m\n.jpg"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsysbinary.readouterr().out)["predictions"][1]["file"] == "bad\\udcff.jpg"
