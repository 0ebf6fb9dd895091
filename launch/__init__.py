"""Starts processes: command line, ranks on this machine, clusters. Knows nothing of learning."""
