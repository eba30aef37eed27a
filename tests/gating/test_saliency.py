"""Where something was found, as a map over tokens, and its way to the gate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eventful_det.detectors.saliency import REACH, token_saliency
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.gating.selector import EVERYTHING, GateInput

PATCH = 16
sides = st.integers(1, 8)
boxes = st.lists(st.tuples(*[st.floats(0, 140)] * 2, *[st.floats(0, 80)] * 2, st.floats(0, 1)), max_size=5)


@settings(max_examples=60, deadline=None)
@given(sides, sides, boxes)
def test_map_is_the_best_score_that_reaches_a_token(height: int, width: int, found: list[tuple[float, ...]]) -> None:
    xyxys = torch.tensor([[x, y, x + w, y + h, score] for x, y, w, h, score in found]).view(-1, 5)
    saliency = token_saliency(xyxys[:, :4], xyxys[:, 4], (height, width), PATCH)
    assert saliency.shape == (height * width,)
    for token, value in enumerate(saliency.tolist()):
        y, x = divmod(token, width)
        reached = [
            score
            for x1, y1, x2, y2, score in xyxys.tolist()
            if (x + 1 + REACH) * PATCH > x1
            and (x - REACH) * PATCH < x2
            and (y + 1 + REACH) * PATCH > y1
            and (y - REACH) * PATCH < y2
        ]
        assert value == max(reached, default=0.0)


def test_the_gate_knows_what_was_found_on_the_last_frame(tiny_detector: Detector) -> None:
    seen: list[GateInput] = []

    def select(gates: Sequence[GateInput]) -> list[Tensor]:
        seen.extend(gates)
        return EVERYTHING(gates)

    state = tiny_detector.init_state()
    frames = torch.rand(3, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    found = [tiny_detector.step(frame[None], state, selector=select)[0].detections for frame in frames]
    assert len(seen) == 2 and len(found[0]) > 0  # the first frame is a flush
    for gate, detections in zip(seen, found, strict=False):
        assert gate.grid == (6, 10) and gate.saliency is not None
        assert torch.equal(gate.saliency, token_saliency(detections.boxes, detections.scores, (6, 10), PATCH))
