"""The transcripts of docs/cloud.md and README.md: what the story's commands said, with plain paths.

CLOUD_TRANSCRIPT=1 pytest tests/integration/infra/test_story.py
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.conftest import ROOT
from tests.integration.infra.local_cloud import LocalCloud

PAGE, FRONT = ROOT / "docs" / "cloud.md", ROOT / "README.md"
BEGIN, END = "<!-- transcript: begin -->", "<!-- transcript: end -->"
SHOWN = ("up", "status", "pull", "down")
FAMILIAR: dict[str, str] = {
    " --ranks-per-node 1": "",
    " --offline": "",
    " --yes": "",
}
MOST_LINES = 4  # of resources that Terraform made, one after the other


def write_transcript(cloud: LocalCloud, familiar: dict[str, str]) -> None:
    """Put what was said between the two marks of each page."""
    spoken = [(words, said) for words, said in cloud.spoken if words.split()[0] in SHOWN]
    spoken = [(words, said) for words, said in spoken if "--json" not in words]
    blocks = []
    for words, said in spoken:
        text = f"$ python -m infra {words}\n{said.out.rstrip()}"
        for ours, plain in {f"{cloud.folder}/": "", **familiar}.items():
            text = text.replace(ours, plain)
        blocks.append(_shortened(text))
    _put(PAGE, blocks)
    ended = next(number for number, block in enumerate(blocks) if ": finished" in block)
    _put(
        FRONT,
        [blocks[0], blocks[ended], next(block for block in blocks[ended:] if "infra down" in block[:40])],
    )


def _put(path: Path, blocks: list[str]) -> None:
    page = path.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    body = "\n\n".join(blocks)
    path.write_text(f"{before}{BEGIN}\n```\n{body}\n```\n{END}{after}", encoding="utf-8")


def _shortened(text: str) -> str:
    lines: list[str] = []
    run: list[str] = []
    for line in [*text.splitlines(), ""]:
        if re.match(r"  (made|removed|changed) ", line):
            run.append(line)
            continue
        if len(run) > MOST_LINES:
            run = [*run[: MOST_LINES - 1], f"  … {len(run) - MOST_LINES + 1} more"]
        lines += run
        run = []
        lines.append(line)
    return "\n".join(lines).rstrip()
