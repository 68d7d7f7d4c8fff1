"""Command line of serving: arguments only. A command is a module of `serve/commands/`, imported when asked.

python -m serve export runs/mine --format safetensors onnx --out exported/mine
python -m serve predict runs/mine photos/ --top 3
python -m serve download s3://bucket/runs/mine --out runs/mine
python -m serve register runs/mine --name scenes --alias best
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

COMMANDS = {
    "export": "a run or checkpoint as safetensors, ONNX, TorchScript or pt2, with its card",
    "predict": "the most probable classes of image files",
    "download": "a run from MLflow, S3 or another folder, with checksums",
    "register": "a run in MLflow's model registry",
    "http": "an endpoint: POST an image, get its classes",
    "demo": "a web page to try models on",
    "space": "a Hugging Face Space, complete",
}


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m serve", description=__doc__.splitlines()[0].split(":")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in words if word in COMMANDS), None)
    module = None
    for name, summary in COMMANDS.items():
        # Only the command that is asked for is imported: others may lack their packages.
        command = commands.add_parser(name, help=summary, description=summary)
        if name == asked:
            module = importlib.import_module(f"serve.commands.{name}")
            module.add_arguments(command)
    options = parser.parse_args(words)
    assert module is not None
    try:
        return module.run(options)
    except BrokenPipeError:
        raise  # of `| head`, see below
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
