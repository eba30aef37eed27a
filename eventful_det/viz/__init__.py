"""Pictures of what a detector did: boxes, the map of recomputed tokens, what each frame cost.

Drawing uses OpenCV and NumPy; images are `(h, w, 3)` uint8 RGB.
"""

from eventful_det.viz.frame import class_colour as class_colour
from eventful_det.viz.frame import draw_detections as draw_detections
from eventful_det.viz.frame import draw_work as draw_work
from eventful_det.viz.overlay import Caption as Caption
from eventful_det.viz.overlay import annotate as annotate
from eventful_det.viz.panel import draw_cost as draw_cost
from eventful_det.viz.panel import draw_history as draw_history
from eventful_det.viz.panel import draw_latency as draw_latency
from eventful_det.viz.panel import part_colours as part_colours
from eventful_det.viz.tables import cost_row as cost_row
from eventful_det.viz.tables import plot_cost as plot_cost
from eventful_det.viz.text import budget_text as budget_text
