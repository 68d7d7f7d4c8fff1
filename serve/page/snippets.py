"""How programs use a running page: commands that work as they stand, but for the name of the photograph."""

from __future__ import annotations

import json
import shlex

CURL = """\
URL={url}/gradio_api
FILE=$(curl -sf -F files=@photo.jpg $URL/upload | cut -d'"' -f2)
EVENT=$(curl -sf $URL/call/classify -H 'Content-Type: application/json' \\
  -d '{{"data": [{{"path": "'$FILE'", "meta": {{"_type": "gradio.FileData"}}}}, {model}]}}' | cut -d'"' -f4)
curl -sfN $URL/call/classify/$EVENT
"""
PYTHON = """\
from gradio_client import Client, handle_file  # pip install gradio_client

client = Client({url})
answer = client.predict(handle_file("photo.jpg"), {model}, api_name="/classify")
for entry in answer["top"]:
    print(f"{{entry['probability']:.1%}} {{entry['name']}}")
"""


def curl_snippet(url: str, model: str) -> str:
    """For a shell. `url` without a slash at its end."""
    return CURL.format(url=shlex.quote(url), model=json.dumps(model).replace("'", "'\\''"))


def python_snippet(url: str, model: str) -> str:
    """For Python with `gradio_client`."""
    return PYTHON.format(url=json.dumps(url), model=json.dumps(model, ensure_ascii=False))
