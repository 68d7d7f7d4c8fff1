"""The page itself: which parts it has, and what happens when people touch them.

Example:
    >>> show(build_page(shelf, PageText(title="Scenes")), port=7860)
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import serve.page  # noqa: F401  # before Gradio, which reads what it sets

# isort: split
import gradio as gr
from gradio import processing_utils

from serve.page import parts
from serve.page.classifying import as_csv, classify_many, classify_one, explain
from serve.page.models import Shelf, ShownModel
from serve.page.settings import MAX_FILES, MAX_UPLOAD_BYTES
from serve.page.snippets import curl_snippet, python_snippet
from serve.page.theme import CSS, HEAD, build_theme
from serve.portable.limits import BadImage

WAITING = "Drop an image, paste one, or take a photograph: its classes appear here."
WAITING_MANY = "Choose many files: each gets a line here, and what cannot be used is named."


async def _fetch_nothing(url: str, *_: Any) -> Any:
    """In place of Gradio's: who calls the API could name an address, and this machine would load it whole."""
    raise gr.Error("Send the file itself: this page fetches nothing.", print_exception=False)


processing_utils.async_ssrf_protected_get = _fetch_nothing


@dataclass(frozen=True)
class PageText:
    """What the page is called, and a sentence below."""

    title: str = "Image classifier"
    sentence: str = (
        "Show it a picture, and see what the model takes it for, how sure it is, and what it looked at."
    )


def _photo(**options: Any) -> gr.Image:
    """An image that comes as the path of the uploaded file: Gradio would turn, convert or refuse it."""

    def read(payload: Any) -> Any:
        return None if payload is None else payload.path

    photo = gr.Image(type="filepath", **options)
    # Not a subclass: Gradio writes a .pyi beside the file of each one.
    photo.preprocess = read  # type: ignore[method-assign]
    return photo


def _files(**options: Any) -> gr.File:
    """Files that come as [(the name they had, where they are now)]."""

    def read(payload: Any) -> Any:
        files = [] if payload is None else getattr(payload, "root", payload)
        files = files if isinstance(files, list) else [files]
        return [(file.orig_name or Path(file.path).name, file.path) for file in files]

    component = gr.File(**options)
    component.preprocess = read  # type: ignore[method-assign]
    return component


def build_page(shelf: Shelf, text: PageText | None = None, examples: Sequence[Path] = ()) -> gr.Blocks:
    """The page for the models of a shelf; `show` puts it on the web.

    Args:
        examples: image files that visitors can try.
    """
    text = text or PageText()
    # Uploads are gone after an hour.
    with gr.Blocks(title=text.title, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(parts.header(text.title, text.sentence), padding=False)
        model = gr.Dropdown(
            shelf.choices, value=shelf.names[0], label="Model", visible=len(shelf.names) > 1, elem_id="model"
        )
        with gr.Tabs():
            with gr.Tab("One image"):
                photo = _one_image(shelf, model, examples)
            with gr.Tab("Many images"):
                _many_images(shelf, model)
            with gr.Tab("API"):
                _programs(page, shelf, model, photo)
            with gr.Tab("Model"):
                about = gr.HTML(container=True, elem_id="facts")
        for event in (page.load, model.change):
            event(lambda name: _facts(shelf, name), model, about, api_visibility="private")
    return page


def _one_image(shelf: Shelf, model: gr.Dropdown, examples: Sequence[Path]) -> gr.Image:
    with gr.Row(equal_height=False, elem_classes="one"):
        with gr.Column():
            photo = _photo(
                sources=["upload", "clipboard", "webcam"],
                label="Image",
                height=340,
                elem_id="photo",
            )
            if examples:
                gr.Examples(
                    [[str(path)] for path in examples],
                    photo,
                    label="Examples",
                    examples_per_page=12,
                    elem_id="examples",
                )
        with gr.Column():
            answer = gr.HTML(parts.hint(WAITING), container=True, elem_id="answer")
            seen = gr.Image(
                label="What the model looked at",
                interactive=False,
                visible=False,
                height=340,
                buttons=["fullscreen"],
                elem_id="seen",
            )
            asked = gr.Radio([], label="What speaks for", visible=False, elem_id="asked")

    def answer_photo(path: str | None, name: str) -> tuple[Any, Any, Any]:
        nothing = gr.Image(visible=False), gr.Radio([], visible=False)
        if path is None:
            return parts.hint(WAITING), *nothing
        try:
            shown = shelf.open(name)
            found = classify_one(shown, Path(path).read_bytes())
        except (ValueError, RuntimeError, OSError) as error:  # BadImage is a ValueError
            return parts.problem(_sentence(error)), *nothing
        choices = list(zip(found.names, found.labels, strict=True))
        return (
            parts.bars(found.names, found.probabilities),
            gr.Image(explain(shown, found, found.labels[0]), visible=True, label=_seen_label(shown)),
            gr.Radio(choices, value=found.labels[0], visible=shown.heat is not None),
        )

    def explain_another(path: str | None, name: str, label: int | None) -> Any:
        if path is None or label is None:
            return gr.skip()
        try:
            shown = shelf.open(name)
            return explain(shown, classify_one(shown, Path(path).read_bytes()), label)
        except (ValueError, RuntimeError, OSError):  # told when it was classified
            return gr.skip()

    for event in (photo.change, model.change):
        event(
            answer_photo,
            [photo, model],
            [answer, seen, asked],
            api_visibility="private",
            show_progress_on=[answer],
            trigger_mode="always_last",
        )
    asked.input(explain_another, [photo, model, asked], seen, api_visibility="private")
    return photo


def _many_images(shelf: Shelf, model: gr.Dropdown) -> None:
    files = _files(file_count="multiple", label="Images", height=180, elem_id="files")
    table = gr.HTML(parts.hint(WAITING_MANY), container=True, elem_id="table")
    download = gr.DownloadButton("Download as CSV", visible=False, variant="primary", elem_id="csv")

    def answer_files(
        chosen: list[tuple[str, str]],
        name: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  # Gradio looks for it there
    ) -> tuple[Any, Any]:
        hidden = gr.DownloadButton(visible=False)
        if not chosen:
            return parts.hint(WAITING_MANY), hidden
        if len(chosen) > MAX_FILES:
            return parts.problem(
                f"These are {len(chosen)} files: choose at most {MAX_FILES} at once."
            ), hidden
        try:
            rows = classify_many(
                shelf.open(name),
                [(shown, Path(path)) for shown, path in chosen],
                lambda done, total: progress((done, total), unit="files"),
            )
        except (ValueError, RuntimeError, OSError) as error:
            return parts.problem(_sentence(error)), hidden
        folder = Path(tempfile.mkdtemp(dir=_upload_folder()))
        path = folder / "predictions.csv"
        path.write_text(as_csv(rows), encoding="utf-8")
        download.temp_files.add(str(path))  # goes when uploads go
        return parts.table(rows), gr.DownloadButton(value=str(path), visible=True)

    for event in (files.change, model.change):
        event(
            answer_files,
            [files, model],
            [table, download],
            api_visibility="private",
            show_progress_on=[table],
            trigger_mode="always_last",
        )


def _programs(page: gr.Blocks, shelf: Shelf, model: gr.Dropdown, photo: gr.Image) -> None:
    gr.HTML(parts.hint("The same model from other programs; photo.jpg is any image of yours."), padding=False)
    curl = gr.Code(language="shell", label="curl", interactive=False, elem_id="curl")
    python = gr.Code(language="python", label="Python", interactive=False, elem_id="python")

    def snippets(name: str, request: gr.Request) -> tuple[str, str]:
        url = _address(request)
        return curl_snippet(url, name), python_snippet(url, name)

    for event in (page.load, model.change):
        event(snippets, model, [curl, python], api_visibility="private")

    def classify(image: str | None, model: str) -> dict[str, Any]:
        """The five most probable classes of an image: {"top": [{"label", "name", "probability"}, …]}."""
        if image is None:
            raise gr.Error("No image was sent.", print_exception=False)
        try:
            return shelf.open(model).classifier.classify([Path(image).read_bytes()])[0].as_dict()
        except (ValueError, RuntimeError, OSError) as error:
            raise gr.Error(_sentence(error), print_exception=False) from None

    # Nobody presses it: it is what programs call.
    gr.Button(visible=False).click(classify, [photo, model], gr.JSON(visible=False), api_name="classify")


def _address(request: gr.Request) -> str:
    """Of the page, as the visitor's browser names it; behind a proxy, too."""
    headers: Any = request.headers
    path = urlsplit(headers.get("referer", "")).path.rstrip("/")  # of a page that is not at the root
    scheme = headers.get("x-forwarded-proto", urlsplit(str(request.url)).scheme).split(",")[0].strip()
    host = headers.get("x-forwarded-host", headers.get("host", "localhost"))
    return f"{scheme}://{host}{path}"


def _facts(shelf: Shelf, name: str) -> str:
    try:
        return parts.facts(shelf.open(name).facts)
    except (ValueError, RuntimeError, OSError) as error:
        return parts.problem(_sentence(error))


def _seen_label(model: ShownModel) -> str:
    return "What the model looked at" if model.heat is not None else "What the model sees"


def _sentence(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    if isinstance(error, BadImage):
        return text
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


def _upload_folder() -> str:
    folder = os.environ.get("GRADIO_TEMP_DIR") or str(Path(tempfile.gettempdir()) / "gradio")
    Path(folder).mkdir(parents=True, exist_ok=True)
    return folder


def show(page: gr.Blocks, **options: Any) -> tuple[Any, str, str | None]:
    """Serve the page with the project's look and without whatever would ask others for something.

    Args:
        options: of `gr.Blocks.launch`, such as server_name, server_port, share.

    Returns:
        The application, its address, and that of Gradio's tunnel, where it was asked for.
    """
    return page.launch(
        theme=build_theme(),
        css=CSS,
        head=HEAD,
        max_file_size=MAX_UPLOAD_BYTES,
        footer_links=[],
        enable_monitoring=False,
        pwa=False,
        ssr_mode=False,
        **options,
    )
