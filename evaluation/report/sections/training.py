"""Loss, accuracy and learning rate of the run over its epochs."""

from evaluation.plot_image import draw_plot, plot_html
from evaluation.report.plots import plot_training_curves
from evaluation.report.section import ReportContent, Section


def build(content: ReportContent) -> Section | None:
    try:
        plot = draw_plot(
            "Loss, accuracy and learning rate during training",
            lambda width: plot_training_curves(content.metrics_rows, width_inches=width),
        )
    except ValueError:  # no row has anything to draw: a run stopped before its first log line
        return None
    note = "As logged by the run. A pale line is what single rows say, the strong one their running mean."
    return Section("Training", note, plot_html(plot), files={"training_curves.png": plot.wide_png})
