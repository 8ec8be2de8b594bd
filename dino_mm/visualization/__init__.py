from .contact_sheet import draw_contact_sheet
from .curves import plot_learning_curve
from .dataset_summary import draw_dataset
from .detections import draw_detections

__all__ = ['draw_contact_sheet', 'draw_dataset', 'draw_detections', 'plot_learning_curve']
