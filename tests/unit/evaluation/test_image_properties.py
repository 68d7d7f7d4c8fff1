import io

import numpy as np
import pytest
from PIL import Image

from evaluation.image_properties import (
    accuracy_by_group,
    difference_p_value,
    mean_and_std_of_luma,
    measure_properties,
)
from evaluation.stored_images import StoredImages


def jpeg_of(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def groups_of(values, is_right, expected=None, **limits):
    values = np.asarray(values, dtype=float)
    expected = np.full(len(values), 0.5) if expected is None else expected
    return accuracy_by_group(values, np.asarray(is_right, dtype=bool), expected, **limits)


@pytest.mark.parametrize("size", [(20, 30), (700, 500)])
def test_brightness_and_contrast_of_images_that_are_known(size):
    grey = np.full((*size, 3), 102, np.uint8)
    assert mean_and_std_of_luma(jpeg_of(grey)) == pytest.approx((0.4, 0), abs=0.01)
    halves = np.zeros((*size, 3), np.uint8)
    halves[size[0] // 2 :] = 255
    assert mean_and_std_of_luma(jpeg_of(halves)) == pytest.approx((0.5, 0.5), abs=0.02)
    # A chessboard of single pixels is grey from afar.
    board = (255 * (np.indices((512, 512)).sum(axis=0) % 2)).astype(np.uint8)
    assert mean_and_std_of_luma(jpeg_of(np.stack([board] * 3, axis=2)))[1] < 0.1


def test_luma_of_a_grey_jpeg_is_read_too():
    assert mean_and_std_of_luma(jpeg_of(np.full((40, 40), 204, np.uint8))) == pytest.approx(
        (0.8, 0), abs=0.01
    )


def test_groups_are_quantiles_with_their_accuracy():
    values = np.arange(500)[::-1]
    groups = groups_of(values, values >= 100)
    assert [(g.low, g.high, g.count) for g in groups] == [(100 * k, 100 * k + 99, 100) for k in range(5)]
    assert [g.top1 for g in groups] == [0, 1, 1, 1, 1]
    assert groups[1].interval[0] < 0.97 and groups[1].interval[1] == 1


def test_equal_values_stay_together_and_small_groups_merge():
    assert [g.count for g in groups_of([3.0] * 400, [1] * 400)] == [400]
    values = [1.0] * 250 + [2.0] * 230 + [3.0] * 20
    groups = groups_of(values, [1] * 500)
    assert [(g.low, g.high, g.count) for g in groups] == [(1, 1, 250), (2, 3, 250)]
    assert [g.count for g in groups_of(np.arange(70), [1] * 70)] == [30, 40]
    assert [g.count for g in groups_of(np.arange(7), [1] * 7)] == [7]


def test_expected_accuracy_is_that_of_the_groups_classes():
    expected = np.repeat([0.9, 0.4], 50)
    groups = groups_of(np.arange(100), np.ones(100), expected, num_groups=2)
    assert [g.expected_top1 for g in groups] == pytest.approx([0.9, 0.4])


def test_p_value_tells_a_difference_from_chance():
    same = groups_of(np.arange(400), np.arange(400) % 2)
    different = groups_of(np.arange(400), np.arange(400) < 200)
    assert difference_p_value(same) > 0.9 and difference_p_value(different) < 1e-6
    assert difference_p_value(groups_of([1.0] * 99, [1] * 99)) == 1
    assert difference_p_value(groups_of(np.arange(400), [1] * 400)) == 1


def test_properties_of_a_prepared_split(prepared):
    folder, manifest = prepared
    stored = StoredImages(folder, "val")
    num_samples = manifest.splits["val"].num_samples
    ids = np.random.default_rng(0).permutation(num_samples)
    properties = measure_properties(stored, ids, progress=False)
    assert properties.sample_ids.tolist() == list(range(num_samples))
    image = stored.read(3).astype(float)
    assert properties.values["size"][3] == pytest.approx(np.sqrt(image.shape[0] * image.shape[1]))
    assert properties.values["aspect_ratio"][3] == pytest.approx(image.shape[1] / image.shape[0])
    luma = image @ [0.299, 0.587, 0.114] / 255
    assert properties.values["brightness"][3] == pytest.approx(luma.mean(), abs=0.02)
    assert properties.values["bytes_per_pixel"][3] == len(stored.jpeg(3)) / luma.size
    assert stored.key(3) and stored.index_sha256 == manifest.splits["val"].index.sha256
    some = measure_properties(stored, ids, max_images=5, progress=False)
    assert len(set(some.sample_ids.tolist())) == 5 and some.num_in_split == num_samples
