"""Turns tar shards into batches: index, order, read, decode, loader. Imports nothing of ours."""
