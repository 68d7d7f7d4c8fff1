"""The commands of `python -m serve`, a module each: `add_arguments(parser)`, `run(options) -> exit code`."""
