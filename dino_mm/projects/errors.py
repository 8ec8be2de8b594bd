"""What can be wrong with a project or its data."""


class ProjectError(Exception):
    """No project can be made as asked; one line says why, names the file, and the way out."""
