"""The embedded data set: same bytes from the same seed, mixed files, and no class told by its colours."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, JpegImagePlugin
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data_prep import synthetic
from data_prep.synthetic import CLASSES, generate

NUM_IMAGES = 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "images"
    generate(out, num_images=NUM_IMAGES, workers=2, progress=False)
    return out


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def load(path: Path) -> ImageFile.ImageFile | None:
    """The image with its pixels, or None where Pillow cannot read it."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError):
        return None


def test_bytes_depend_on_the_seed_but_not_on_workers_or_count(tmp_path: Path, folder: Path) -> None:
    generate(tmp_path / "one", num_images=50, workers=1, progress=False)
    generate(tmp_path / "two", num_images=50, workers=2, progress=False)
    generate(tmp_path / "other", num_images=50, workers=2, seed=1, progress=False)
    one, two, other = (contents(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one.keys() == other.keys()
    # Empty, text and zeroed files can be equal; pictures cannot.
    assert sum(one[name] == other[name] for name in one) <= 3
    pictures = {name: content for name, content in one.items() if name.endswith(".JPEG")}
    assert len(pictures) == 50
    assert pictures.items() <= contents(folder).items()


def test_splits_and_classes(folder: Path) -> None:
    files = [path.relative_to(folder) for path in folder.rglob("*.JPEG")]
    assert len({path.name for path in files}) == len(files) == NUM_IMAGES
    counts = Counter(path.parts[:2] for path in files)
    assert counts == {("train", name): 80 for name in CLASSES} | {("val", name): 20 for name in CLASSES}
    assert len(CLASSES) == 10 and list(CLASSES) == sorted(CLASSES)
    # Only the description lies beside the two splits.
    assert {path.name for path in folder.iterdir()} == {"train", "val", "dataset.json"}


def test_a_count_that_does_not_divide_is_kept(tmp_path: Path) -> None:
    generate(tmp_path / "out", num_images=53, workers=1, progress=False)
    per_class = Counter(path.parent.name for path in (tmp_path / "out").rglob("*.JPEG"))
    assert sorted(per_class.values()) == [5] * 7 + [6] * 3


def test_strange_files_meet_their_fate(folder: Path) -> None:
    """Six files cannot be read, four can but are no RGB or grey JPEG, and all others are."""
    unreadable: dict[Path, bytes] = {}
    unusual: Counter[tuple[str, ...]] = Counter()
    for path in folder.rglob("*.JPEG"):
        image = load(path)
        if image is None:
            unreadable[path] = path.read_bytes()
        elif image.format != "JPEG" or image.mode not in ("RGB", "L"):
            unusual[image.format or "", image.mode, path.parts[-3]] += 1
    assert unusual == {("PNG", "RGB", "train"): 2, ("PNG", "RGB", "val"): 1, ("JPEG", "CMYK", "train"): 1}
    assert len(unreadable) == 6 and all(path.parts[-3] == "train" for path in unreadable)
    kinds: Counter[str] = Counter()
    for content in unreadable.values():
        if content.startswith(b"\xff\xd8\xff"):
            kinds["damaged" if content.endswith(b"\xff\xd9") else "truncated"] += 1
        elif content.strip(b"\0"):
            kinds["text" if content.isascii() else "unknown"] += 1
        else:
            kinds["zeroed" if content else "empty"] += 1
    assert kinds == {"truncated": 2, "empty": 1, "text": 1, "zeroed": 1, "damaged": 1}


def test_files_are_as_mixed_as_in_an_archive(folder: Path) -> None:
    images = [image for path in folder.rglob("*.JPEG") if (image := load(path)) and image.format == "JPEG"]
    short = np.array([min(image.size) for image in images])
    long = np.array([max(image.size) for image in images])
    assert short.min() >= 200 and long.max() <= 500
    assert len({image.size for image in images}) > 0.9 * len(images)
    assert long.std() > 30 and (long / short).std() > 0.1
    assert 0.3 < np.mean([image.width > image.height for image in images]) < 0.8
    assert 0.01 < np.mean([image.mode == "L" for image in images]) < 0.06
    assert 0.05 < np.mean(["progressive" in image.info for image in images]) < 0.25
    sampling = Counter(JpegImagePlugin.get_sampling(image) for image in images if image.mode == "RGB")
    assert set(sampling) == {0, 2} and min(sampling.values()) > 0.15 * len(images)  # 4:4:4 and 4:2:0
    tables = [image.quantization for image in images if isinstance(image, JpegImagePlugin.JpegImageFile)]
    assert len({tuple(table[0]) for table in tables}) >= 15  # qualities


def histograms(split: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Joint 8×8×8 and marginal 3×32 colour histograms, and labels, of the readable images of a split."""
    joint, marginal, labels = [], [], []
    for label, name in enumerate(CLASSES):
        for path in sorted((split / name).iterdir()):
            if (image := load(path)) is None:
                continue
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
            bins = (pixels >> 5) @ np.array([64, 8, 1])
            joint.append(np.bincount(bins, minlength=512) / len(pixels))
            channels = [np.bincount(channel >> 3, minlength=32) / len(pixels) for channel in pixels.T]
            marginal.append(np.concatenate(channels))
            labels.append(label)
    return np.array(joint), np.array(marginal), np.array(labels)


def test_colours_do_not_tell_the_class(folder: Path) -> None:
    *train, train_labels = histograms(folder / "train")
    *val, val_labels = histograms(folder / "val")
    for train_features, val_features in zip(train, val, strict=True):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
        top1 = probe.fit(train_features, train_labels).score(val_features, val_labels)
        assert top1 < 0.25, "chance is 0.10"


def test_a_complete_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder may be there
    generate(out, num_images=50, workers=1, progress=False)
    before = contents(out)

    def fail(*_: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(synthetic, "draw", fail)
    generate(out, num_images=50, workers=1, progress=False)
    with pytest.raises(ValueError, match="seed 0, not 1: delete it or choose another"):
        generate(out, num_images=50, seed=1, workers=1, progress=False)
    with pytest.raises(ValueError, match="num_images 50, not 60"):
        generate(out, num_images=60, workers=1, progress=False)
    description = json.loads(before["dataset.json"])
    (out / "dataset.json").write_text(json.dumps(description | {"version": 0}))
    with pytest.raises(ValueError, match="version 0, not"):
        generate(out, num_images=50, workers=1, progress=False)
    (out / "dataset.json").write_bytes(before["dataset.json"])
    assert contents(out) == before


def test_an_interrupted_call_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, drawn, draw = tmp_path / "out", [], synthetic.draw

    def interrupted(label: int, rng: np.random.Generator) -> Image.Image:
        drawn.append(label)
        if len(drawn) == 20:
            raise KeyboardInterrupt
        return draw(label, rng)

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(out, seed=3, num_images=50, workers=1, progress=False)
    assert not out.exists()
    generate(out, seed=4, num_images=50, workers=1, progress=False)
    generate(tmp_path / "fresh", seed=4, num_images=50, workers=1, progress=False)
    assert contents(out) == contents(tmp_path / "fresh")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "fresh"}


def test_refuses_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="choose another"):
        generate(tmp_path, progress=False)
    with pytest.raises(ValueError, match="choose another"):
        generate(tmp_path / "thesis.txt", progress=False)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


@pytest.mark.parametrize("arguments", [{"num_images": 49}, {"seed": -1}, {"workers": 0}])
def test_refuses_arguments_out_of_range(tmp_path: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} is .*: give"):
        generate(tmp_path / "out", progress=False, **arguments)
    assert not any(tmp_path.iterdir())
