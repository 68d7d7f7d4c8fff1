"""Images drawn at random, with what the model said about them."""

import html

from evaluation.plot_style import png_bytes
from evaluation.report.prediction_grid import PredictedImage, draw_predicted_images, plot_prediction_grid
from evaluation.report.section import ReportContent, Section, thumbnail_uri
from evaluation.text import count_text, percent_text


def build(content: ReportContent) -> Section | None:
    images = draw_predicted_images(
        content.predictions, content.read_image, content.num_grid_images, content.seed, content.sample_key
    )
    if not images:
        return None
    num_right = sum(item.is_right for item in images)
    num_images = count_text(len(images), "image")
    return Section(
        "Predictions",
        f"{num_images} drawn at random (seed {content.seed}), {num_right} of them right.",
        image_grid_html(images),
        files={"prediction_grid.png": png_bytes(plot_prediction_grid(images))},
    )


def image_grid_html(images: list[PredictedImage]) -> str:
    """Images as cards: the model's answer first, then the truth where that is another."""
    cards = "\n".join(map(_image_card, images))
    return f'<div class="grid">\n{cards}\n</div>'


def _image_card(item: PredictedImage) -> str:
    predicted, true = html.escape(item.predicted_name), html.escape(item.true_name)
    verdict, symbol = ("right", "✓") if item.is_right else ("wrong", "✗")
    share = "" if item.true_confidence is None else f" ({percent_text(item.true_confidence, 0)})"
    truth = "" if item.is_right else f'<span class="truth">true: {true}{share}</span>'
    title = html.escape(f"sample {item.sample_id}" + (f": {item.source}" if item.source else ""))
    return (
        f'<figure class="{verdict}"><img alt="An image of {true}" title="{title}" '
        f'src="{thumbnail_uri(item.image)}"><figcaption><b>{symbol} {predicted}</b>{truth}'
        f"<span>{percent_text(item.confidence, 0)} confident</span></figcaption></figure>"
    )
