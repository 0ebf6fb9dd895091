"""Centers of a run that start from another run's, by identity name."""
