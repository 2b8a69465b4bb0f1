"""The NBD server: a pure protocol object and a thin server over it. Knows nothing of storage."""
