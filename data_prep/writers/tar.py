"""WebDataset tar shards with DALI's `.idx` beside each.

    train-00000.tar    000000000.jpg, 000000000.cls, 000000001.jpg, …
    train-00000.idx    v1.2 <samples>, then a line a sample: <extension> <offset> <bytes> <name> for each part

A sample's name is its position in the split's order (with gaps where a file was quarantined); its `.cls` is
the label as decimal text. `webdataset` and DALI's `fn.readers.webdataset` read them as they are. Headers hold
no time and no user, so equal samples give equal bytes.

Example:
    >>> writer = TarWriter(stream)
    >>> offset = writer.add("000000000", jpeg, label=3)
    >>> index_text = writer.close()
"""

from __future__ import annotations

import tarfile

from data_prep.writers.stream import StreamWriter

BLOCK = tarfile.BLOCKSIZE  # 512 bytes


class TarWriter:
    """Appends samples to the tar in `stream`."""

    def __init__(self, stream: StreamWriter) -> None:
        self._stream = stream
        self._lines: list[str] = []

    def add(self, name: str, jpeg: bytes, label: int) -> int:
        """Append one sample; returns the byte offset of its JPEG in the tar."""
        digits = str(label).encode()
        jpeg_offset = self._member(f"{name}.jpg", jpeg)
        label_offset = self._member(f"{name}.cls", digits)
        self._lines.append(
            f"jpg {jpeg_offset} {len(jpeg)} {name}.jpg cls {label_offset} {len(digits)} {name}.cls"
        )
        return jpeg_offset

    def _member(self, name: str, content: bytes) -> int:
        header = tarfile.TarInfo(name)
        header.size = len(content)
        header.mode = 0o644
        offset = self._stream.position + BLOCK
        padding = -len(content) % BLOCK
        self._stream.write(header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(padding))
        return offset

    def close(self) -> str:
        """End the archive (not the stream); returns the text of the `.idx` file."""
        end = 2 * BLOCK
        self._stream.write(bytes(end + -(self._stream.position + end) % tarfile.RECORDSIZE))
        return "\n".join([f"v1.2 {len(self._lines)}", *self._lines]) + "\n"


def sample_bytes(jpeg_bytes: int) -> int:
    """What a sample of so many JPEG bytes takes in a tar."""
    return 2 * BLOCK + jpeg_bytes + -jpeg_bytes % BLOCK + BLOCK
