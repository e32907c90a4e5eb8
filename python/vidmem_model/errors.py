"""Errors that the user can fix. The message is one line: what is wrong, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can fix; the message is one line that says how."""


class OptionError(UserError):
    """A wrong value of a command-line option; the message points to the help of the command."""


class MediaError(UserError):
    """A video file that is missing or unreadable, or has no frame in the requested part."""


class MemoryFormatError(UserError):
    """A memory or model file that is damaged, of another format, or written by another version."""
