"""Real guests: QEMU boots a kernel and uses a volume as its disk."""
