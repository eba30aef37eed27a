"""A detector made of a gated backbone: ViTDet with detectron2's numerics and parameter names."""
