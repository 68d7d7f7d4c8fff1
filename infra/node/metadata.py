"""EC2's metadata service (IMDSv2), as far as the agent asks it: who this is, and whether it will be taken.

Example:
    >>> Metadata(os.environ).text("instance-id")
    'i-0123456789abcdef0'
"""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping

ENDPOINT = "http://169.254.169.254"
TOKEN_SECONDS = 6 * 3600  # the longest that EC2 gives
ANSWER_SECONDS = 2.0
MAX_ANSWER_BYTES = 64 << 10


class Metadata:
    """Asks without any proxy; what cannot be had is None.

    Args:
        environment: AWS_EC2_METADATA_SERVICE_ENDPOINT and AWS_EC2_METADATA_DISABLED are heeded.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        disabled = environment.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
        endpoint = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or ENDPOINT
        self._address = None if disabled else urllib.parse.urlsplit(endpoint)
        self._token, self._token_ends = "", 0.0

    def text(self, name: str) -> str | None:
        """An item of `/latest/meta-data/`."""
        try:
            status, content = self._ask(f"/latest/meta-data/{name}")
        except (OSError, http.client.HTTPException, ValueError):
            return None
        words = content.decode("utf-8", "replace").strip()
        return words if status == 200 and words.isprintable() else None

    def interruption(self) -> str | None:
        """When EC2 takes this machine, in words; None as long as it does not."""
        words = self.text("spot/instance-action")
        if words is None:
            return None
        try:
            answer = json.loads(words)
            action, moment = answer["action"], str(answer.get("time", "an unknown time"))[:40]
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return (
            f"EC2 will {action} this machine at {moment}"
            if action in ("terminate", "stop", "hibernate")
            else None
        )

    def _ask(self, path: str) -> tuple[int, bytes]:
        if time.monotonic() >= self._token_ends:
            self._renew_token()
        status, content = self._request("GET", path, {"X-aws-ec2-metadata-token": self._token})
        if status == 401:
            self._renew_token()
            status, content = self._request("GET", path, {"X-aws-ec2-metadata-token": self._token})
        return status, content

    def _renew_token(self) -> None:
        lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
        status, content = self._request("PUT", "/latest/api/token", lifetime)
        token = content.decode("ascii").strip()
        if status != 200 or not token.isprintable() or not 0 < len(token) <= 4096:
            raise ValueError(f"the metadata service gave no token ({status})")
        self._token, self._token_ends = token, time.monotonic() + 0.9 * TOKEN_SECONDS

    def _request(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
        if self._address is None or self._address.hostname is None:
            raise ValueError("there is no metadata service here")
        connection = http.client.HTTPConnection(
            self._address.hostname, self._address.port or 80, timeout=ANSWER_SECONDS
        )
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            content = answer.read(MAX_ANSWER_BYTES + 1)
            if len(content) > MAX_ANSWER_BYTES:
                raise ValueError("the metadata service's answer is too long")
            return answer.status, content
        finally:
            connection.close()


class NoticeWatch:
    """Looks for an interruption notice every few seconds, in a thread, until it is closed.

    Args:
        on_notice: called once, from the thread.
    """

    def __init__(self, metadata: Metadata, poll_seconds: float, on_notice: Callable[[str], None]) -> None:
        self.notice: str | None = None
        self._metadata, self._poll_seconds, self._on_notice = metadata, poll_seconds, on_notice
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="spot notices", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.is_set():
            words = self._metadata.interruption()
            if words is not None:
                self.notice = words
                self._on_notice(words)
                return
            self._closed.wait(self._poll_seconds)
