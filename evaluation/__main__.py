"""Command line of the evaluation: arguments only.

python -m evaluation runs/demo --data data/intel                 # short for: report runs/demo …
python -m evaluation COMMAND --help
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

# Command → the module that has its DESCRIPTION, add_arguments(parser) and run(options); imported when asked
# for, so that the lack of an optional package costs only its own command.
COMMANDS = {
    "report": "evaluation.report.command",
}
DEFAULT_COMMAND = "report"


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_help()
        return 0 if arguments else 2
    is_named = arguments[0] in COMMANDS
    name = arguments[0] if is_named else DEFAULT_COMMAND
    command = importlib.import_module(COMMANDS[name])
    parser = argparse.ArgumentParser(prog=f"python -m evaluation {name}", description=command.DESCRIPTION)
    command.add_arguments(parser)
    options = parser.parse_args(arguments[1:] if is_named else arguments)
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("the evaluation runs in one process: start it without torchrun")
        return int(command.run(options))
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or 'file system'}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _print_help() -> None:
    print("usage: python -m evaluation COMMAND …   (without a command: report)\n")
    for name, module in COMMANDS.items():
        print(f"  {name:<10} {importlib.import_module(module).DESCRIPTION}")
    print("\npython -m evaluation COMMAND --help says more.")


if __name__ == "__main__":
    sys.exit(main())
