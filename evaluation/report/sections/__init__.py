"""The sections of the report, in the page's order; each `build` gives None where there is nothing to say."""

from collections.abc import Callable

from evaluation.report.section import ReportContent, Section
from evaluation.report.sections import (
    calibration,
    confusion,
    details,
    mistakes,
    per_class,
    predictions,
    properties,
    training,
)

BUILDERS: tuple[Callable[[ReportContent], Section | None], ...] = (
    training.build,
    confusion.build,
    per_class.build,
    calibration.build,
    mistakes.build,
    properties.build,
    predictions.build,
)
# After the sections that a command adds of its own.
LAST_BUILDERS: tuple[Callable[[ReportContent], Section | None], ...] = (details.build,)
