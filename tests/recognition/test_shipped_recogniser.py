"""The shipped recogniser tells actions that it never saw by their motion, dense and gated, and by no single frame."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eventful_det.gating.dense import Dense
from eventful_det.recognition.checkpoints import load_recogniser
from eventful_det.recognition.data.segments import Segment
from eventful_det.recognition.data.synthetic_actions import ACTIONS, ActionOptions, render_action
from eventful_det.recognition.evaluation import Way, evaluate_clips
from eventful_det.recognition.session import DEFAULT


@pytest.mark.slow
def test_actions_are_told_by_their_motion() -> None:
    recogniser = load_recogniser("vivit_tiny_synthetic")
    options = ActionOptions(camera="still")
    clips = []
    for index in range(2 * len(ACTIONS)):
        clip = render_action(options, seed=99, index=index, split="test")
        segment = Segment(str(index), Path(), labels={"action": clip.label})
        clips.append((segment, torch.from_numpy(clip.frames).permute(0, 3, 1, 2)))
    ways = [
        Way("dense", rule=Dense()),
        Way("rows", selector=DEFAULT.within(0.25)),
        Way("one frame", rule=Dense(), one_frame=True),
    ]
    dense, rows, one_frame = (e.accuracy["action"].top1 for e in evaluate_clips(recogniser, clips, ways))
    assert dense > 90 and rows > 90 and one_frame < 30


@pytest.mark.parametrize("action", ["rise", "leave"])
def test_time_reversed_is_the_opposite(action: str) -> None:
    """What the first training missed: order."""
    recogniser = load_recogniser("vivit_tiny_synthetic")
    clip = render_action(ActionOptions(camera="still"), seed=99, index=ACTIONS.index(action), split="test")
    frames = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)
    segment = Segment(action, Path(), labels={"action": clip.label})
    (run,) = evaluate_clips(recogniser, [(segment, frames), (segment, frames.flip(0))], [Way("dense", rule=Dense())])
    first, second = (ACTIONS[int(item.scores["action"].argmax())] for item in run.scored)
    assert (first, second) == (action, {"rise": "fall", "leave": "enter"}[action])
