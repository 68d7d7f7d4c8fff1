"""Command line of the cloud: arguments only.

python -m infra plan configs/imagenet_resnet50_16.yaml             # what it would take, on which machines
python -m infra prepare s3://my-bucket/images --to mine --max-usd 5 --max-hours 6
python -m infra up configs/imagenet_resnet50_16.yaml --data s3://… --max-usd 50 --max-hours 20
python -m infra status                                             # how far, how dear, why it waits
python -m infra logs -f
python -m infra ui                                                 # MLflow, filled live
python -m infra pull                                               # best checkpoint and report
python -m infra down                                               # fetch, remove the instances
python -m infra down --everything                                  # the bucket, too
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from infra.console import Console
from infra.errors import UserError

COMMANDS = {
    "plan": "what a recipe would take on each kind of machine: hours, dollars, the bottleneck",
    "up": "train a recipe in the cloud, for no more than you say",
    "status": "how far it is, what it has cost, why it waits, what still costs money",
    "logs": "what the instances say",
    "ui": "MLflow on this machine, filled live",
    "pull": "fetch the best checkpoint and the report",
    "down": "fetch, then remove the instances; --everything for the bucket, too",
    "prepare": "prepare a data set in the cloud",
}


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    top = argparse.ArgumentParser(
        prog="python -m infra",
        description="the cloud: from a recipe to a trained model, for a known price",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:8} {summary}" for name, summary in COMMANDS.items()),
    )
    top.add_argument(
        "command", choices=COMMANDS, metavar="COMMAND", help="see below; COMMAND --help for more"
    )
    name = top.parse_args(words[:1]).command
    parser = command_line(name)
    own, rest = _split(words[1:])
    options = parser.parse_intermixed_args(own)  # overrides may stand anywhere
    options.command, options.rest = name, rest
    if rest and name != "prepare":
        parser.error(f"{name} takes nothing after --: {' '.join(rest)}")
    console = Console(options.json, getattr(options, "yes", False))
    try:
        return int(module(name).run(options, console))
    except (UserError, ValueError, RuntimeError, OSError) as error:
        return _fail(console, str(error) or type(error).__name__)
    except KeyboardInterrupt:
        from infra.remains import what_remains

        print(f"\ninterrupted. {what_remains(options)}", file=sys.stderr)
        return 130


def command_line(name: str) -> argparse.ArgumentParser:
    """Of one command."""
    parser = argparse.ArgumentParser(prog=f"python -m infra {name}", description=COMMANDS[name])
    module(name).add_arguments(parser)
    _add_common(parser)
    return parser


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Before and after `--`."""
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


def module(name: str) -> Any:
    return importlib.import_module(f"infra.commands.{name}")


def _add_common(parser: argparse.ArgumentParser) -> None:
    known = {word for action in parser._actions for word in action.option_strings}
    for words, details in (
        (["--json"], {"action": "store_true", "help": "the result as JSON on stdout"}),
        (["--region"], {"help": "AWS region (default: yours)"}),
        (["--bucket"], {"help": "name of the bucket, where it is made (default: sprint-ACCOUNT-REGION)"}),
        (["--state-dir"], {"type": Path, "default": Path(".infra"), "help": "default: .infra"}),
    ):
        if words[0] not in known:
            parser.add_argument(*words, **details)


def _fail(console: Console, sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    if console.as_json:
        print(json.dumps({"error": sentence}))
    return 1


if __name__ == "__main__":
    sys.exit(main())
