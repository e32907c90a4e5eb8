"""Errors that the user of the command line can mend: one line, what is wrong and what to do."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right; its message is one line that says how."""


class MediaError(UserError):
    """A video that is missing, unreadable or holds nothing to take."""


class MemoryFormatError(UserError):
    """A memory file that is damaged, foreign, or written by another version."""
