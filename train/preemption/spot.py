"""Notices of Amazon's spot market, from the metadata service of the machine (IMDSv2).

Two minutes before EC2 takes a spot machine back it says so, and sometimes it recommends to leave earlier. A
thread asks every few seconds, on one rank of each machine. Away from EC2 nothing is ever asked: there the
address of the service may be anybody's.

Example:
    >>> watcher = NoticeWatcher(5.0, on_notice=lambda notice: stop.raise_for(SPOT))
    >>> ...
    >>> watcher.close()
"""

from __future__ import annotations

import contextlib
import datetime
import http.client
import json
import os
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ENDPOINT = "http://169.254.169.254"
ENDPOINT_IPV6 = "http://[fd00:ec2::254]"
TOKEN_PATH = "/latest/api/token"
INTERRUPTION_PATH = "/latest/meta-data/spot/instance-action"
REBALANCE_PATH = "/latest/meta-data/events/recommendations/rebalance"
TOKEN_SECONDS = 6 * 3600  # the longest that EC2 gives
ANSWER_SECONDS = 2.0  # it is on the same machine, or nearly
MAX_ANSWER_BYTES = 64 << 10
FIRST_TRIES = 6  # without any answer, until it is taken for absent
NO_ANSWER = (
    "EC2's metadata service does not answer: notices of the spot market will not be seen (in a container, "
    "raise the instance's HttpPutResponseHopLimit to 2)"
)
SWITCHED_OFF = "EC2's metadata service is switched off here: notices of the spot market will not be seen"


@dataclass(frozen=True)
class Notice:
    """What EC2 said.

    Attributes:
        kind: `interruption`: the machine will be taken; `rebalance`: it may be before long.
        words: for the log.
        time: when it will be taken, or when that was recommended; None where it could not be read.
        is_old: a recommendation that stood there before this process began. Whoever left for it and was
            started again on the same machine would leave for ever.
    """

    kind: Literal["interruption", "rebalance"]
    words: str
    time: datetime.datetime | None = None
    is_old: bool = False


class NoticeWatcher:
    """Asks until it is closed; nothing it does or meets can hurt the training.

    Args:
        poll_seconds: between two looks; EC2 advises 5.
        on_notice: called from the watcher's thread, once a notice.
        on_fault: called once with a sentence where this is EC2 and its service cannot be asked.
        root: where /sys is; for tests.
    """

    def __init__(
        self,
        poll_seconds: float,
        on_notice: Callable[[Notice], None],
        on_fault: Callable[[str], None] = lambda sentence: None,
        root: Path = Path("/"),
    ) -> None:
        self._poll_seconds = poll_seconds
        self._on_notice, self._on_fault = on_notice, on_fault
        self._began = datetime.datetime.now(datetime.UTC)
        self._reported: set[tuple[str, str]] = set()
        self._saw_recommendations = False  # whether there was an answer about them, be it that there are none
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        endpoint = metadata_endpoint(root)
        if endpoint is not None:
            self._service = _Service(endpoint)
            self._thread = threading.Thread(target=self._run, name="spot notices", daemon=True)
            self._thread.start()

    @property
    def is_watching(self) -> bool:
        """False away from EC2, and where its service is absent."""
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """Ask no more; does not wait for an answer that is under way."""
        self._closed.set()

    def _run(self) -> None:
        num_tries = 0
        while not self._closed.is_set():
            with contextlib.suppress(Exception):
                self._look()
            num_tries += 1
            if num_tries >= FIRST_TRIES and self._service.fault is not None:
                with contextlib.suppress(Exception):
                    self._on_fault(self._service.fault)
                return
            self._closed.wait(self._poll_seconds)

    def _look(self) -> None:
        # One after the other, and each for itself: a fault of one must not hide the other.
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            self._report_interruption(self._service.ask(INTERRUPTION_PATH))
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            answer = self._service.ask(REBALANCE_PATH)
            self._report_rebalance(answer)
            self._saw_recommendations = True

    def _report_interruption(self, answer: dict[str, Any] | None) -> None:
        if answer is None:
            return
        action, text = answer.get("action"), str(answer.get("time", ""))[:40]
        if action not in ("terminate", "stop", "hibernate"):
            raise ValueError("not the words of EC2")
        words = f"EC2 will {action} this machine at {_printable(text) or 'an unknown time'}"
        self._report(Notice("interruption", words, _moment(text)), f"{action} {text}")

    def _report_rebalance(self, answer: dict[str, Any] | None) -> None:
        if answer is None:
            return
        text = answer.get("noticeTime")
        if not isinstance(text, str):
            raise ValueError("not the words of EC2")
        moment = _moment(text[:40])
        is_old = not self._saw_recommendations and (moment is None or moment < self._began)
        words = f"EC2 recommends to leave this machine (said at {_printable(text[:40])})"
        self._report(Notice("rebalance", words, moment, is_old), text[:40])

    def _report(self, notice: Notice, identity: str) -> None:
        key = (notice.kind, identity)
        if key not in self._reported and len(self._reported) < 1000:
            self._reported.add(key)
            self._on_notice(notice)


def metadata_endpoint(root: Path = Path("/")) -> str | None:
    """Where the metadata service is; None away from EC2, and where AWS_EC2_METADATA_DISABLED says so."""
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return None
    if endpoint := os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT"):
        return endpoint
    if not is_ec2(root):
        return None
    mode = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "")
    return ENDPOINT_IPV6 if mode.lower() == "ipv6" else ENDPOINT


def is_ec2(root: Path = Path("/")) -> bool:
    """Whether this machine says that it is one of Amazon's; nothing is asked over the network."""

    def read(name: str) -> str:
        try:
            return (root / "sys" / name).read_text(errors="replace").strip()
        except OSError:
            return ""

    vendors = (read(f"class/dmi/id/{name}") for name in ("sys_vendor", "board_vendor", "bios_vendor"))
    uuids = (read("hypervisor/uuid"), read("class/dmi/id/product_uuid"))
    return any(vendor == "Amazon EC2" for vendor in vendors) or any(
        uuid.lower().startswith("ec2") for uuid in uuids
    )


class _Service:
    """The metadata service, asked with a token that is renewed in time. No proxy is ever used."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._token = ""
        self._token_ends = 0.0
        self._answered = False  # as the service would
        self._was_forbidden = False

    @property
    def fault(self) -> str | None:
        """Why it need not be asked again, where it has never answered."""
        if self._answered:
            return None
        return SWITCHED_OFF if self._was_forbidden else NO_ANSWER

    def ask(self, path: str) -> dict[str, Any] | None:
        """The JSON object at `path`; None where there is none.

        Raises:
            OSError, http.client.HTTPException, ValueError: no answer, or none that can be used.
        """
        if time.monotonic() >= self._token_ends:
            self._renew_token()
        status, content = self._request("GET", path, {"X-aws-ec2-metadata-token": self._token})
        if status == 401:  # the token is no longer good, whatever its time says
            self._renew_token()
            status, content = self._request("GET", path, {"X-aws-ec2-metadata-token": self._token})
        if status == 404:
            return None
        if status != 200:
            raise ValueError(f"the metadata service answered {status}")
        answer = json.loads(content)
        if not isinstance(answer, dict):
            raise ValueError("not a JSON object")
        return answer

    def _renew_token(self) -> None:
        self._token_ends = 0.0
        lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
        status, content = self._request("PUT", TOKEN_PATH, lifetime)
        token = content.decode("ascii").strip()
        if status != 200 or not token.isprintable() or not 0 < len(token) <= 4096:
            raise ValueError(f"the metadata service gave no token ({status})")
        self._token, self._token_ends = token, time.monotonic() + 0.9 * TOKEN_SECONDS

    def _request(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
        address = urllib.parse.urlsplit(self._endpoint)
        if address.scheme != "http" or address.hostname is None:
            raise ValueError(f"{self._endpoint} is no address of a metadata service")
        # Unlike urllib, http.client knows of no proxies, and follows nobody elsewhere.
        connection = http.client.HTTPConnection(address.hostname, address.port or 80, timeout=ANSWER_SECONDS)
        try:
            connection.request(method, address.path.rstrip("/") + path, headers=headers)
            with connection.getresponse() as response:
                self._was_forbidden = response.status == 403
                # An error of the service's own is an answer, too: it is there, and may recover.
                self._answered = self._answered or response.status != 403
                return response.status, _read(response)
        finally:
            connection.close()


def _read(response: http.client.HTTPResponse) -> bytes:
    """The body, as far as it is short and comes soon."""
    ends = time.monotonic() + ANSWER_SECONDS
    content = b""
    while part := response.read1(MAX_ANSWER_BYTES):
        content += part
        if len(content) > MAX_ANSWER_BYTES or time.monotonic() > ends:
            raise ValueError("this is longer than any answer of the metadata service")
    return content


def _moment(text: str) -> datetime.datetime | None:
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)


def _printable(text: str) -> str:
    return "".join(letter for letter in text if letter.isprintable())
