"""What goes wrong with a user's data, as one clear line."""


class DataError(ValueError):
    """The data cannot be used as asked; the text names the shard or key and says what to do."""
