"""Each layout is found with its classes, splits, names and exact bytes; damage gets one sentence."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.io import savemat

from data_prep.sources import LAYOUTS, Source, open_source
from data_prep.sources.blobs import BytesBlob, PixelsBlob, RangeBlob
from data_prep.sources.tar import scan_tar, tar_members
from data_prep.sources.tree import open_tree

A, B, C = "n01440764", "n01443537", "n01484850"
Files = dict[str, bytes]


def image(seed: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write(root: Path, files: Files) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def tar_of(files: Files, mode: str = "w", format: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=format) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zip_of(path: Path, files: Files, stored: bool = False) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def contents(source: Source) -> dict[str, tuple[str, str | None, bytes]]:
    """key → (class name, split, bytes); checks on the way that labels are ordinals of the class names."""
    assert source.class_names == tuple(sorted(source.class_names))
    for sample in source.samples:
        assert source.class_names[sample.label] == sample.class_name
    found = {sample.key: (sample.class_name, sample.split, sample.read()) for sample in source.samples}
    assert len(found) == len(source.samples)
    return found


# --- ILSVRC ---------------------------------------------------------------------------------------------

IDS = {1: C, 2: A, 3: B}  # not in the order of the WordNet ids, as in reality
TRUTH = [3, 1, 2, 1]
TRAIN = {
    wordnet_id: {f"{wordnet_id}_{number}.JPEG": image(10 * i + number) for number in range(5)}
    for i, wordnet_id in enumerate((A, B, C))
}
NOISE = np.random.default_rng(0).bytes(5000)
VAL = {f"ILSVRC2012_val_{number:08d}.JPEG": image(100 + number) for number in range(1, 5)}


def meta_mat(compressed: bool = False) -> bytes:
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children"]
    rows = [(i, name, f"{name}, a fish", "gloss", 0, np.zeros(0)) for i, name in IDS.items()]
    rows.append((1001, "n00001740", "entity", "gloss", 3, np.array([1, 2, 3])))
    synsets = np.zeros((len(rows), 1), dtype=[(name, object) for name in fields])
    for number, row in enumerate(rows):
        synsets[number, 0] = row
    file = io.BytesIO()
    savemat(file, {"other": 1, "synsets": synsets}, do_compression=compressed)
    return file.getvalue()


def devkit(truth: list[int] = TRUTH, **changed: bytes) -> Files:
    text = "".join(f"{number}\n" for number in truth).encode()
    files = {"meta.mat": meta_mat(), "ILSVRC2012_validation_ground_truth.txt": text}
    for name, content in changed.items():
        files[name.replace("__", ".")] = content
    return {f"ILSVRC2012_devkit_t12/data/{name}": content for name, content in files.items()}


def ilsvrc() -> Files:
    return {
        "ILSVRC2012_img_train.tar": tar_of({f"{name}.tar": tar_of(files) for name, files in TRAIN.items()}),
        "ILSVRC2012_img_val.tar": tar_of(VAL),
        "ILSVRC2012_devkit_t12.tar.gz": tar_of(devkit(), "w:gz"),
    }


def ilsvrc_expected() -> dict[str, tuple[str, str | None, bytes]]:
    expected: dict[str, tuple[str, str | None, bytes]] = {
        f"train/{name}/{key}": (name, "train", content)
        for name, files in TRAIN.items()
        for key, content in files.items()
    }
    for (key, content), number in zip(VAL.items(), TRUTH, strict=True):
        expected[f"val/{key}"] = (IDS[number], "val", content)
    return expected


def test_ilsvrc_tars(tmp_path: Path) -> None:
    source = open_source(write(tmp_path, ilsvrc()))
    assert source.layout == "ilsvrc" and source.warnings == ()
    assert contents(source) == ilsvrc_expected()
    assert source.display_names == tuple(f"{name}, a fish" for name in (A, B, C))
    # Nothing is unpacked: the samples are ranges of the outer tar.
    locations = {sample.blob.location for sample in source.samples if isinstance(sample.blob, RangeBlob)}
    assert locations == {str(tmp_path / f"ILSVRC2012_img_{split}.tar") for split in ("train", "val")}


@pytest.mark.parametrize("folder", ["train", "ILSVRC2012_img_train"])
def test_ilsvrc_half_unpacked(tmp_path: Path, folder: str) -> None:
    files = ilsvrc()
    del files["ILSVRC2012_img_train.tar"], files["ILSVRC2012_devkit_t12.tar.gz"]
    files |= {f"{folder}/{name}.tar": tar_of(members) for name, members in TRAIN.items()}
    kit = devkit(meta__mat=meta_mat(compressed=True))
    assert contents(open_source(write(tmp_path, files | kit))) == ilsvrc_expected()


def test_ilsvrc_wholly_unpacked_needs_only_the_devkit(tmp_path: Path) -> None:
    files = {f"train/{name}/{key}": data for name, members in TRAIN.items() for key, data in members.items()}
    files |= {f"val/{key}": data for key, data in VAL.items()} | devkit()
    source = open_source(write(tmp_path, files))
    assert source.layout == "ilsvrc" and source.warnings == () and contents(source) == ilsvrc_expected()


def test_ilsvrc_train_tar_alone_is_split(tmp_path: Path) -> None:
    tar = write(tmp_path, ilsvrc()) / "ILSVRC2012_img_train.tar"
    for source in (open_source(tar), open_source(write(tmp_path / "alone", {tar.name: tar.read_bytes()}))):
        assert source.layout == "ilsvrc" and (source.count("train"), source.count("val")) == (12, 3)
        assert any("ILSVRC2012_img_val.tar" in warning for warning in source.warnings)


def test_tars_beside_an_unpacked_set_do_not_hide_it(tmp_path: Path) -> None:
    files = ilsvrc() | {f"{split}/{name}/1.JPEG": image(1) for split in ("train", "val") for name in (A, B)}
    assert open_source(write(tmp_path, files)).layout == "image-folder"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ILSVRC2012_devkit_t12.tar.gz": None}, "add ILSVRC2012_devkit_t12.tar.gz"),
        ({"ILSVRC2012_img_train.tar": None}, "add ILSVRC2012_img_train.tar"),
        ({"ILSVRC2012_img_train.tar": tar_of({"a.txt": b"x"})}, "no tar of a class"),
        ({"ILSVRC2012_img_train.tar": ilsvrc()["ILSVRC2012_img_train.tar"][:20_000]}, "damaged tar"),
        (
            {"ILSVRC2012_img_train.tar": tar_of({f"{A}.tar": b"x" * 2000, f"{B}.tar": b""})},
            f"{A}.tar is a",
        ),
        ({"ILSVRC2012_img_val.tar": tar_of(dict(list(VAL.items())[:3]))}, "3 images, .* labels for 4"),
        ({"ILSVRC2012_devkit_t12.tar.gz": b"\x1f\x8bgarbage"}, "devkit_t12.tar.gz is damaged"),
        ({"ILSVRC2012_devkit_t12.tar.gz": tar_of(devkit(), "w:gz")[:200]}, "devkit_t12.tar.gz is damaged"),
        ({"ILSVRC2012_devkit_t12.tar.gz": tar_of({"a": b""}, "w:gz")}, "has no meta.mat"),
        ({"ILSVRC2012_devkit_t12.tar.gz": gzip.compress(bytes(300 << 20), 1)}, "larger than the kit"),
        (
            {"ILSVRC2012_devkit_t12.tar.gz": tar_of(devkit(meta__mat=b"no"), "w:gz")},
            "meta.mat cannot be read",
        ),
        (
            {"ILSVRC2012_devkit_t12.tar.gz": tar_of(devkit(meta__mat=NOISE), "w:gz")},
            "meta.mat cannot be read",
        ),
        ({"ILSVRC2012_devkit_t12.tar.gz": tar_of(devkit([1, 2, 3, 999]), "w:gz")}, "no class number"),
        ({"ILSVRC2012_devkit_t12.tar.gz": tar_of(devkit([1, 2, 3, 1001]), "w:gz")}, "no class number"),
    ],
)
def test_ilsvrc_damage(tmp_path: Path, changes: dict[str, bytes | None], sentence: str) -> None:
    files = {name: content for name, content in (ilsvrc() | changes).items() if content is not None}
    with pytest.raises(ValueError, match=sentence):
        open_source(write(tmp_path, files))


# --- tars -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_members_are_those_of_tarfile(tmp_path: Path, format: int) -> None:
    long = "/".join(["folder" * 5] * 5)
    files = {"a.jpg": b"", "./b.jpg": b"1" * 512, f"{long}/c.jpg": b"2" * 513, "grün.jpg": b"3" * 1000}
    if format != tarfile.USTAR_FORMAT:
        files["x" * 300] = b"4"
    path = tmp_path / "a.tar"
    path.write_bytes(b"before" + tar_of(files, format=format))
    found = list(tar_members(str(path), path.stat().st_size - 6, 6))
    content = path.read_bytes()
    assert {name: content[start : start + length] for name, start, length in found} == {
        name.removeprefix("./"): data for name, data in files.items()
    }
    wanted = scan_tar(str(path), path.stat().st_size - 6, 6, wanted=lambda name, _: name == "b.jpg")
    assert [data for *_, data in wanted if data is not None] == [files["./b.jpg"]]


def test_tar_with_folders_and_links(tmp_path: Path) -> None:
    write(tmp_path / "s", {"a/1.jpg": b"1"})
    (tmp_path / "s" / "a" / "2.jpg").hardlink_to(tmp_path / "s" / "a" / "1.jpg")
    (tmp_path / "s" / "a" / "3.jpg").symlink_to("1.jpg")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "s", "s")
    size = (tmp_path / "a.tar").stat().st_size
    assert len([name for name, *_ in tar_members(str(tmp_path / "a.tar"), size)]) == 1


def test_tar_of_old_programs(tmp_path: Path) -> None:
    """Links that state a size, folders that are files with a slash, numbers in base 256, signed sums."""
    out = bytearray()
    for name, kind, size in (("link", b"1", 700), ("folder/", b"\0", 0), ("grün.jpg", b"\0", 3)):
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, size
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT, "latin1", "strict"))
        header[124:136] = b"\x80" + size.to_bytes(11, "big")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(byte - 256 * (byte > 127) for byte in header)
        out += header + (b"abc" + bytes(509) if kind == b"\0" and size else b"")
    (tmp_path / "a.tar").write_bytes(out + bytes(1024))
    ((name, start, length),) = tar_members(str(tmp_path / "a.tar"), len(out) + 1024)
    assert name == "gr\udcfcn.jpg" and out[start : start + length] == b"abc"


def test_damaged_tars_never_end_in_silence(tmp_path: Path) -> None:
    whole = tar_of({f"{number}.jpg": b"x" * 700 for number in range(20)})
    header = 5 * 1536
    damaged = {
        "cut in a file": whole[:10_000],
        "cut between files": whole[:header],
        "cut in a header": whole[: header + 100],
        "header changed": whole[:header] + b"9" + whole[header + 1 :],
        "header destroyed": whole[:header] + NOISE[:512] + whole[header + 512 :],
        "two joined": whole + bytes(3 << 20) + whole,
        "empty": b"",
    }
    for what, content in damaged.items():
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(ValueError, match="damaged tar"):
            list(tar_members(str(tmp_path / "a.tar"), len(content)))
            pytest.fail(what)


# --- Kaggle ---------------------------------------------------------------------------------------------

CLS_LOC = "ILSVRC/Data/CLS-LOC"


def kaggle() -> Files:
    files = {
        f"{CLS_LOC}/train/{name}/{key}": data for name, files in TRAIN.items() for key, data in files.items()
    }
    files |= {f"{CLS_LOC}/val/{key}": data for key, data in VAL.items()}
    files |= {f"{CLS_LOC}/test/ILSVRC2012_test_0000000{n}.JPEG": image(n) for n in (1, 2)}
    rows = [
        f"ILSVRC2012_val_{n:08d},{IDS[label]} 1 2 3 4 {IDS[label]} 5 6 7 8 "
        for n, label in enumerate(TRUTH, 1)
    ]
    files["LOC_val_solution.csv"] = "\n".join(["ImageId,PredictionString", *rows, ""]).encode()
    files["LOC_synset_mapping.txt"] = f"{A} tench, Tinca tinca\n{B} goldfish\n{C} shark\n".encode()
    files["LOC_sample_submission.csv"] = b"ImageId,PredictionString\n"
    return files


def kaggle_expected(start: str) -> dict[str, tuple[str, str | None, bytes]]:
    return {start + key: value for key, value in ilsvrc_expected().items()}


def test_kaggle_folder_and_zip(tmp_path: Path) -> None:
    folder, archive = write(tmp_path / "f", kaggle()), zip_of(tmp_path / "a.zip", kaggle())
    for source in (open_source(folder), open_source(archive)):
        assert source.layout == "kaggle-cls-loc" and source.warnings == ()
        assert contents(source) == kaggle_expected(f"{CLS_LOC}/")
        assert source.display_names == ("tench, Tinca tinca", "goldfish", "shark")


@pytest.mark.parametrize("place", ["ILSVRC", CLS_LOC])
def test_kaggle_from_inside(tmp_path: Path, place: str) -> None:
    root = write(tmp_path, kaggle()) / place
    with pytest.raises(ValueError, match=r"LOC_val_solution.csv, which holds the labels"):
        open_source(root)
    (root / "LOC_val_solution.csv").write_bytes(kaggle()["LOC_val_solution.csv"])
    start = CLS_LOC.removeprefix(place).lstrip("/")
    source = open_source(root)
    assert contents(source) == kaggle_expected(f"{start}/" if start else "") and source.warnings == ()


def test_kaggle_image_that_is_only_listed_is_quarantined(tmp_path: Path) -> None:
    root = write(tmp_path, kaggle())
    (root / CLS_LOC / "val" / "ILSVRC2012_val_00000002.JPEG").unlink()
    sample = next(s for s in open_source(root).samples if "val_00000002" in s.key)
    with pytest.raises(ValueError, match="listed, but not there"):
        sample.read()


@pytest.mark.parametrize(
    ("csv", "sentence"),
    [
        (b"image,label\n1,2\n", "has the columns image, label"),
        (b"", "has the columns none"),
        (b"ImageId,PredictionString\nILSVRC2012_val_00000001\n", "line 2: no WordNet id"),
        (b"ImageId,PredictionString\nILSVRC2012_val_00000001,fish 1 2\n", "line 2: no WordNet id"),
        (b"ImageId,PredictionString\nother," + A.encode() + b" 1\n", "no row for"),
        (b"\xff\xfe\x00\x01", "no UTF-8 text"),
    ],
)
def test_kaggle_broken_csv(tmp_path: Path, csv: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        open_source(write(tmp_path, kaggle() | {"LOC_val_solution.csv": csv}))


# --- Hugging Face ---------------------------------------------------------------------------------------


def parquet(
    images: list[bytes | None],
    labels: list[int | None],
    paths: list[str | None] | None = None,
    names: list[str] | None = None,
    columns: tuple[str, str] = ("image", "label"),
    rows_a_group: int = 2,
) -> bytes:
    structs = [
        {"bytes": data, "path": path}
        for data, path in zip(images, paths or [None] * len(images), strict=True)
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({columns[0]: pa.array(structs, kind), columns[1]: pa.array(labels, pa.int64())})
    if names is not None:
        info = {"info": {"features": {columns[1]: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=rows_a_group)
    return file.getvalue()


NAMES = ["shark", "tench", "goldfish"]
LABEL_OF = {C: 0, A: 1, B: 2}  # the labels of this set are in no order of the ids
PICTURES = [image(number) for number in range(12)]


def hub() -> Files:
    rows = [(C, 1), (A, 2), (B, 3), (C, 4), (A, 5)]
    labels: list[int | None] = [LABEL_OF[name] for name, _ in rows]
    return {
        "data/train-00000-of-00002.parquet": parquet(
            PICTURES[:5], labels, [f"{name}_{number}.JPEG" for name, number in rows], NAMES
        ),
        "data/train-00001-of-00002.parquet": parquet(
            PICTURES[5:7], [2, 1], [f"{B}_7_{B}.JPEG", f"{A}_8_{A}.JPEG"], NAMES
        ),
        "data/validation-00000-of-00001.parquet": parquet(
            PICTURES[7:9],
            [0, 1],
            [f"ILSVRC2012_val_00000001_{C}.JPEG", f"ILSVRC2012_val_00000002_{A}.JPEG"],
            NAMES,
        ),
        "data/test-00000-of-00001.parquet": parquet(
            PICTURES[9:], [-1, -1, -1], ["1.JPEG", "2.JPEG", "3.JPEG"]
        ),
        "README.md": b"imagenet-1k",
    }


def test_parquet_with_wordnet_ids(tmp_path: Path) -> None:
    root = write(tmp_path, hub())
    (root / "assets").mkdir()
    (root / "assets" / "teaser.png").write_bytes(image(1, "PNG"))
    source = open_source(root)
    assert source.layout == "huggingface-parquet"
    assert source.class_names == (A, B, C) and source.display_names == ("tench", "goldfish", "shark")
    first, second = (f"data/train-0000{number}-of-00002.parquet" for number in (0, 1))
    names = [(C, 1), (A, 2), (B, 3), (C, 4), (A, 5)]
    expected: dict[str, Any] = {
        f"{first}/{name}_{n}.JPEG": (name, "train", PICTURES[n - 1]) for name, n in names
    }
    expected[f"{second}/{B}_7_{B}.JPEG"] = (B, "train", PICTURES[5])
    expected[f"{second}/{A}_8_{A}.JPEG"] = (A, "train", PICTURES[6])
    val = "data/validation-00000-of-00001.parquet/ILSVRC2012_val_0000000"
    expected[f"{val}1_{C}.JPEG"] = (C, "val", PICTURES[7])
    expected[f"{val}2_{A}.JPEG"] = (A, "val", PICTURES[8])
    assert contents(source) == expected
    assert len(source.warnings) == 1 and "3 images" in source.warnings[0] and "no label" in source.warnings[0]


def test_parquet_names_of_the_schema_else_numbers(tmp_path: Path) -> None:
    for names, expected in ((NAMES, ("goldfish", "shark", "tench")), (None, ("0", "1", "2"))):
        files = {
            "train.parquet": parquet(PICTURES[:3], [0, 1, 2], names=names, columns=("img", "fine_label")),
            "test.parquet": parquet(PICTURES[3:6], [2, 1, 0], names=names, columns=("img", "fine_label")),
        }
        source = open_source(write(tmp_path, files))
        assert source.class_names == expected and source.warnings == ()
        assert contents(source)["test.parquet/0"] == (expected[0] if names else "2", "val", PICTURES[3])


@pytest.mark.parametrize("ids", [(A, B, A, B), (A, A, A, A), (A, B, A, "other")])
def test_parquet_path_ids_that_contradict_the_labels_are_no_classes(
    tmp_path: Path, ids: tuple[str, ...]
) -> None:
    paths: list[str | None] = [f"{name}_{n}.JPEG" for n, name in enumerate(ids)]
    file = parquet(PICTURES[:4], [0, 1, 0, 0], paths, NAMES)
    assert open_source(write(tmp_path, {"train.parquet": file})).class_names == ("shark", "tench")


def test_parquet_rows_without_a_label_are_left_out(tmp_path: Path) -> None:
    file = parquet(PICTURES[:5], [0, None, 1, -1, 1])
    source = open_source(write(tmp_path, {"train.parquet": file}))
    assert sorted(contents(source)) == [f"train.parquet/{row}" for row in (0, 2, 4)]
    assert "2 images" in source.warnings[0]


def test_parquet_inside_a_tar_and_empty_images(tmp_path: Path) -> None:
    images: list[bytes | None] = [PICTURES[0], None, PICTURES[2], PICTURES[3]]
    (tmp_path / "a.tar").write_bytes(tar_of({"train.parquet": parquet(images, [0, 0, 1, 1])}))
    samples = {sample.key: sample for sample in open_source(tmp_path / "a.tar").samples}
    assert samples["train.parquet/3"].read() == PICTURES[3]
    with pytest.raises(ValueError, match="empty"):
        samples["train.parquet/1"].read()


def test_parquet_labels_are_listed_without_reading_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_prep.sources import blobs

    large = [os.urandom(1 << 20) for _ in range(4)]
    root = write(tmp_path, {"train.parquet": parquet(large, [0, 1, 0, 1])})  # type: ignore[arg-type]
    num_read, original = 0, blobs.read_range

    def counting(*arguments: Any) -> bytes:
        nonlocal num_read
        content = original(*arguments)
        num_read += len(content)
        return content

    monkeypatch.setattr(blobs, "read_range", counting)
    source = open_source(root)
    assert len(source.samples) == 4 and num_read < 1 << 20
    assert source.samples[0].read() == large[0]


def plain_parquet(**columns: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"PAR1 this is no parquet PAR1", "is no parquet file, or damaged"),
        (b"", "is no parquet file, or damaged"),
        (hub()["data/train-00000-of-00002.parquet"][:-100], "is no parquet file, or damaged"),
        (plain_parquet(image=[b"x"], label=[1]), r"must be a struct .* image \(binary\), label \(int64\)"),
        (plain_parquet(picture=[b"x"], label=[1]), r"needs the columns image and label; it has picture"),
        (parquet([b"x"], [7], names=NAMES), "names 3 classes, but there is a label 7"),
    ],
)
def test_parquet_damage(tmp_path: Path, content: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        open_source(write(tmp_path, {"data/train-0.parquet": content}))


def test_parquet_without_any_label(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no class"):
        open_source(write(tmp_path, {"train.parquet": parquet([b"x"], [-1])}))


def test_a_table_beside_class_folders_is_no_data_set(tmp_path: Path) -> None:
    files = {f"{name}/{n}.jpg": image(n) for name in "ab" for n in range(5)}
    files |= {"metadata.parquet": plain_parquet(image=["a/1.jpg"], label=[1])}
    assert open_source(write(tmp_path, files)).layout == "flat-folder"


# --- lists ----------------------------------------------------------------------------------------------

ABBEY = {f"a/abbey/0000000{n}.jpg": image(n) for n in range(1, 4)}
ALLEY = {f"a/alley/outdoor/0000000{n} b.jpg": image(n + 10) for n in range(1, 3)}


def mini_places() -> Files:
    files = {f"images/train/{name}": data for name, data in (ABBEY | ALLEY).items()}
    files |= {f"images/val/0000000{n}.jpg": image(n + 20) for n in (1, 2)}
    files |= {f"images/test/0000000{n}.jpg": image(n + 30) for n in (1, 2)}
    lines = [f"train/{name} {int(name in ALLEY)}" for name in (*ABBEY, *ALLEY)]
    files["data/train.txt"] = "\n".join([*lines, ""]).encode()
    files["data/val.txt"] = b"val/00000001.jpg 1\r\nval/00000002.jpg 0\r\n"
    files["data/test.txt"] = b"test/00000001.jpg\n"
    return files


def places_expected(names: tuple[str, str]) -> dict[str, tuple[str, str | None, bytes]]:
    expected: dict[str, tuple[str, str | None, bytes]] = {
        f"images/train/{name}": (names[name in ALLEY], "train", data)
        for name, data in (ABBEY | ALLEY).items()
    }
    expected["images/val/00000001.jpg"] = (names[1], "val", image(21))
    expected["images/val/00000002.jpg"] = (names[0], "val", image(22))
    return expected


def test_mini_places(tmp_path: Path) -> None:
    names = ("a/abbey", "a/alley/outdoor")
    kit = {
        name.replace("data/", "development_kit/data/") if name.startswith("data/") else name: content
        for name, content in mini_places().items()
    }
    kit["development_kit/data/categories.txt"] = b"/a/abbey 0\n/a/alley/outdoor 1\n/z/zoo 2\n"
    for source in (
        open_source(write(tmp_path / "folder", mini_places())),
        open_source(write(tmp_path / "kit", kit)),
        open_source(zip_of(tmp_path / "a.zip", mini_places())),
        open_source(zip_of(tmp_path / "b.zip", {f"top/{name}": data for name, data in kit.items()})),
    ):
        assert source.layout == "places-list" and source.warnings == ()
        assert contents(source) == places_expected(names)
        assert source.display_names == ("abbey", "alley, outdoor")


def test_places365_names_and_leading_slashes(tmp_path: Path) -> None:
    files = {
        "places365_train_standard.txt": b"/a/abbey/1.jpg 0\n/b/bar/2.jpg 1\n",
        "places365_train_challenge.txt": b"/a/abbey/9.jpg 0\n",
        "places365_val.txt": b"Places365_val_1.jpg 1\n",
        "categories_places365.txt": b"/a/abbey 0\n/b/bar 1\n",
        "data_256/a/abbey/1.jpg": image(1),
        "data_256/b/bar/2.jpg": image(2),
        "val_256/Places365_val_1.jpg": image(3),
    }
    assert contents(open_source(write(tmp_path, files))) == {
        "data_256/a/abbey/1.jpg": ("a/abbey", "train", image(1)),
        "data_256/b/bar/2.jpg": ("b/bar", "train", image(2)),
        "val_256/Places365_val_1.jpg": ("b/bar", "val", image(3)),
    }


def test_lists_with_class_names(tmp_path: Path) -> None:
    files = {f"{n}.jpg": image(n) for n in range(4)}
    files |= {"train.txt": b"0.jpg cat\n1.jpg dog\n", "val.txt": b"2.jpg dog\n3.jpg cat\n"}
    source = open_source(write(tmp_path, files))
    assert source.class_names == ("cat", "dog") and source.count("val") == 2 and source.warnings == ()
    assert contents(source)["2.jpg"] == ("dog", "val", image(2))


def test_listed_files_that_are_missing_or_twice(tmp_path: Path) -> None:
    files = mini_places()
    files["data/train.txt"] += b"train/a/abbey/gone.jpg 0\ntrain/a/abbey/00000001.jpg 0\n"
    source = open_source(write(tmp_path, files))
    gone = next(sample for sample in source.samples if sample.key == "images/train/a/abbey/gone.jpg")
    with pytest.raises(ValueError, match="listed, but not there"):
        gone.read()
    assert gone.blob.version() and len(source.samples) == 8
    assert len(source.warnings) == 1 and "1 images again" in source.warnings[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data/train.txt": b"train/a/abbey/00000001.jpg 0\n../../etc/passwd.jpg 0\n"}, "leads out"),
        ({"data/train.txt": b"train/a/abbey/00000001.jpg 0\nnothing\n"}, "line 2: expected `path label`"),
        ({"data/train.txt": b"x/1.jpg 0\nx/2.jpg 1\n"}, "none of the files"),
        ({"data/categories.txt": b"/a/abbey 0\n"}, "does not name label 1"),
        ({"data/categories.txt": b"/a/abbey 0\n/b/bar 0\n/c/cafe 1\n"}, "one label to two classes"),
        ({"data/categories.txt": b"0 abbey\n"}, "expected `/a/abbey 0`"),
    ],
)
def test_broken_lists(tmp_path: Path, changes: Files, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        open_source(write(tmp_path, mini_places() | changes))


def test_empty_list(tmp_path: Path) -> None:
    root = write(tmp_path, mini_places() | {"data/train.txt": b"\n\n"})
    with pytest.raises(ValueError, match=r"train.txt is empty"):
        open_source(root, layout="places-list")


def test_lists_of_other_kinds_do_not_hide_folders(tmp_path: Path) -> None:
    files = {f"{name}/{n}.jpg": image(n) for name in "ab" for n in range(5)}
    files |= {"train.txt": b"a/1\na/2\n", "val.txt": b"b/1\n"}
    assert open_source(write(tmp_path, files)).layout == "flat-folder"


# --- CIFAR ----------------------------------------------------------------------------------------------


def planes(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), np.uint8)


def ppm(row: np.ndarray) -> bytes:
    return b"P6 32 32 255\n" + row.reshape(3, 32, 32).transpose(1, 2, 0).tobytes()


CIFAR_LABELS = {f"data_batch_{n}": [n % 3, (n + 1) % 3] for n in range(1, 6)} | {"test_batch": [0, 1, 2]}
CIFAR_PIXELS = {name: planes(n, len(labels)) for n, (name, labels) in enumerate(CIFAR_LABELS.items())}
CIFAR_NAMES = ["airplane", "automobile", "bird"]


def cifar_python(protocol: int = 2, top: str = "cifar-10-batches-py/") -> Files:
    files = {
        f"{top}{name}": pickle.dumps(
            {b"batch_label": b"1", b"labels": labels, b"data": CIFAR_PIXELS[name]}, protocol
        )
        for name, labels in CIFAR_LABELS.items()
    }
    files[f"{top}batches.meta"] = pickle.dumps({b"label_names": [n.encode() for n in CIFAR_NAMES]}, protocol)
    return files | {f"{top}readme.html": b""}


def python2_pickle(labels: list[int], pixels: np.ndarray) -> bytes:
    """What Python 2 wrote, and the real files hold: its texts are bytes, an array's among them."""
    raw = pixels.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btRq\x01"
    array += b"(K\x01(M%bM%bt" % (len(labels).to_bytes(2, "little"), (3072).to_bytes(2, "little"))
    array += b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array += b"\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    items = b"U\x04data" + array + b"U\x06labels](" + b"".join(b"K%c" % label for label in labels) + b"e"
    return b"\x80\x02}(" + items + b"u."


def cifar_binary() -> Files:
    top = "cifar-10-batches-bin/"
    files = {
        f"{top}{name}.bin": b"".join(
            bytes([label]) + row.tobytes() for label, row in zip(labels, CIFAR_PIXELS[name], strict=True)
        )
        for name, labels in CIFAR_LABELS.items()
    }
    return files | {f"{top}batches.meta.txt": ("\n".join(CIFAR_NAMES) + "\n\n").encode()}


def cifar_expected(start: str, suffix: str = "") -> dict[str, tuple[str, str | None, bytes]]:
    return {
        f"{start}{name}{suffix}/{row:05d}": (
            CIFAR_NAMES[label],
            "val" if name == "test_batch" else "train",
            ppm(CIFAR_PIXELS[name][row]),
        )
        for name, labels in CIFAR_LABELS.items()
        for row, label in enumerate(labels)
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_cifar_python(tmp_path: Path, protocol: int) -> None:
    root = write(tmp_path, cifar_python(protocol))
    for location, start in ((root, "cifar-10-batches-py/"), (root / "cifar-10-batches-py", "")):
        source = open_source(location)
        assert source.layout == "cifar" and source.warnings == ()
        assert contents(source) == cifar_expected(start)
        # Python 3 encodes bytes in protocol 2, so that they do not stand in the file as they are.
        kind = BytesBlob if protocol == 2 else PixelsBlob
        assert all(isinstance(sample.blob, kind) for sample in source.samples)


def test_cifar_as_python_2_wrote_it(tmp_path: Path) -> None:
    files = {
        f"cifar-10-batches-py/{name}": python2_pickle(labels, CIFAR_PIXELS[name])
        for name, labels in CIFAR_LABELS.items()
    }
    assert pickle.loads(files["cifar-10-batches-py/test_batch"], encoding="bytes")[b"labels"] == [0, 1, 2]
    files["cifar-10-batches-py/batches.meta"] = cifar_python()["cifar-10-batches-py/batches.meta"]
    source = open_source(write(tmp_path, files))
    assert contents(source) == cifar_expected("cifar-10-batches-py/")
    assert all(isinstance(sample.blob, PixelsBlob) for sample in source.samples)


def test_cifar_pixels_that_stand_in_the_file_twice(tmp_path: Path) -> None:
    name = "data_batch_1"
    pixels = CIFAR_PIXELS[name]
    batch = {b"first": pixels[0].tobytes(), b"labels": CIFAR_LABELS[name], b"data": pixels}
    files = cifar_python(4) | {f"cifar-10-batches-py/{name}": pickle.dumps(batch, 4)}
    assert contents(open_source(write(tmp_path, files))) == cifar_expected("cifar-10-batches-py/")


def test_cifar_binary_and_in_archives(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(cifar_binary()))
    start = "cifar-10-batches-bin/"
    for location in (
        write(tmp_path / "f", cifar_binary()),
        tmp_path / "a.tar",
        zip_of(tmp_path / "a.zip", cifar_binary()),
    ):
        assert contents(open_source(location)) == cifar_expected(start, ".bin")
    assert contents(open_source(zip_of(tmp_path / "b.zip", cifar_python(4)))) == cifar_expected(
        "cifar-10-batches-py/"
    )


def test_cifar_100(tmp_path: Path) -> None:
    pixels = planes(1, 4)
    files = {
        name: pickle.dumps(
            {b"fine_labels": [1, 0], b"coarse_labels": [0, 0], b"data": pixels[at : at + 2]}, 4
        )
        for name, at in (("train", 0), ("test", 2))
    }
    files["meta"] = pickle.dumps({b"fine_label_names": [b"apple", b"baby"]}, 4)
    source = open_source(write(tmp_path / "python", files))
    expected = {
        f"{name}/{row:05d}": (("baby", "apple")[row], split, ppm(pixels[at + row]))
        for name, split, at in (("train", "train", 0), ("test", "val", 2))
        for row in range(2)
    }
    assert contents(source) == expected
    binary = {
        f"{name}.bin": b"".join(
            bytes([9, label]) + pixels[at + row].tobytes() for row, label in enumerate((1, 0))
        )
        for name, at in (("train", 0), ("test", 2))
    }
    source = open_source(write(tmp_path / "binary", binary | {"fine_label_names.txt": b"apple\nbaby\n"}))
    assert contents(source) == {key.replace("/", ".bin/"): value for key, value in expected.items()}


class Malicious:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_malicious_pickle_runs_nothing(tmp_path: Path, protocol: int) -> None:
    proof = tmp_path / "proof"
    root = write(tmp_path / "source", cifar_python())
    for attack in (
        Malicious(os.mkdir, str(proof)),
        Malicious(eval, f"open({str(proof)!r}, 'w')"),
        Malicious(np.memmap, str(proof), "uint8", "w+", 0, (10,)),
        Malicious(os.system, f"touch {proof}"),
    ):
        for name in ("data_batch_1", "batches.meta"):
            files = cifar_python() | {f"cifar-10-batches-py/{name}": pickle.dumps({b"x": attack}, protocol)}
            write(root, files)
            with pytest.raises(ValueError, match="was not run"):
                open_source(root)
    assert not proof.exists()


def test_pickle_cannot_change_what_reads_it(tmp_path: Path) -> None:
    state = b"}(U\x05shapeK\x07u"
    for name in (b"numpy\nndarray\n", b"numpy\ndtype\n", b"numpy.core.multiarray\n_reconstruct\n"):
        content = b"\x80\x02}(U\x01xc" + name + state + b"bu."
        files = cifar_python() | {"cifar-10-batches-py/data_batch_1": content}
        with pytest.raises(ValueError, match="data_batch_1 is damaged"):
            open_source(write(tmp_path, files))
    # Nor reach beyond the names that are allowed.
    for name in (b"ndarray.__init__.__globals__", b"_reconstruct.__call__"):
        content = b"\x80\x04\x8c\x05numpy\x8c" + bytes([len(name)]) + name + b"\x93."
        files = cifar_python() | {"cifar-10-batches-py/data_batch_1": content}
        with pytest.raises(ValueError, match="was not run"):
            open_source(write(tmp_path, files))
    assert len(contents(open_source(write(tmp_path, cifar_python())))) == 13


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "damaged"),
        (NOISE, "damaged|not run|no dictionary"),
        (cifar_python(4)["cifar-10-batches-py/test_batch"][:5000], "damaged"),
        (b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".", "damaged"),
        (b"\x80\x02Nr\xff\xff\xff\xff.", "no dictionary"),
        (pickle.dumps([1]), "no dictionary"),
        (pickle.dumps({b"labels": [1]}), "no CIFAR batch"),
        (pickle.dumps({b"labels": [1, 2], b"data": planes(0, 3)}, 4), "2 labels for an array"),
        (pickle.dumps({b"labels": [1], b"data": planes(0, 1).astype(np.float32)}, 4), "array of f4"),
        (pickle.dumps({b"labels": ["a"], b"data": planes(0, 1)}, 4), "no number"),
        (pickle.dumps({b"labels": [9], b"data": planes(0, 1)}, 4), "names 3 classes, .* label 9"),
    ],
)
def test_cifar_damage(tmp_path: Path, content: bytes, sentence: str) -> None:
    files = cifar_python(4) | {"cifar-10-batches-py/data_batch_3": content}
    with pytest.raises(ValueError, match=sentence):
        open_source(write(tmp_path, files))


def test_cifar_incomplete(tmp_path: Path) -> None:
    root = write(tmp_path, cifar_binary()) / "cifar-10-batches-bin"
    (root / "data_batch_2.bin").write_bytes(b"x" * 5000)
    with pytest.raises(ValueError, match=r"data_batch_2.bin has 5,000 bytes, .* cut off"):
        open_source(root)
    (root / "data_batch_2.bin").unlink()
    with pytest.raises(ValueError, match=r"data_batch_2.bin is missing"):
        open_source(root)


# --- Tiny ImageNet --------------------------------------------------------------------------------------


def tiny() -> Files:
    files = {f"train/{name}/images/{name}_{n}.JPEG": image(n) for name in (A, B) for n in range(3)}
    files |= {f"train/{name}/{name}_boxes.txt": b"0 0 0 0" for name in (A, B)}
    files |= {f"val/images/val_{n}.JPEG": image(n + 10) for n in range(2)}
    files |= {"test/images/test_0.JPEG": image(20)}
    files["val/val_annotations.txt"] = f"val_0.JPEG\t{B}\t0\t0\t9\t9\nval_1.JPEG\t{A}\t0\t0\t9\t9\n".encode()
    files["words.txt"] = f"n00001740\tentity\n{A}\ttench, Tinca tinca\n{B}\tgoldfish\n".encode()
    return files | {"wnids.txt": f"{B}\n{A}\n".encode()}


def test_tiny_imagenet(tmp_path: Path) -> None:
    expected: dict[str, Any] = {
        f"train/{name}/images/{name}_{n}.JPEG": (name, "train", image(n)) for name in (A, B) for n in range(3)
    }
    expected["val/images/val_0.JPEG"] = (B, "val", image(10))
    expected["val/images/val_1.JPEG"] = (A, "val", image(11))
    inside = {f"tiny-imagenet-200/{name}": data for name, data in tiny().items()}
    for location in (
        write(tmp_path / "tiny", tiny()),
        zip_of(tmp_path / "tiny-imagenet-200.zip", inside, stored=True),
    ):
        source = open_source(location)
        assert source.layout == "tiny-imagenet" and source.warnings == () and contents(source) == expected
        assert source.display_names == ("tench, Tinca tinca", "goldfish")
    with pytest.raises(ValueError, match=r"--source .*tiny-imagenet-200"):
        open_source(write(tmp_path / "above", inside))


def test_tiny_imagenet_damage(tmp_path: Path) -> None:
    root = write(tmp_path, tiny())
    (root / "val" / "images" / "val_1.JPEG").unlink()
    samples = {sample.key: sample for sample in open_source(root).samples}
    with pytest.raises(ValueError, match="listed, but not there"):
        samples["val/images/val_1.JPEG"].read()
    (root / "val" / "images" / "extra.JPEG").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no line for val/images/extra.JPEG"):
        open_source(root)
    (root / "val" / "val_annotations.txt").write_bytes(b"val_0.JPEG n01440764\n")
    with pytest.raises(ValueError, match=r"val_annotations.txt, line 1"):
        open_source(root)


# --- WebDataset -----------------------------------------------------------------------------------------


def shard(*rows: tuple[str, str, bytes, str | None]) -> bytes:
    """Rows of (key, ending of the image, its bytes, text of .cls)."""
    files: Files = {}
    for key, ending, content, label in rows:
        if label is not None:
            files[f"{key}.cls"] = label.encode()
        files[f"{key}.{ending}"] = content
    return tar_of(files)


def web() -> Files:
    return {
        "train-00000.tar": shard(("000", "jpg", image(0), "1"), ("001", "png", image(1, "PNG"), "0\n")),
        "train-00001.tar": shard(("000", "jpeg", image(2), "2"), ("b/001", "webp", image(3, "WEBP"), "10")),
        "val-00000.tar": shard(
            ("000", "jpg", image(4), "2"), ("001", "jpg", image(5), None), ("2", "jpg", b"", "-1")
        ),
    }


def web_expected(names: dict[int, str]) -> dict[str, tuple[str, str | None, bytes]]:
    return {
        "train-00000.tar/000.jpg": (names[1], "train", image(0)),
        "train-00000.tar/001.png": (names[0], "train", image(1, "PNG")),
        "train-00001.tar/000.jpeg": (names[2], "train", image(2)),
        "train-00001.tar/b/001.webp": (names[10], "train", image(3, "WEBP")),
        "val-00000.tar/000.jpg": (names[2], "val", image(4)),
    }


def test_webdataset(tmp_path: Path) -> None:
    source = open_source(write(tmp_path, web()))
    assert source.layout == "webdataset" and len(source.warnings) == 1
    assert "2 images" in source.warnings[0] and "no label" in source.warnings[0]
    assert contents(source) == web_expected({0: "00", 1: "01", 2: "02", 10: "10"})


def test_webdataset_names(tmp_path: Path) -> None:
    # Two classes of one name, as the cranes of ImageNet, stay two.
    listed = [f"class {number}" for number in (12, 11, 10, 9, 8, 7, 6, 5, 4, 3)]
    listed[1] = listed[2] = "crane"
    names = {0: "class 12", 1: "crane (1)", 2: "crane (2)", 10: "last"}
    (write(tmp_path, web()) / "classes.txt").write_text("\n".join([*listed, "last"]))
    assert contents(open_source(tmp_path)) == web_expected(names)
    # What this tool wrote itself knows its names, and is believed first.
    own = {"format": "dali", "class_names": [f"n{n:08d}" for n in range(11)], "display_names": ["fish"] * 11}
    (tmp_path / "manifest.json").write_text(json.dumps(own))
    source = open_source(tmp_path)
    assert contents(source) == web_expected({n: f"n{n:08d}" for n in range(11)})
    assert source.display_names == ("fish",) * 4


def test_webdataset_single_tar_json_and_names_as_labels(tmp_path: Path) -> None:
    label = {"label": "cat", "caption": "x"}
    files = {f"s/{n}.jpg": image(n) for n in range(4)}
    files |= {"s/0.json": json.dumps(label).encode(), "s/1.cls": b"dog", "s/2.cls": b"dog", "s/3.cls": b"cat"}
    files["s/1.json"] = json.dumps({"label": "ignored, since there is a cls"}).encode()
    (tmp_path / "set.tar").write_bytes(tar_of(dict(sorted(files.items()))))
    source = open_source(tmp_path / "set.tar", val_fraction=0.5)
    assert source.layout == "webdataset" and source.class_names == ("cat", "dog")
    assert {key: name for key, (name, _, _) in contents(source).items()} == {
        "s/0.jpg": "cat",
        "s/1.jpg": "dog",
        "s/2.jpg": "dog",
        "s/3.jpg": "cat",
    }
    assert source.count("val") == 2


def test_webdataset_splits_by_folder(tmp_path: Path) -> None:
    files = {
        f"{split}/0.tar": shard(("0", "jpg", image(0), "0"), ("1", "jpg", image(1), "1"))
        for split in ("train", "valid", "test")
    }
    source = open_source(write(tmp_path, files))
    assert [sample.split for sample in source.samples] == ["train", "train", "val", "val"]
    assert len(source.warnings) == 1 and "test split (2 images)" in source.warnings[0]


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"train-0.tar": web()["train-00000.tar"][:2000]}, "damaged tar"),
        ({"train-0.tar": b""}, "damaged tar"),
        ({"classes.txt": b"a\nb\nc\n"}, "names 3 classes, but there is a label 10"),
        ({"x.tar": shard(("0", "jpg", b"", "-7"))}, "label -7"),
        ({"x.tar": shard(("0", "jpg", b"", ""))}, "0.cls holds no label"),
        ({"x.tar": tar_of({"0.jpg": b"", "0.json": b"{"})}, "0.json holds no label"),
        ({"x.tar": tar_of({"0.jpg": b"", "0.json": b'{"label": [1]}'})}, "neither a number nor a name"),
        ({"x.tar": tar_of({"0.jpg": b"", "0.png": b"", "0.cls": b"1"})}, "two images under the key 0"),
    ],
)
def test_webdataset_damage(tmp_path: Path, files: Files, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        open_source(write(tmp_path, web() | files))


def test_tars_beside_class_folders_do_not_hide_them(tmp_path: Path) -> None:
    files = web() | {f"{name}/{n}.jpg": image(n) for name in "ab" for n in range(5)}
    assert open_source(write(tmp_path, files)).layout == "flat-folder"
    files = {f"{name}/{n}.jpg": image(n) for name in "ab" for n in range(5)}
    (tmp_path / "c.tar").write_bytes(tar_of(files))
    assert open_source(tmp_path / "c.tar").layout == "flat-folder"


# --- archives of ordinary folders -----------------------------------------------------------------------

INTEL = {
    f"seg_{split}/seg_{split}/{name}/{n}.jpg": image(n)
    for split in ("train", "test")
    for name in "ab"
    for n in range(2)
}
FLAT = {f"{name}/{n}.jpg": image(n) for name in "ab" for n in range(5)}


@pytest.mark.parametrize("top", ["", "archive/", "outer/inner/"])
@pytest.mark.parametrize(("files", "layout"), [(INTEL, "intel"), (FLAT, "flat-folder")])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_of_folders(tmp_path: Path, top: str, files: Files, layout: str, kind: str) -> None:
    inside = {top + name: content for name, content in files.items()}
    if top:
        inside |= {f"{top}README.md": b"read me", "__MACOSX/x": b""}
    path = tmp_path / f"a.{kind}"
    zip_of(path, inside) if kind == "zip" else path.write_bytes(tar_of(inside))
    for source in (open_source(path), open_source(path, layout=layout)):
        assert source.layout == layout
        assert {key: data for key, (_, _, data) in contents(source).items()} == files
    if top:
        folder = write(tmp_path / "unpacked", inside)
        with pytest.raises(ValueError, match=f"--source {folder / top.rstrip('/')}$"):
            open_source(folder)


def test_layouts_take_no_ordinary_folder(tmp_path: Path) -> None:
    ordinary = {
        "flat-folder": FLAT,
        "image-folder": {f"{split}/{key}": data for split in ("train", "val") for key, data in FLAT.items()},
        "intel": INTEL,
    }
    extra = {
        "train.txt": b"a b\n",
        "classes.txt": b"a\nb\n",
        "words.txt": b"",
        "meta": b"",
        "labels.csv": b"",
    }
    for layout, files in ordinary.items():
        tree = open_tree(str(write(tmp_path / layout, files | extra)))
        assert next(name for name, module in LAYOUTS.items() if module.detect(tree)) == layout


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_layout_named_for_another_source_says_so(tmp_path: Path, name: str) -> None:
    root = write(tmp_path, {"notes.txt": b"nothing here"})
    with pytest.raises(ValueError, match=str(tmp_path)):
        open_source(root, layout=name)


@pytest.mark.parametrize("start", ["/", "./", ".//", "/./"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_members_that_begin_at_the_root(tmp_path: Path, start: str, kind: str) -> None:
    inside = {start + name: content for name, content in FLAT.items()}
    path = tmp_path / f"a.{kind}"
    zip_of(path, inside) if kind == "zip" else path.write_bytes(tar_of(inside))
    assert {key: data for key, (_, _, data) in contents(open_source(path)).items()} == FLAT
