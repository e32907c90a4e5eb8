"""Errors that the user of the command line can mend: one line, what is wrong and what to do."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right; its message is one line that says how."""


class OptionError(UserError):
    """An option of the command line; the help of the command says what it takes."""


class MediaError(UserError):
    """A video that is missing, unreadable or holds nothing to take."""


class MemoryFormatError(UserError):
    """A memory file that is damaged, foreign, or written by another version."""
