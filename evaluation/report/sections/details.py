"""What was evaluated, and how."""

from data_prep.page import details
from evaluation.report.section import ReportContent, Section


def build(content: ReportContent) -> Section | None:
    if not content.details:
        return None
    body = details([(str(key), str(value)) for key, value in content.details.items()])
    return Section("Details", "", body, figures={"details": dict(content.details)})
