"""Command line, daemon and metrics: the only place where pool, NBD server and backends meet."""
