"""What the page accepts."""

from serve.portable.limits import Limits

MAX_UPLOAD_BYTES = 64 << 20
LIMITS = Limits(max_bytes=32 << 20)  # below that of uploads, so that most large files get a sentence of ours
MAX_FILES = 1000  # at once
