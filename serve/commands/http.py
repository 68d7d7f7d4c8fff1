"""An endpoint: POST an image, get its classes.

python -m serve http exported/mine --port 8000
curl --data-binary @photo.jpg http://127.0.0.1:8000/predict
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="made by: python -m serve export RUN --format onnx")
    parser.add_argument("--form", choices=["onnx", "int8"], default="onnx")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: everybody who reaches this machine")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument(
        "--api-key-file", type=Path, help="a key a line; without it, the environment's SERVE_API_KEY"
    )
    parser.add_argument("--max-batch", type=int, default=32, help="images in one computation")
    parser.add_argument(
        "--max-wait-ms", type=float, default=5.0, help="for others that are on their way; 0: none"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads that decode")
    parser.add_argument("--threads", type=int, default=0, help="of onnxruntime; 0: as many as cores")
    parser.add_argument("--max-queue", type=int, default=256, help="images waiting; beyond it: 503")
    parser.add_argument("--max-bytes", type=int, default=20 << 20, help="of an image")
    parser.add_argument("--max-pixels", type=int, default=50_000_000, help="of an image; some 12 bytes each")
    parser.add_argument(
        "--formats",
        nargs="+",
        default=["JPEG", "PNG", "WEBP", "GIF", "BMP"],
        choices=["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"],
    )
    parser.add_argument("--max-files", type=int, default=32, help="in one request")
    parser.add_argument("--max-request-bytes", type=int, default=80 << 20, help="of a request")
    parser.add_argument(
        "--max-buffered-bytes", type=int, default=256 << 20, help="of all requests; beyond it: 503"
    )
    parser.add_argument("--max-connections", type=int, default=512, help="beyond it: 503")
    parser.add_argument("--header-seconds", type=float, default=10.0, help="to send a request's headers")
    parser.add_argument("--body-seconds", type=float, default=30.0, help="to send its body")
    parser.add_argument("--answer-seconds", type=float, default=30.0, help="to compute the answer")
    parser.add_argument("--write-seconds", type=float, default=10.0, help="to take the answer")
    parser.add_argument("--keep-alive-seconds", type=int, default=15, help="idle connections stay open")
    parser.add_argument("--grace-seconds", type=int, default=30, help="after SIGTERM, for requests in flight")


def run(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl+C."""
    folder: Path = options.folder
    export = f"python -m serve export {folder} --format onnx --out exported/{folder.resolve().name or 'mine'}"
    if not folder.exists():
        raise ValueError(f"{folder} does not exist: name a folder that python -m serve export has made")
    if not (folder / "preprocessing.json").is_file():
        raise ValueError(f"{folder} is no exported model: run {export}, and serve that folder")
    try:
        from serve.http.keys import ApiKeys
        from serve.http.server import serve
        from serve.http.settings import Settings
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'imagenet-sprint[serve]'") from None
    given = {name: value for name, value in vars(options).items() if name in Settings.__dataclass_fields__}
    settings = Settings(**{**given, "formats": tuple(options.formats)})
    keys = ApiKeys.load(options.api_key_file)
    return serve(folder, options.form, options.host, options.port, settings, keys)
