"""The files of a Space that are text: app.py, requirements.txt, README.md with its front matter."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from pathlib import Path

from serve.model_folder import CARD_NAME
from serve.portable.model_info import ModelInfo

NEEDED = ("gradio", "numpy", "onnxruntime", "pillow")
APP = '''\
"""A page to try an image classifier on. python app.py"""

from __future__ import annotations

from pathlib import Path

from serve.page.layout import PageText, build_page, show
from serve.page.models import Entry, Shelf
from serve.page.onnx_model import open_onnx
from serve.page.settings import LIMITS

HERE = Path(__file__).resolve().parent
TITLE = {title}
SENTENCE = {sentence}

shelf = Shelf([Entry(TITLE, lambda: open_onnx(HERE / "model", LIMITS))])
shelf.open(None)
page = build_page(shelf, PageText(TITLE, SENTENCE), sorted((HERE / "examples").glob("[!.]*")))

if __name__ == "__main__":
    show(page)
'''
README = """\
# {title}

{sentence}

```bash
pip install -r requirements.txt
python app.py        # http://127.0.0.1:7860
```

`model/` holds the network as ONNX with its preprocessing and classes; `serve/` is the code of the page and
of the preprocessing, which is the training's own. Neither PyTorch nor a GPU is needed.
"""


def app_text(title: str, sentence: str) -> str:
    return APP.format(
        title=json.dumps(title, ensure_ascii=False), sentence=json.dumps(sentence, ensure_ascii=False)
    )


def requirements_text() -> str:
    """What `app.py` imports, in the versions it is known to work with: those of this environment.

    Raises:
        ValueError: one is not installed here.
    """
    lines = []
    for name in NEEDED:
        try:
            lines.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(f"{name} is not installed: pip install 'imagenet-sprint[serve]'") from None
    return "\n".join(lines) + "\n"


def readme_text(info: ModelInfo, title: str, sentence: str, licence: str | None, card: str) -> str:
    """The page about the Space, with what the Hub reads of it at its beginning.

    Args:
        card: the model's card, without front matter; it follows below a rule. "": none.
    """
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    front = {
        "title": title,
        "emoji": "🖼️",
        "colorFrom": "blue",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": importlib.metadata.version("gradio"),
        "python_version": python,
        "app_file": "app.py",
        "short_description": f"Image classifier with {len(info.names)} classes"[:60],
        "tags": ["image-classification"],
    }
    if licence:
        front["license"] = licence
    # JSON is YAML: nothing in a title can end the block or begin another key.
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in front.items()]
    body = README.format(title=title, sentence=sentence)
    return "\n".join(["---", *lines, "---", "", body]) + (f"\n---\n\n{card}" if card else "")


def card_of(folder: Path) -> str:
    """The card in an exported folder, without front matter, its headings a level lower; "" if none."""
    path = folder / CARD_NAME
    if not path.is_file():
        return ""
    text = re.sub(r"\A---\n.*?\n---\n", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"^#", "##", text.strip(), flags=re.MULTILINE) + "\n"
