"""Pictures of what a detector did: boxes, the map of recomputed tokens, what each frame cost.

Drawing uses OpenCV and NumPy; images are `(h, w, 3)` uint8 RGB.
"""

from eventful_det.viz.frame import class_colour, draw_detections, draw_work
from eventful_det.viz.overlay import Caption, annotate
from eventful_det.viz.panel import draw_cost, draw_history, draw_latency, part_colours
from eventful_det.viz.tables import cost_row, plot_cost
from eventful_det.viz.text import budget_text

__all__ = [
    "Caption",
    "annotate",
    "budget_text",
    "class_colour",
    "cost_row",
    "draw_cost",
    "draw_detections",
    "draw_history",
    "draw_latency",
    "draw_work",
    "part_colours",
    "plot_cost",
]
