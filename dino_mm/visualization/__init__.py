from .contact_sheet import draw_contact_sheet
from .curves import plot_learning_curve
from .dataset_summary import draw_dataset

__all__ = ['draw_contact_sheet', 'draw_dataset', 'plot_learning_curve']
