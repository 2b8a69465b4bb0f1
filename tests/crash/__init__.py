"""Crashes of the real thing: processes that are killed, files that vanish, power that goes."""
