"""ViTDet, with detectron2's numerics and parameter names, and its incremental heads."""
