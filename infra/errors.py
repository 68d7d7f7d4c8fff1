"""Faults that a user can mend: one sentence that says what to change."""

from __future__ import annotations


class UserError(RuntimeError):
    """Printed as `error: …`, without a traceback; the command ends with 1."""
