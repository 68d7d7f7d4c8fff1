"""Logs, figures and the node's record go to S3 every 30 s, in a thread; S3's faults cost a later attempt.

A log is shipped in pieces, `logs/<deployment>/<instance>/<name>-<seq>.log`; all of them in a row are the log.
An agent that starts again on the same machine goes on after the pieces that are there.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from pathlib import Path

from infra.errors import UserError
from infra.layout import Event, EventKind, Keys, Node, Phase
from infra.node.settings import Settings
from infra.node.store import Store

PIECE_BYTES = 4 << 20
MAX_LOG_BYTES = 256 << 20  # of one log in S3; one that says more says nothing
MAX_FIGURE_BYTES = 64 << 20
LIVE_FIGURES = ("metrics.jsonl", "status.json", "summary.json", "recipe.yaml", "mlflow.json")

say = logging.getLogger(__name__)


class Shipper:
    """Ships until it is closed.

    Args:
        usd_per_hour: of this node, for its record; may be set later.
    """

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings, self._store = settings, store
        self._keys = Keys(settings.deployment)
        self._offsets: dict[str, int] | None = None  # log → bytes shipped
        self._numbers: dict[str, int] = {}  # log → the next piece
        self._figures: dict[str, tuple[int, int]] = {}  # name → size and time of what was shipped
        self._mutex = threading.Lock()  # one round at a time
        self._wake, self._closed = threading.Event(), threading.Event()
        self.usd_per_hour: float | None = None
        self.ships_figures = True  # of the run; only one node has it
        self._node = Node(
            instance=settings.instance,
            group=settings.group,
            market=settings.market,
            instance_type=settings.instance_type,
            availability_zone=settings.availability_zone,
            since=time.time(),
        )
        self._thread = threading.Thread(target=self._run, name="shipping", daemon=True)
        self._thread.start()

    def phase(self, phase: Phase, detail: str = "", attempt: int | None = None) -> None:
        """What this node does from now on; written at once, in the background."""
        say.info("%s%s", phase, f": {detail}" if detail else "")
        changes = {"phase": phase, "detail": detail[:500], "since": time.time()}
        if attempt is not None:
            changes["attempt"] = attempt
        self._node = self._node.model_copy(update=changes)
        self._wake.set()

    def event(self, kind: EventKind, detail: str = "", attempt: int = 0, generation: int = 0) -> None:
        """One thing that happened, written now; a fault of S3 is said, and no more."""
        now = time.time()
        event = Event(
            kind=kind,
            time=now,
            instance=self._settings.instance,
            detail=detail[:1000],
            attempt=attempt,
            generation=generation,
        )
        try:
            self._store.put(self._keys.event(now, self._settings.instance, kind), event.to_json())
        except UserError as error:
            say.warning("an event (%s) could not be written: %s", kind, error)

    def ship(self) -> None:
        """One round, now: what has come since the last one."""
        with self._mutex:
            for what in (self._ship_node, self._ship_logs, self._ship_figures):
                try:
                    what()
                except (UserError, OSError, ValueError) as error:
                    say.warning("not shipped, tried again later: %s", error)

    def close(self, timeout_seconds: float = 60.0) -> None:
        """A last round, bounded in time."""
        self._closed.set()
        self._wake.set()
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while not self._closed.is_set():
            self._wake.wait(self._settings.waits.ship)
            self._wake.clear()
            with contextlib.suppress(Exception):  # nothing here may end the run
                self.ship()
        with contextlib.suppress(Exception):
            self.ship()

    def _ship_node(self) -> None:
        update = {"updated": time.time(), "price_usd_per_hour": self.usd_per_hour}
        self._node = node = self._node.model_copy(update=update)
        self._store.put(self._keys.node(node.instance), node.to_json())

    def _ship_logs(self) -> None:
        if self._offsets is None:
            self._offsets = self._find_pieces()
        for path in sorted(self._settings.logs.glob("*.log")):
            while self._ship_piece(path, self._offsets):
                pass

    def _find_pieces(self) -> dict[str, int]:
        offsets: dict[str, int] = {}
        for piece in self._store.list(f"{self._keys.logs}{self._settings.instance}/"):
            found = re.fullmatch(r"(.+)-(\d{6})\.log", piece.key.rpartition("/")[2])
            if found is not None:
                offsets[found[1]] = offsets.get(found[1], 0) + piece.num_bytes
                self._numbers[found[1]] = max(self._numbers.get(found[1], 0), int(found[2]) + 1)
        return offsets

    def _ship_piece(self, path: Path, offsets: dict[str, int]) -> bool:
        """Whether there may be more of it."""
        name, offset = path.stem, offsets.get(path.stem, 0)
        size = path.stat().st_size
        if size <= offset or offset >= MAX_LOG_BYTES:
            return False
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(PIECE_BYTES)
        whole = content.rfind(b"\n") + 1
        if whole and not self._closed.is_set():
            content = content[:whole]  # the rest of the line comes with the next piece
        number = self._numbers.get(name, 0)
        self._store.put(self._keys.log(self._settings.instance, name, number), content)
        offsets[name], self._numbers[name] = offset + len(content), number + 1
        return size > offsets[name] and len(content) > PIECE_BYTES // 2

    def _ship_figures(self) -> None:
        if not self.ships_figures:
            return
        for name in LIVE_FIGURES:
            path = self._settings.run / name
            try:
                status = path.stat()
            except OSError:
                continue
            version = (status.st_size, status.st_mtime_ns)
            if self._figures.get(name) != version and status.st_size <= MAX_FIGURE_BYTES:
                self._store.upload(f"{self._keys.report}{name}", path)
                self._figures[name] = version
