"""The mistakes that the model is surest of, as images: where it is blind, or a label is wrong."""

import html

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics import Predictions, distinct_names, log_softmax
from evaluation.plot_style import png_bytes
from evaluation.report.prediction_grid import PredictedImage, plot_prediction_grid, predicted_image
from evaluation.report.section import ReportContent, Section
from evaluation.report.sections.predictions import image_grid_html
from evaluation.text import count_text

NUM_SUREST = 12
NUM_LEAST_TRUE = 6


def build(content: ReportContent) -> Section | None:
    if not content.num_grid_images:
        return None
    predictions = content.predictions
    surest, least_true = rank_mistakes(predictions)
    if not len(surest):
        return None
    shown = surest[:NUM_SUREST]
    others = least_true[~np.isin(least_true, shown)][:NUM_LEAST_TRUE]
    names = distinct_names(content.class_names)
    images = [_image(content, row, names) for row in shown.tolist()]
    more = [_image(content, row, names) for row in others.tolist()]
    body = image_grid_html(images)
    if more:
        heading = "The truth was given least probability in these"
        body += f"\n<h3>{html.escape(heading)}</h3>\n{image_grid_html(more)}"
    num_wrong = count_text(len(surest), "image")
    return Section(
        "Most confident mistakes",
        f"Of {num_wrong} that the model gets wrong, those it is surest of. Where you would agree with the "
        "model, the label may be wrong: python -m evaluation audit looks for such labels in all images.",
        body,
        files={"confident_mistakes.png": png_bytes(plot_prediction_grid(images))},
        figures={
            "most_confident_mistakes": [_figures(item) for item in images],
            "least_probable_truths": [_figures(item) for item in more],
        },
    )


def rank_mistakes(predictions: Predictions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of wrong predictions, twice, int64 (wrong,): by confidence, highest first; by the probability of
    the truth, lowest first. Equal ones by sample id.
    """
    wrong = np.flatnonzero(predictions.label_ranks > 0)
    log_p = log_softmax(predictions.logits[wrong])
    ids = predictions.sample_ids[wrong]
    confidence = log_p.max(axis=1)
    truth = np.take_along_axis(log_p, predictions.labels[wrong, None], axis=1)[:, 0]
    return wrong[np.lexsort((ids, -confidence))], wrong[np.lexsort((ids, truth))]


def _image(content: ReportContent, row: int, names: list[str]) -> PredictedImage:
    return predicted_image(content.predictions, row, content.read_image, names, content.sample_key)


def _figures(item: PredictedImage) -> dict[str, object]:
    return {
        "sample_id": item.sample_id,
        "source": item.source,
        "true": item.true_name,
        "predicted": item.predicted_name,
        "confidence": item.confidence,
        "true_confidence": item.true_confidence,
    }
