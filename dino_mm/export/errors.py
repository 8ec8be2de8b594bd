"""What an export can fail with."""


class ExportError(RuntimeError):
    """A model cannot be exported as asked, or its export is not equal to it; one line, with the way out."""
