"""Words of messages. Pure; called by whoever writes a line for people."""

from __future__ import annotations


def line(text: str) -> str:
    """On one line, whatever a device had to say."""
    return " ".join(text.split())


def counted(number: int, noun: str) -> str:
    """As in "1 device", "2 devices"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
