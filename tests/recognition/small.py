"""Small recognisers and clips for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eventful_det.recognition.config import RecogniserConfig
from eventful_det.recognition.recogniser import Recogniser


def small_config(**changes: Any) -> RecogniserConfig:
    """Three tubelets of two frames, 2 x 3 tokens; verbs and nouns."""
    sizes: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2, "mlp": 48, "temporal_depth": 1, "temporal_heads": 4}
    sizes |= {"temporal_mlp": 40, "tubelet": (2, 8, 8), "frames": 6, "size": (16, 24), "position_grid": (2, 3)}
    sizes |= {"stride": 2, "fps": 10.0, "temporal_views": 3, "spatial_views": 2}
    return RecogniserConfig({"verb": ("take", "put"), "noun": ("tap", "pan", "cup")}, **{**sizes, **changes})


def small_recogniser(seed: int = 0, **changes: Any) -> Recogniser:
    """Random weights, larger than those that training starts from, so that outputs differ."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        recogniser = Recogniser(small_config(**changes)).eval()
        for parameter in recogniser.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.25)
    return recogniser


def moving_clip(length: int, height: int = 20, width: int = 30, seed: int = 0) -> Tensor:
    """`(T, 3, H, W)` uint8: a still picture over which a block moves."""
    generator = torch.Generator().manual_seed(seed)
    clip = torch.randint(0, 256, (1, 3, height, width), generator=generator).repeat(length, 1, 1, 1)
    for t in range(length):
        left = 2 * t % (width - 6)
        clip[t, :, 4:10, left : left + 6] = 255 - clip[t, :, 4:10, left : left + 6]
    return clip.to(torch.uint8)
