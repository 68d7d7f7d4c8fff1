"""What was evaluated, and how."""

import html

from evaluation.report.section import ReportContent, Section


def build(content: ReportContent) -> Section | None:
    if not content.details:
        return None
    rows = "\n".join(
        f"<div><dt>{html.escape(str(key))}</dt><dd>{html.escape(str(value))}</dd></div>"
        for key, value in content.details.items()
    )
    body = f'<dl class="card details">\n{rows}\n</dl>'
    return Section("Details", "", body, figures={"details": dict(content.details)})
