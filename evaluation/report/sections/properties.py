"""Accuracy against what the images are like."""

from dataclasses import asdict

import numpy as np

from evaluation.image_properties import PropertyGroup, accuracy_by_group, difference_p_value
from evaluation.plot_image import draw_plot, plot_html
from evaluation.report.properties_plot import PropertyPanel, plot_properties
from evaluation.report.section import ReportContent, Section
from evaluation.text import percent_text

# Name → word, title, how a value is written.
PROPERTIES = {
    "size": ("size", "Size: √(width × height), px", lambda v: f"{v:.0f}"),
    "aspect_ratio": ("shape", "Shape: width / height", lambda v: f"{v:.2f}"),
    "brightness": ("brightness", "Brightness (mean, 0 … 1)", lambda v: f"{v:.2f}"),
    "contrast": ("contrast", "Contrast (standard deviation)", lambda v: f"{v:.2f}"),
    "bytes_per_pixel": ("detail", "Detail: JPEG bytes a pixel", lambda v: f"{v:.2f}"),
}
SIGNIFICANCE = 0.05  # of all properties together


def build(content: ReportContent) -> Section | None:
    properties = content.properties
    if properties is None or not len(properties.sample_ids):
        return None
    predictions = content.predictions
    by_id = np.argsort(predictions.sample_ids)
    places = by_id[np.searchsorted(predictions.sample_ids[by_id], properties.sample_ids)]
    is_right = predictions.label_ranks[places] == 0
    class_top1 = np.array([row.top1 or 0.0 for row in content.results.table])
    expected = class_top1[predictions.labels[places]]
    groups = {name: accuracy_by_group(properties.values[name], is_right, expected) for name in PROPERTIES}
    panels = {
        name: PropertyPanel(PROPERTIES[name][1], found, PROPERTIES[name][2])
        for name, found in groups.items()
        if len(found) > 1
    }
    num_images = len(properties.sample_ids)
    figures = {
        "num_images": num_images,
        "groups": {name: [asdict(group) for group in found] for name, found in groups.items()},
        "p_values": {name: difference_p_value(found) for name, found in groups.items()},
    }
    sampled = ""
    if num_images < properties.num_in_split:
        sampled = f" Measured on {num_images:,} images drawn at random."
    note = f"{_sentence(groups)}{sampled}"
    if not panels:
        return Section("Accuracy and the images", note, "", figures={"image_properties": figures})
    plot = draw_plot(
        "Top-1 accuracy in groups of images by size, shape, brightness, contrast and detail",
        lambda width: plot_properties(panels, width_inches=width),
    )
    return Section(
        "Accuracy and the images",
        note,
        plot_html(plot),
        files={"image_properties.png": plot.wide_png},
        figures={"image_properties": figures},
    )


def _sentence(groups: dict[str, list[PropertyGroup]]) -> str:
    alike = [PROPERTIES[name][0] for name, found in groups.items() if len(found) == 1]
    parts = []
    # Bonferroni: of five properties one would differ by chance in every fourth report.
    p_values = {name: difference_p_value(found) * len(groups) for name, found in groups.items()}
    told = [
        name for name in sorted(p_values, key=lambda name: p_values[name]) if p_values[name] < SIGNIFICANCE
    ]
    for name in told[:2]:
        top1 = [group.top1 for group in groups[name]]
        parts.append(
            f"Top-1 differs with {PROPERTIES[name][0]}: from {percent_text(min(top1))} to "
            f"{percent_text(max(top1))}."
        )
    if told:
        parts.append(
            "Classes differ in their images, too: a ring is what the classes of a group alone would give, so "
            "only what lies beside its ring is the image's own doing."
        )
    else:
        parts.append("No property goes with a difference in accuracy that this many images could show.")
    if alike:
        parts.append(f"In {' and '.join(alike)} the images are alike, or too few to part.")
    return " ".join(parts)
