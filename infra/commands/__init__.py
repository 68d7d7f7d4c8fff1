"""The commands, a module each.

`add_arguments(parser)` names its arguments; `run(options, console)` does it, and returns the exit code.
"""
