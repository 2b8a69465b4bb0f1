"""Backend adapters: everything that can hold a part of a pool. Imports nothing else of ours."""
