"""A Python program under two guards: no connection leaves this machine, and some packages cannot be imported.

python -m tests.integration.serve.only_local FOLDER FORBIDDEN[,…] SCRIPT|-m MODULE [ARGUMENT…]

What was tried all the same is a line a try in FOLDER/tried.txt.
"""

from __future__ import annotations

import importlib.abc
import runpy
import socket
import sys
from pathlib import Path
from typing import Any


class Forbidden(importlib.abc.MetaPathFinder):
    def __init__(self, names: list[str]) -> None:
        self._names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in self._names:
            raise ImportError(f"{name} is not for this program", name=name)


def guard_sockets(log: Path) -> None:
    def is_local(address: Any) -> bool:
        host = address[0] if isinstance(address, tuple) else "unix"
        return host in ("unix", "localhost", "::1", "0.0.0.0", None, "") or str(host).startswith("127.")

    def refuse(address: Any) -> None:
        with log.open("a") as file:
            file.write(f"{address}\n")
        raise OSError(f"{address} is not on this machine")

    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def local_connect(self: socket.socket, address: Any) -> Any:
        return connect(self, address) if is_local(address) else refuse(address)

    def local_resolve(host: Any, *rest: Any, **options: Any) -> Any:
        return resolve(host, *rest, **options) if is_local((host,)) else refuse(host)

    socket.socket.connect = local_connect  # type: ignore[method-assign]
    socket.getaddrinfo = local_resolve  # type: ignore[assignment]


def main() -> None:
    folder, forbidden, script, *rest = sys.argv[1:]
    guard_sockets(Path(folder) / "tried.txt")
    sys.meta_path.insert(0, Forbidden(forbidden.split(",")))
    if script == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    sys.argv = [script, *rest]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
