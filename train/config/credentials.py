"""Users and passwords inside addresses (`http://user:password@host`): found, taken out, never said.

Example:
    >>> without_credentials("postgresql://mlflow:secret@db/mlflow")
    'postgresql://mlflow@db/mlflow'
    >>> redact("no route to http://me:secret@host:5000/api")
    'no route to http://***@host:5000/api'
"""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

HIDDEN = "***"
MIN_SECRET_LENGTH = 3  # a shorter one would take half of every sentence with it
# Variables whose values are replaced wherever they turn up, in the text of an exception for example.
SECRET_VARIABLES = (
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "PGPASSWORD",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
# The user never begins with a slash, so paths (sqlite:////a@b/mlflow.db) are left alone. SQLAlchemy takes a
# password up to the last @, slashes included.
_CREDENTIALS = re.compile(
    r"^(?P<scheme>[a-z][\w+.\-]*://)(?P<user>[^:/@\s]*)(?::(?P<password>[^/\s]*|\S*))?@", re.IGNORECASE
)
_IN_TEXT = re.compile(r"([a-z][\w+.\-]*://)(?!/)[^\s'\"<>]*@", re.IGNORECASE)
_QUERY = re.compile(
    r"([?&;][\w\-.]*(?:password|passwd|pwd|token|secret|api_?key)[\w\-.]*=)([^&;\s'\"]*)", re.IGNORECASE
)


def without_credentials(uri: str) -> str:
    """The address without password; over HTTP without user, too, where tokens stand in its place."""
    if (found := _CREDENTIALS.match(uri)) is not None:
        is_http = found["scheme"].lower().startswith("http")
        user = "" if is_http or not found["user"] else f"{found['user']}@"
        uri = found["scheme"] + user + uri[found.end() :]
    query = re.compile(r"(?<=[?&;])" + _QUERY.pattern.replace("[?&;]", "", 1) + "[&;]?", re.IGNORECASE)
    return query.sub("", uri).rstrip("?&;") if _QUERY.search(uri) else uri


def has_credentials(uri: str) -> bool:
    """Whether the address holds something that must not be written down."""
    return without_credentials(uri) != uri


def redact(text: str, *uris: str | None) -> str:
    """`text` without credentials in addresses, and without those of `uris` and of the environment."""
    text = _QUERY.sub(rf"\1{HIDDEN}", _IN_TEXT.sub(rf"\1{HIDDEN}@", text))
    secrets = {os.environ.get(name, "") for name in SECRET_VARIABLES}
    for uri in (*uris, os.environ.get("MLFLOW_TRACKING_URI")):
        secrets |= _secrets_of(uri or "")
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= MIN_SECRET_LENGTH:
            text = text.replace(secret, HIDDEN)
    return text


def _secrets_of(uri: str) -> set[str]:
    found = _CREDENTIALS.match(uri)
    secrets = {value for _, value in _QUERY.findall(uri)}
    if found is not None:
        secrets.add(found["password"] or "")
        if found["scheme"].lower().startswith("http") and not found["password"]:
            secrets.add(found["user"])
    return secrets | {unquote(secret) for secret in secrets}
