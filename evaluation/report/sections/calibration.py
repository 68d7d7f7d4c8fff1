"""Whether the model's confidence can be believed."""

import html
from dataclasses import asdict

from evaluation.calibration import (
    NUM_BINS,
    Calibration,
    TemperatureScaling,
    cross_fit_temperature,
    measure_calibration,
)
from evaluation.plot_image import draw_plot, plot_html
from evaluation.report.calibration_plot import plot_calibration
from evaluation.report.section import ReportContent, Section
from evaluation.text import percent_text

ROWS = {
    "ece": "ECE (15 bins of equal width)",
    "adaptive_ece": "ECE (15 bins of equally many images)",
    "nll": "NLL (cross-entropy)",
    "brier": "Brier score (0 … 2)",
    "confidence": "Mean confidence",
    "top1": "Top-1",
}
SHARES = ("ece", "adaptive_ece", "confidence", "top1")


def build(content: ReportContent) -> Section | None:
    if content.predictions.num_classes < 2:
        return None  # one class is always certain
    before = measure_calibration(content.predictions)
    scaling = cross_fit_temperature(content.predictions, content.seed)
    measured = {"As it is": before}
    if scaling is not None:
        measured["With a temperature"] = scaling.after
    plot = draw_plot(
        "Top-1 accuracy against confidence, and how many images have which confidence",
        lambda width: plot_calibration(measured, width_inches=width),
    )
    figures = {"before": asdict(before), "num_bins": NUM_BINS}
    metrics = {"ece": before.ece, "nll": before.nll, "brier": before.brier}
    if scaling is not None:
        figures |= asdict(scaling)
        metrics |= {"temperature": scaling.temperature, "ece_after_temperature": scaling.after.ece}
        metrics |= {"nll_after_temperature": scaling.after.nll}
    return Section(
        "Confidence",
        f"{_confidence_sentence(before)} {_temperature_sentence(before, scaling)}",
        f'<div class="side-by-side">{plot_html(plot)}\n{_table(before, scaling)}</div>',
        files={"calibration.png": plot.wide_png},
        figures={"calibration": figures},
        metrics=metrics,
    )


def _confidence_sentence(before: Calibration) -> str:
    means = (
        f"The answers have a mean confidence of {percent_text(before.confidence)}, and "
        f"{percent_text(before.top1)} of them are right"
    )
    gap, error = before.overconfidence, before.overconfidence_error
    if abs(gap) <= error:
        return f"{means}: on the whole the model is neither too sure nor too unsure of itself."
    word = "overconfident" if gap > 0 else "underconfident"
    return f"{means}: the model is {word} by {_points(abs(gap))} (± {100 * error:.1f})."


def _temperature_sentence(before: Calibration, scaling: TemperatureScaling | None) -> str:
    if scaling is None:
        return "There are too few images to fit a temperature on one half and judge it on the other."
    how = f"Dividing the logits by a temperature of {scaling.temperature:.2f}"
    change = f"the expected calibration error from {_points(before.ece)} to {_points(scaling.after.ece)}"
    judged = "each half of the images judged with the temperature of the other"
    # By less than a fortieth of the NLL's own size nobody would notice it.
    if scaling.after.nll > before.nll - 0.0005:
        return f"{how} does not help ({change}; {judged})."
    return f"{how} changes {change}, without changing any answer ({judged})."


def _points(fraction: float) -> str:
    return f"{100 * fraction:.1f} points"


def _table(before: Calibration, scaling: TemperatureScaling | None) -> str:
    columns = [before] if scaling is None else [before, scaling.after]
    heads = ["As it is"] if scaling is None else ["As it is", f"T = {scaling.temperature:.2f}"]
    head = "".join(f'<th scope="col" class="number">{html.escape(text)}</th>' for text in heads)
    rows = []
    for key, name in ROWS.items():
        values = [getattr(column, key) for column in columns]
        texts = [percent_text(value) if key in SHARES else f"{value:.3f}" for value in values]
        cells = "".join(f'<td class="number">{text}</td>' for text in texts)
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    return (
        '<div class="card plain"><table><thead><tr><th></th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
