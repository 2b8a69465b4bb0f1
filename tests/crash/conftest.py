"""The commands of `tests/cli`, which run the real program on files in a temporary directory."""

from __future__ import annotations

from tests.cli.conftest import short_path, stripewell

__all__ = ["short_path", "stripewell"]
