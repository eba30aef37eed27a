"""A ViTDet as graphs: what is compiled, where windows lie on its pyramid, and the detector that runs them."""
