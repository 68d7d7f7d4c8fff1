"""A multipart/form-data body, whole and in memory → its parts. Nothing is written to a disk.

The body is bounded before it comes here; what is looked at byte by byte are at most 8 KiB of headers a part.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from email.errors import MessageError
from email.parser import HeaderParser
from email.policy import compat32
from email.utils import collapse_rfc2231_value

from serve.http.faults import Refused

MAX_HEADER_BYTES = 8 << 10
MAX_FIELDS = 8
MAX_FIELD_BYTES = 1 << 10
MAX_NAME_CHARACTERS = 100
BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")


@dataclass(frozen=True)
class Upload:
    """One file of a request.

    Attributes:
        name: the last part of the name that the client gave, to tell files apart; never a path.
        content: its bytes.
    """

    name: str | None
    content: bytes


def bad_multipart(reason: str) -> Refused:
    return Refused(400, "bad_multipart", f"The multipart/form-data body cannot be read: {reason}.")


def parse(body: bytes, content_type: str, max_files: int) -> tuple[list[Upload], dict[str, str]]:
    """The files, in their order, and the other fields.

    Raises:
        Refused: it is malformed, cut short, or has more parts than are looked at.
    """
    delimiter = b"--" + _boundary(content_type)
    if not body.startswith(delimiter):
        start = body.find(b"\r\n" + delimiter, 0, MAX_HEADER_BYTES)
        if start < 0:
            raise bad_multipart("its boundary is not the one of the Content-Type")
        body = body[start + 2 :]
    files: list[Upload] = []
    fields: dict[str, str] = {}
    num_fields = 0  # also of equal names
    position = len(delimiter)
    delimiter = b"\r\n" + delimiter
    while True:
        after = body[position : position + 2]
        if after == b"--":
            return files, fields
        if after != b"\r\n":
            raise bad_multipart("it is cut short, or its boundary occurs within a part")
        # From here, so that a part without any headers is found, too.
        end_of_headers = body.find(b"\r\n\r\n", position, position + MAX_HEADER_BYTES)
        if end_of_headers < 0:
            raise bad_multipart("a part has no end of its headers")
        end = body.find(delimiter, end_of_headers + 2)
        if end < 0:
            raise bad_multipart("it is cut short")
        headers = body[position + 2 : end_of_headers + 2]
        content = body[end_of_headers + 4 : end]
        name, file_name = _disposition(headers)
        if file_name is not None or name in ("file", "files", "image", "images"):
            if len(files) == max_files:
                raise Refused(413, "too_many_files", f"At most {max_files} files are taken in one request.")
            files.append(Upload(safe_name(file_name), content))
        else:
            num_fields += 1
            if num_fields > MAX_FIELDS or len(content) > MAX_FIELD_BYTES:
                raise bad_multipart("it has too many or too long fields beside its files")
            fields[name] = content.decode("utf-8", "replace")
        position = end + len(delimiter)


def safe_name(name: str | None) -> str | None:
    r"""`../../etc/passwd`, `C:\a\b.jpg` → `passwd`, `b.jpg`; what cannot be printed becomes `?`."""
    if not name:
        return None
    last = re.split(r"[/\\]", name)[-1].strip()
    shown = "".join(c if c.isprintable() else "?" for c in last[:MAX_NAME_CHARACTERS])
    return shown if shown.strip(". ") else None


def _boundary(content_type: str) -> bytes:
    value = HeaderParser(policy=compat32).parsestr(f"Content-Type: {content_type}\n\n").get_param("boundary")
    try:
        boundary = value.encode("ascii") if isinstance(value, str) else b""
    except UnicodeEncodeError:
        boundary = b""
    if not BOUNDARY.fullmatch(boundary):
        raise bad_multipart("its Content-Type names no valid boundary")
    return boundary


def _disposition(headers: bytes) -> tuple[str, str | None]:
    """(field name, file name or None)."""
    try:
        message = HeaderParser(policy=compat32).parsestr(headers.decode("utf-8", "replace"))
        kind = str(message.get("content-disposition", "")).split(";")[0].strip().lower()
        name = message.get_param("name", header="content-disposition")
        file_name = message.get_param("filename", header="content-disposition")
        encoding = str(message.get("content-transfer-encoding", "binary")).strip().lower()
        if kind != "form-data" or name is None:
            raise bad_multipart("a part has no Content-Disposition with a name")
        if encoding not in ("binary", "8bit", "7bit"):
            raise bad_multipart("a part has a Content-Transfer-Encoding: send the bytes as they are")
        shown = None if file_name is None else collapse_rfc2231_value(file_name)
        return collapse_rfc2231_value(name), shown
    except (MessageError, ValueError, LookupError, TypeError):
        raise bad_multipart("a part's headers are broken") from None
