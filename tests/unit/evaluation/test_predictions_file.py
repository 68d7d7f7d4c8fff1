import io
import zipfile

import numpy as np
import pytest

from evaluation.metrics import topk_accuracy
from evaluation.predictions_file import SavedPredictions, load_predictions, predictions_bytes


def make_saved(logits=None, **changes):
    rng = np.random.default_rng(0)
    fields = {
        "logits": rng.normal(size=(50, 4)) if logits is None else logits,
        "labels": rng.integers(0, 4, 50),
        "sample_ids": rng.permutation(100)[:50],
        "class_names": ("forest", "日本", "crane", "crane"),
        "data_index_sha256": "ab" * 32,
        "checkpoint_sha256": "cd" * 32,
        "split": "val",
        "view": "96 px, crop 1",
    }
    return SavedPredictions(**(fields | changes))


def write(tmp_path, content):
    path = tmp_path / "predictions.npz"
    path.write_bytes(content)
    return path


def arrays_of(content):
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)


def rewritten(save=np.savez, **changes):
    buffer = io.BytesIO()
    arrays = arrays_of(predictions_bytes(make_saved())) | changes
    save(buffer, **{name: array for name, array in arrays.items() if array is not None})
    return buffer.getvalue()


def forged(content, name, descr, shape, file_size=None):
    """The file with another header before an array, and a size that the zip's directory claims for it."""
    header, buffer = io.BytesIO(), io.BytesIO()
    claim = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, claim)
    with zipfile.ZipFile(io.BytesIO(content)) as whole, zipfile.ZipFile(buffer, "w") as file:
        for member in whole.namelist():
            is_it = member == f"{name}.npy"
            file.writestr(member, (header.getvalue() if is_it else b"") + whole.read(member))
            if is_it and file_size is not None:
                file.getinfo(member).file_size = file.getinfo(member).compress_size = file_size
    return buffer.getvalue()


def test_what_was_saved_is_read_again(tmp_path):
    saved = make_saved()
    content = predictions_bytes(saved)
    assert content == predictions_bytes(make_saved())
    loaded = load_predictions(write(tmp_path, content))
    for name in vars(saved):
        assert np.array_equal(getattr(loaded, name), getattr(saved, name)), name
    assert topk_accuracy(loaded, 1) == topk_accuracy(saved, 1)


def test_logits_are_halved_only_where_nothing_is_lost(tmp_path):
    exact = np.random.default_rng(0).integers(-99, 99, (50, 4)) / 8
    assert arrays_of(predictions_bytes(make_saved(exact)))["logits"].dtype == np.float16
    # Two classes 0.001 apart would tie as float16, and the lower label would win.
    close = np.tile([[20.0, 20.001, 0, 0]], (50, 1))
    loaded = load_predictions(write(tmp_path, predictions_bytes(make_saved(close))))
    assert (loaded.predicted_labels == 1).all()
    for huge in (1e5, -1e30):
        large = np.full((50, 4), huge)
        assert arrays_of(predictions_bytes(make_saved(large)))["logits"].dtype == np.float32


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "damaged"),
        (b"PK nothing", "damaged"),
        (predictions_bytes(make_saved())[:-100], "damaged"),
        (rewritten(labels=None), "has no labels"),
        (rewritten(labels=np.array([object()] * 50)), "labels is object"),
        (rewritten(logits=np.zeros((50, 4), complex)), "logits is complex"),
        (rewritten(view=np.array(3)), "view is int64"),
        (rewritten(class_names=np.array(["a"] * 5)), "5 class names, 4 classes"),
        (rewritten(sample_ids=np.zeros(50, np.int64)), "more than once"),
        (rewritten(logits=np.full((50, 4), np.nan)), "not finite"),
        (rewritten(np.savez_compressed), "compressed"),
    ],
)
def test_damaged_and_hostile_files_end_in_a_sentence(tmp_path, content, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        load_predictions(write(tmp_path, content))
    assert "predictions.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_a_header_that_claims_more_than_its_file_takes_no_memory(tmp_path):
    content = forged(predictions_bytes(make_saved()), "logits", "<f4", (10**9, 10**6))
    with pytest.raises(ValueError, match="claims 4,000,000,000,000,000 bytes"):
        load_predictions(write(tmp_path, content))
    # The zip's own directory agrees with the header.
    content = forged(predictions_bytes(make_saved()), "logits", "<f4", (1000, 1000), file_size=4_100_000)
    with pytest.raises(ValueError, match=r"claims 4,000,000 bytes|Overlapped entries"):
        load_predictions(write(tmp_path, content))


@pytest.mark.parametrize("descr", ["<U0", "<U1"])
def test_names_without_bytes_are_not_walked(tmp_path, descr):
    content = forged(predictions_bytes(make_saved()), "class_names", descr, (10**11,))
    with pytest.raises(ValueError, match="its class_names"):
        load_predictions(write(tmp_path, content))


def test_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(ValueError, match="python -m evaluation"):
        load_predictions(tmp_path / "predictions.npz")
