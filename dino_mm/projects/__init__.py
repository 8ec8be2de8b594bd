"""A project of one's own: data sets found and converted, and the config that fine-tunes a model on them."""

from .project import Project, make_project

__all__ = ['Project', 'make_project']
