"""Action recognition by a factorised ViViT whose spatial model is eventful (paper, section 5.3)."""
