"""Layouts are recognised, splits are sound, and bad sources get one clear sentence."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from data_prep.sources import open_source


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


def test_image_folder(tmp_path: Path) -> None:
    for name in ("train/b/1.jpg", "train/a/x/2.JPEG", "val/a/3.jpg", "val/b/4.jpg", "train/a/.hidden"):
        touch(tmp_path / name)
    source = open_source(tmp_path)
    assert source.layout == "image-folder"
    assert source.class_names == ("a", "b")
    assert [(s.key, s.label, s.split) for s in source.samples] == [
        ("train/a/x/2.JPEG", 0, "train"),
        ("train/b/1.jpg", 1, "train"),
        ("val/a/3.jpg", 0, "val"),
        ("val/b/4.jpg", 1, "val"),
    ]


@pytest.mark.parametrize("val_name", ["valid", "validation", "test"])
def test_other_names_of_val(tmp_path: Path, val_name: str) -> None:
    for name in ("train/a/1.jpg", "train/b/1.jpg", f"{val_name}/a/2.jpg", f"{val_name}/b/2.jpg"):
        touch(tmp_path / name)
    assert open_source(tmp_path).count("val") == 2


def test_intel_also_nested(tmp_path: Path) -> None:
    for name in ("seg_train/seg_train/sea/1.jpg", "seg_train/seg_train/ice/1.jpg", "seg_test/sea/2.jpg"):
        touch(tmp_path / name)
    source = open_source(tmp_path)
    assert source.layout == "intel" and source.class_names == ("ice", "sea") and source.count("val") == 1


def test_category_in_filename(tmp_path: Path) -> None:
    touch(tmp_path / "360 Rocks" / "I_Andesite_01.jpg")
    touch(tmp_path / "360 Rocks" / "S_Rock Gypsum_12.jpg")
    touch(tmp_path / "120 Rocks" / "I_Andesite_1_120.jpg")
    touch(tmp_path / "120 Rocks" / "S_Rock Gypsum_4_120.jpg")
    touch(tmp_path / "human" / "mds_360.txt")
    source = open_source(tmp_path)
    assert source.class_names == ("I_Andesite", "S_Rock Gypsum")
    assert Counter(s.split for s in source.samples) == {"train": 2, "val": 2}


def flat(root: Path, **counts: int) -> Path:
    for name, count in counts.items():
        for number in range(count):
            touch(root / name / f"{number}.jpg")
    return root


def test_flat_folder_splits_each_class(tmp_path: Path) -> None:
    source = open_source(flat(tmp_path, a=10, b=50), val_fraction=0.2)
    counts = Counter((s.label, s.split) for s in source.samples)
    assert counts == {(0, "train"): 8, (0, "val"): 2, (1, "train"): 40, (1, "val"): 10}


def test_split_is_seeded_and_keyed_by_class(tmp_path: Path) -> None:
    flat(tmp_path, a=20, b=20)
    first, again, other = (open_source(tmp_path, seed=seed) for seed in (0, 0, 1))
    val = [{s.key for s in source.samples if s.split == "val"} for source in (first, again, other)]
    assert val[0] == val[1] != val[2]
    flat(tmp_path, c=20)
    assert {s.key for s in open_source(tmp_path).samples if s.split == "val" and s.label < 2} == val[0]


def test_class_too_small_to_split_stays_in_train_with_a_warning(tmp_path: Path) -> None:
    source = open_source(flat(tmp_path, a=1, b=10))
    assert [s.split for s in source.samples if s.label == 0] == ["train"]
    assert len(source.warnings) == 1 and "'a'" in source.warnings[0]


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ({}, "no known layout"),
        ({"only": 5}, "only one class"),
    ],
)
def test_unusable_sources_are_named(tmp_path: Path, counts: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        open_source(flat(tmp_path, **counts))


def test_missing_folder_and_empty_class(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        open_source(tmp_path / "nowhere")
    (flat(tmp_path, a=5, b=5) / "empty").mkdir()
    with pytest.raises(ValueError, match=r"class .empty. .* has no files"):
        open_source(tmp_path)


def test_class_without_training_images(tmp_path: Path) -> None:
    for name in ("train/a/1.jpg", "train/b/1.jpg", "val/c/1.jpg"):
        touch(tmp_path / name)
    with pytest.raises(ValueError, match="class 'c' has no training images"):
        open_source(tmp_path)


def test_unknown_layout_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean flat-folder"):
        open_source(flat(tmp_path, a=1, b=1), layout="flat_folder")


@pytest.mark.parametrize(("train", "val"), [("Training", "Testing"), ("Train", "Val"), ("TRAIN", "test")])
def test_split_folders_are_never_taken_for_classes(tmp_path: Path, train: str, val: str) -> None:
    for name in (f"{train}/a/1.jpg", f"{train}/b/1.jpg", f"{val}/a/2.jpg", f"{val}/b/2.jpg"):
        touch(tmp_path / name)
    source = open_source(tmp_path)
    assert source.class_names == ("a", "b") and source.count("val") == 2


def test_folders_of_folders_are_no_classes(tmp_path: Path) -> None:
    for name in ("part1/a/1.jpg", "part1/b/1.jpg", "part2/a/2.jpg", "part2/b/2.jpg"):
        touch(tmp_path / name)
    with pytest.raises(ValueError, match="no known layout"):
        open_source(tmp_path)


def test_flat_test_folder_does_not_take_the_validation_away(tmp_path: Path) -> None:
    for number in range(10):
        touch(tmp_path / "train" / "a" / f"{number}.jpg")
        touch(tmp_path / "train" / "b" / f"{number}.jpg")
    touch(tmp_path / "test" / "unlabelled.jpg")
    source = open_source(tmp_path)
    assert source.count("val") == 4
    assert any("in no class folder" in warning for warning in source.warnings)


def test_source_one_level_too_high(tmp_path: Path) -> None:
    flat(tmp_path / "archive" / "data", a=5, b=5)
    touch(tmp_path / "archive" / "data" / "a" / "x.jpg")
    with pytest.raises(ValueError, match=r"--source .*data"):
        open_source(tmp_path / "archive", layout="flat-folder")


def write_images(root: Path, *names: str) -> Path:
    for name in names:
        touch(root / name)
    return root


TRAIN_AND_VAL = tuple(f"{split}/{name}/1.jpg" for split in ("train", "val") for name in "ab")


def test_folders_that_are_left_out_are_named(tmp_path: Path) -> None:
    more = ("test/a/1.jpg", "test/b/1.jpg", "validation/a/2.jpg", "extra/a/x/1.png", "notes/a/1.txt")
    source = open_source(write_images(tmp_path, *TRAIN_AND_VAL, *more))
    assert len(source.samples) == 4 and len(source.warnings) == 3
    for sentence in (
        "2 images of the test folder",
        "1 images of the validation folder",
        "1 images of the extra",
    ):
        assert any(sentence in warning for warning in source.warnings), sentence


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere", "more/1.jpg", "more/deep/2.jpg")
    root = write_images(tmp_path / "source", *TRAIN_AND_VAL, "train/a/real/3.jpg")
    (root / "train" / "a" / "linked").symlink_to(tmp_path / "elsewhere" / "more")
    (root / "train" / "a" / "again").symlink_to(root / "train" / "a" / "real")  # once is enough
    (tmp_path / "elsewhere" / "more" / "up").symlink_to(tmp_path)
    keys = {sample.key for sample in open_source(root).samples}
    found = {"train/a/linked/1.jpg", "train/a/linked/deep/2.jpg", "train/a/real/3.jpg"}
    assert keys == {*TRAIN_AND_VAL, *found}


def test_loops_of_links_end(tmp_path: Path) -> None:
    root = write_images(tmp_path, *TRAIN_AND_VAL)
    for place, target in (("here", "."), ("above", ".."), ("root", "../..")):
        (root / "train" / "a" / place).symlink_to(target)
    (root / "train" / "b" / "back").symlink_to(root / "train" / "b")
    assert {sample.key for sample in open_source(root).samples} == set(TRAIN_AND_VAL)
    (root / "train" / "a" / "self").symlink_to("self")  # no folder and no file: to be quarantined
    assert len(open_source(root).samples) == 5


def test_split_folder_in_one_of_its_name(tmp_path: Path) -> None:
    names = ("train/train/a/1.jpg", "train/train/b/1.jpg", "val/val/a/1.jpg", "val/b/1.jpg")
    source = open_source(write_images(tmp_path / "1", *names[:3]))
    assert source.class_names == ("a", "b") and source.count("val") == 1 and source.warnings == ()
    # But a class may be called so: trains, beside buses.
    source = open_source(write_images(tmp_path / "2", "train/train/1.jpg", "train/bus/1.jpg"))
    assert source.class_names == ("bus", "train")


def test_classes_by_one_of_their_names(tmp_path: Path) -> None:
    # n01440764: tench, Tinca tinca; n02012849 and n03126707: both crane.
    names = ("n01440764", "n01443537", "n02012849", "n03126707")
    flat(tmp_path, **dict.fromkeys(names, 5))
    for wanted in (("tench", "goldfish"), ("Tinca tinca", "Carassius auratus")):
        assert open_source(tmp_path, classes=wanted).class_names == names[:2]
    assert open_source(tmp_path, classes=("n02012849", "tench")).class_names == (names[0], names[2])
    with pytest.raises(ValueError, match=r"'crane' may be any of n02012849 .*, n03126707 .*: name the class"):
        open_source(tmp_path, classes=("tench", "crane"))
    with pytest.raises(ValueError, match="did you mean 'tench'"):
        open_source(tmp_path, classes=("tensh", "goldfish"))


def test_val_fraction_that_leaves_no_training_image(tmp_path: Path) -> None:
    source = open_source(flat(tmp_path, a=10, b=1000), val_fraction=0.99)
    assert len(source.warnings) == 1 and "too few images to keep one in train" in source.warnings[0]
    source = open_source(tmp_path, val_fraction=0.0004)
    assert "too few images to give 0.0004 of them to val" in source.warnings[0]


@pytest.mark.parametrize(
    ("location", "advice"),
    [
        ("S3://bucket/set", "s3://bucket/set"),
        ("s3:/bucket/set", "s3://bucket/set"),
        ("gs://bucket/set", "s3://bucket/prefix"),
        ("https://example.org/set.zip", "s3://bucket/prefix"),
    ],
)
def test_other_schemes_get_advice(location: str, advice: str) -> None:
    with pytest.raises(ValueError, match=f"as {advice}$"):
        open_source(location)


def test_a_folder_without_images_is_no_class(tmp_path: Path) -> None:
    flat(tmp_path, a=5, b=5)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "read.md").write_text("# Pictures")
    source = open_source(tmp_path)
    assert source.class_names == ("a", "b")
    assert len(source.warnings) == 1 and "looks like an image: docs" in source.warnings[0]
    # Images without a suffix are some, and so are damaged ones, which the quarantine will list.
    (tmp_path / "docs" / "photo").write_bytes(b"\xff\xd8\xff\xe0")
    assert open_source(tmp_path).class_names == ("a", "b", "docs")
    with pytest.raises(ValueError, match=r"only one class \(a\).*looks like an image: notes"):
        folder = flat(tmp_path / "2", a=5)
        (folder / "notes").mkdir()
        (folder / "notes" / "read.md").write_text("# Pictures")
        open_source(folder)
