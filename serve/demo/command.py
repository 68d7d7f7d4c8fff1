"""From the command line's words to a running page."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import tempfile
from pathlib import Path

from serve.demo.entries import entries_of_paths
from serve.demo.examples import example_files, examples_of_data
from serve.demo.mlflow_entries import entries_of_experiment
from serve.demo.torch_model import data_of
from serve.page.models import Shelf
from serve.page.settings import LIMITS


def serve_demo(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM. Raises ValueError or RuntimeError: one sentence on what to change."""
    if not options.models and not options.mlflow:
        raise ValueError("name a run, a checkpoint or an exported folder, or --mlflow mlflow:EXPERIMENT")
    if options.keep < 1:
        raise ValueError("--keep must be at least 1")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    with tempfile.TemporaryDirectory(prefix="serve-demo-") as name:
        # What visitors upload lies in a folder that only this user may read, and is gone with the demo.
        # It is one of its own, as Gradio hands out whatever is in it.
        uploads, models, examples = (Path(name) / part for part in ("uploads", "models", "examples"))
        for folder in (uploads, models, examples):
            folder.mkdir()
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)
        try:
            from serve.page.layout import PageText, build_page, show
        except ImportError as error:
            raise RuntimeError(
                f"the demo needs Gradio ({error}): pip install 'imagenet-sprint[serve]'"
            ) from None
        entries = entries_of_paths(options.models, LIMITS) if options.models else []
        if options.mlflow:
            taken = [entry.name for entry in entries]
            entries += entries_of_experiment(options.mlflow, options.tracking_uri, LIMITS, models, taken)
        shelf = Shelf(entries, keep=options.keep)
        shelf.open(None)  # what cannot be read is said here, not to the first visitor
        page = build_page(shelf, PageText(title=options.title), _examples(options, examples))
        port = options.port or _free_port(options.host)
        try:
            _, url, public = show(
                page,
                server_name=options.host,
                server_port=port,
                share=options.share == "yes",
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError:
            raise RuntimeError(f"port {port} of {options.host} is taken or not allowed: --port 0") from None
        names = f"{len(shelf.names)} models" if len(shelf.names) > 1 else shelf.names[0]
        print(f"{names} on {url}", flush=True)
        if public:
            print(f"for everybody who has this link: {public}", flush=True)
        elif options.share == "yes":
            print("Gradio's tunnel could not be opened: the demo is here only", flush=True)
        _wait_for_end()
        page.close(verbose=False)
    return 0


def _examples(options: argparse.Namespace, scratch: Path) -> list[Path]:
    if options.examples:
        return example_files(options.examples)
    data = data_of(options.models[0]) if options.models else None
    return examples_of_data(data, scratch) if data else []


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as server:
        return int(server.getsockname()[1])


def _wait_for_end() -> None:
    """Until SIGTERM or SIGINT, both of which are an ordinary end of a demo."""
    try:
        while True:
            signal.pause()
    except KeyboardInterrupt:
        return


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt
