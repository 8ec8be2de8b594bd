from .contact_sheet import draw_contact_sheet
from .curves import plot_learning_curve

__all__ = ['draw_contact_sheet', 'plot_learning_curve']
