"""The one error of this package."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be opened, or does not fit; the message says what it is and the way out."""
