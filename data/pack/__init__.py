"""Folders, tables, iterators and drawn scenes -> tar shards with their index."""
