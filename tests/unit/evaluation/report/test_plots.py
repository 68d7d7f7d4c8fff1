import io
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluation
from evaluation.metrics import Predictions, confusion_matrix, per_class_table
from evaluation.plot_style import PHONE_INCHES, PIXEL_DENSITY, WIDE_INCHES, plain_text, png_bytes
from evaluation.report.plots import plot_confusion_matrix, plot_per_class_accuracy, plot_training_curves
from evaluation.report.prediction_grid import (
    PredictedImage,
    centre_square,
    draw_predicted_images,
    plot_prediction_grid,
)

HOSTILE_NAMES = [r"$\frac{", "$a$", "<script>", "two\nlines", "_hidden", "", "x" * 400]


def draw(figure):
    """Render as a user would get it; what matplotlib complains about is a fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = Image.open(io.BytesIO(png_bytes(figure)))
    picture.load()
    return picture


def texts(axes):
    return [text.get_text() for text in axes.texts]


def tick_names(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def table_of(counts_right, count=10):
    """One row a class: how many of its `count` samples are right; the rest go to the next class."""
    num_classes = len(counts_right)
    labels = np.repeat(np.arange(num_classes), count)
    right = np.concatenate([np.arange(count) < num_right for num_right in counts_right])
    predicted = np.where(right, labels, (labels + 1) % num_classes)
    names = tuple(f"class {label}" for label in range(num_classes))
    return per_class_table(Predictions(np.eye(num_classes)[predicted], labels, np.arange(len(labels)), names))


@pytest.mark.parametrize("num_classes", [1, 2, 40, 61])
def test_confusion_matrix_fits_the_page_at_any_number_of_classes(num_classes):
    matrix = np.random.default_rng(0).integers(0, 3, size=(num_classes, num_classes))
    names = [f"a rather long class name {label}" for label in range(num_classes)]
    picture = draw(plot_confusion_matrix(matrix, names))
    assert 100 * PIXEL_DENSITY < picture.width <= WIDE_INCHES * 100 * PIXEL_DENSITY + 1
    assert 0.7 < picture.height / picture.width < 1.5


def test_confusion_matrix_shows_shares_of_the_true_class():
    matrix = np.array([[150, 50, 0], [0, 0, 0], [1, 0, 999]])
    axes = plot_confusion_matrix(matrix, ["cat", "dog", "fox"]).axes[0]
    shown = {
        (int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axes.texts
    }
    # Row 1 has no samples: a dash, not a percentage of nothing.
    assert shown == {(0, 0): "75%", (0, 1): "25%", (1, 1): "–", (2, 0): "<1%", (2, 2): "100%"}
    assert tick_names(axes.xaxis) == tick_names(axes.yaxis) == ["cat", "dog", "fox"]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")


def test_confusion_matrix_colours_right_blue_and_wrong_orange():
    axes = plot_confusion_matrix(np.array([[9, 1], [5, 5]]), ["a", "b"]).axes[0]
    colours = np.asarray(axes.images[0].get_array())
    red, blue = colours[..., 0], colours[..., 2]
    assert (blue > red).tolist() == [[True, False], [False, True]]
    # One error in ten must still be seen against a cell that never happened.
    assert blue[0, 1] < 0.9


def test_confusion_matrix_of_many_classes_is_blocks_without_text():
    matrix = np.zeros((250, 250), dtype=np.int64)
    matrix[0, 249] = 4  # the only samples: the first block row, the last block column
    axes = plot_confusion_matrix(matrix, [str(label) for label in range(250)]).axes[0]
    assert texts(axes) == []
    colours = np.asarray(axes.images[0].get_array())
    assert colours.shape[:2] == (84, 84)
    assert colours[0, -1, 0] > colours[0, -1, 2] + 0.2  # orange
    assert (colours[1:] == colours[1, 0]).all()  # no samples: all one grey


def test_confusion_matrix_refuses_names_of_another_data_set():
    with pytest.raises(ValueError, match="2 class names"):
        plot_confusion_matrix(np.zeros((3, 3), dtype=np.int64), ["a", "b"])


@pytest.mark.parametrize("width_inches", [WIDE_INCHES, PHONE_INCHES])
def test_figures_survive_names_that_are_no_names(width_inches):
    num_classes = len(HOSTILE_NAMES)
    labels = np.arange(num_classes)
    predictions = Predictions(np.eye(num_classes)[::-1], labels, labels, tuple(HOSTILE_NAMES))
    items = draw_predicted_images(predictions, lambda _: np.zeros((8, 8, 3), np.uint8), num_classes, seed=0)
    pictures = [
        draw(plot_confusion_matrix(confusion_matrix(predictions), HOSTILE_NAMES, width_inches=width_inches)),
        draw(plot_per_class_accuracy(per_class_table(predictions), width_inches=width_inches)),
        draw(plot_prediction_grid(items, width_inches=width_inches)),
    ]
    assert all(100 < side < 10_000 for picture in pictures for side in picture.size)


def test_per_class_bars_are_sorted_and_have_their_interval():
    figure = plot_per_class_accuracy(table_of([2, 10, 0]))
    axes = figure.axes[0]
    assert tick_names(axes.yaxis) == ["class 1", "class 0", "class 2"]
    assert [bar.get_width() for bar in axes.patches] == [1.0, 0.2, 0.0]
    assert texts(axes) == ["100%", "20.0%", "0%"]
    low, high = axes.collections[0].get_segments()[1][:, 0]
    assert (low, high) == pytest.approx((0.0567, 0.5098), abs=1e-4)
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the highest is at the top
    draw(figure)


def test_per_class_bars_leave_out_classes_without_samples():
    predictions = Predictions(np.eye(3)[[0, 2]], np.array([0, 2]), np.arange(2), ("a", "empty", "c"))
    table = per_class_table(predictions)
    assert tick_names(plot_per_class_accuracy(table).axes[0].yaxis) == ["a", "c"]
    with pytest.raises(ValueError, match="No class"):
        plot_per_class_accuracy([table[1]])


def test_per_class_bars_of_many_classes_show_both_ends():
    counts_right = list(range(101))
    figure = plot_per_class_accuracy(table_of(counts_right, count=100))
    axes = figure.axes[0]
    names = tick_names(axes.yaxis)
    assert names[0] == "class 100" and names[-1] == "class 0" and len(names) == 40
    assert "… 61 classes between …" in texts(axes)
    assert draw(figure).height < 2500


def metrics_rows():
    rows = [
        {"split": "train", "step": step, "epoch": step / 10, "loss": 5 - step / 10, "learning_rate": 0.1}
        for step in range(40)
    ]
    rows += [
        {
            "split": "val",
            "step": 10 * epoch,
            "epoch": epoch,
            "loss": 3.0,
            "top1": epoch / 10,
            "top5": epoch / 5,
        }
        for epoch in range(1, 5)
    ]
    return rows


def line(axes, label):
    return next(drawn for drawn in axes.lines if drawn.get_label() == label)


def test_training_curves_have_three_panels_over_epochs():
    figure = plot_training_curves(metrics_rows())
    loss, accuracy, rate = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Loss", "Accuracy", "Learning rate"]
    assert line(loss, "train").get_xdata().tolist() == [step / 10 for step in range(40)]
    assert line(loss, "val").get_xdata().tolist() == [1, 2, 3, 4]
    assert line(accuracy, "val top-1").get_ydata().tolist() == [0.1, 0.2, 0.3, 0.4]
    assert "40.0%" in texts(accuracy) and "80.0%" in texts(accuracy)
    assert set(rate.lines[0].get_ydata()) == {0.1}
    picture = draw(figure)
    assert picture.width == WIDE_INCHES * 100 * PIXEL_DENSITY
    phone = draw(plot_training_curves(metrics_rows(), width_inches=PHONE_INCHES))
    assert phone.width == PHONE_INCHES * 100 * PIXEL_DENSITY and phone.height > phone.width


def test_training_curves_skip_what_is_missing_or_no_number():
    rows = [
        {"split": "train", "epoch": 1, "loss": math.nan},
        {"split": "train", "epoch": 2, "loss": None},
        {"split": "train", "epoch": 3, "loss": 1.5},
        {"split": "train", "loss": 9.0},
        {"epoch": 4, "loss": 9.0},
        {},
    ]
    figure = plot_training_curves(rows)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Loss"]
    assert line(figure.axes[0], "train").get_xydata().tolist() == [[3.0, 1.5]]
    draw(figure)


@pytest.mark.parametrize("rows", [[], [{}], [{"split": "val", "epoch": 1}]])
def test_training_curves_refuse_rows_without_anything_to_draw(rows):
    with pytest.raises(ValueError, match="metrics rows"):
        plot_training_curves(rows)


def test_training_curves_of_a_resumed_run_keep_the_later_row():
    rows = [
        {"split": "val", "epoch": epoch, "top1": top1}
        for epoch, top1 in [(1, 0.1), (2, 0.9), (2, 0.2), (1.5, 0.15)]
    ]
    points = line(plot_training_curves(rows).axes[0], "val top-1").get_xydata().tolist()
    assert points == [[1, 0.1], [1.5, 0.15], [2, 0.2]]


def test_training_curves_fall_back_to_steps():
    axes = plot_training_curves([{"split": "train", "step": step, "loss": 1.0} for step in range(3)]).axes[0]
    assert axes.get_xlabel() == "step"


def test_running_mean_of_many_rows_is_not_pulled_down_at_the_ends():
    rows = [{"split": "train", "epoch": step, "loss": 2.0} for step in range(500)]
    assert line(plot_training_curves(rows).axes[0], "train").get_ydata() == pytest.approx(np.full(500, 2.0))


def make_item(shape=(30, 40, 3), *, is_right=True):
    image = np.full(shape, 128, dtype=np.uint8)
    return PredictedImage(image, 5, "forest", 0.876, "forest" if is_right else "sea", is_right)


def test_prediction_grid_says_right_and_wrong_without_relying_on_colour():
    figure = plot_prediction_grid([make_item(), make_item((50, 20, 3), is_right=False)])
    assert texts(figure.axes[0]) == ["✓ forest", "88% confident"]
    assert texts(figure.axes[1]) == ["✗ forest", "true: sea", "88% confident"]
    assert figure.axes[0].texts[0].get_color() != figure.axes[1].texts[0].get_color()
    draw(figure)


@pytest.mark.parametrize(("num_images", "columns"), [(1, 6), (7, 6), (24, 6), (5, 2)])
def test_prediction_grid_has_room_for_every_image(num_images, columns):
    figure = plot_prediction_grid([make_item()] * num_images, columns=columns)
    assert len(figure.axes) == num_images
    boxes = [axes.get_position() for axes in figure.axes]
    assert all(min(box.x0, box.y0) >= 0 and max(box.x1, box.y1) <= 1 for box in boxes)
    assert len({(round(box.x0, 3), round(box.y0, 3)) for box in boxes}) == num_images


def test_prediction_grid_refuses_no_image_and_images_of_another_kind():
    with pytest.raises(ValueError, match="no image"):
        plot_prediction_grid([])
    for shape in [(30, 40), (30, 40, 4), (0, 40, 3)]:
        with pytest.raises(ValueError, match="sample 5"):
            make_item(shape)


def test_centre_square_keeps_the_middle():
    image = np.zeros((4, 10, 3), dtype=np.uint8)
    image[:, 3:7] = 9
    assert (centre_square(image) == 9).all() and centre_square(image).shape == (4, 4, 3)
    assert centre_square(image.transpose(1, 0, 2)).min() == 9


def test_draw_is_the_same_whatever_order_ranks_delivered_the_samples():
    rng = np.random.default_rng(0)
    logits, labels, ids = rng.normal(size=(50, 4)), rng.integers(0, 4, 50), rng.permutation(1000)[:50]
    shuffle = rng.permutation(50)

    def read_image(sample_id):
        return np.full((3, 3, 3), sample_id % 256, np.uint8)

    names = ("a", "b", "c", "d")
    first = draw_predicted_images(Predictions(logits, labels, ids, names), read_image, 12, seed=3)
    second = draw_predicted_images(
        Predictions(logits[shuffle], labels[shuffle], ids[shuffle], names), read_image, 12, seed=3
    )
    shown = [item.sample_id for item in first]
    assert shown == [item.sample_id for item in second]
    assert len(set(shown)) == 12
    other = draw_predicted_images(Predictions(logits, labels, ids, names), read_image, 12, seed=4)
    assert shown != [item.sample_id for item in other]
    for item in first:
        row = ids.tolist().index(item.sample_id)
        assert item.image[0, 0, 0] == item.sample_id % 256
        assert item.predicted_name == names[logits[row].argmax()] and item.true_name == names[labels[row]]
        assert item.is_right == (item.predicted_name == item.true_name)
        assert item.confidence == pytest.approx(
            np.exp(logits[row]).max() / np.exp(logits[row]).sum(), rel=1e-4
        )


def test_plain_text_is_one_short_line_without_maths():
    assert plain_text("a\n b\x00") == "a b"
    assert plain_text("a long class name", 8) == "a long…"
    assert plain_text("$5") == r"\$5"
    assert plain_text(" ") == "(no name)"


def test_figures_leave_pyplot_alone():
    # In a process of its own: another test may have imported pyplot in this one.
    program = "import sys, evaluation.report.write; sys.exit('matplotlib.pyplot' in sys.modules)"
    root = Path(evaluation.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0
