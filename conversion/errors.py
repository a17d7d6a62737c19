"""Errors and notes in one sentence."""

import re


class ConversionError(Exception):
    """What the user can do something about, in one sentence."""


def listed(items, most: int = 5) -> str:
    items = [str(item) for item in items]
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def first_sentence(error: BaseException) -> str:
    return re.split(r"(?<=[.!?])\s", one_line(str(error)) or type(error).__name__)[0][:300]


def one_line(text: str) -> str:
    """For a terminal: names in a hostile file may hold line breaks and control sequences."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
