"""What is on the devices, byte by byte: encoders and decoders, pure. The text is `docs/format.md`.

Every decoder raises `pool.errors.FormatError` for bytes that are not what it expects, and nothing
else. All integers are little-endian.
"""
