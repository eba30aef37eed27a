"""States of videos by id: when they go on, when they are forgotten."""

from __future__ import annotations

import logging

import pytest

from eventful_det.errors import UserError
from eventful_det.integrations.video_states import VideoStates

SIZE = (48, 64)


def test_a_video_goes_on_frame_by_frame() -> None:
    states = VideoStates(list)
    first = states.at("a", 0, SIZE)
    assert states.at("a", 1, SIZE) is first and states.at("a", 2, SIZE) is first
    assert states.at("b", 3, SIZE) is not first, "a video may be joined anywhere"
    assert states.at("a", 3, SIZE) is first, "another one does not disturb it"


@pytest.mark.parametrize(("frame", "size"), [(0, SIZE), (7, SIZE), (4, SIZE), (5, SIZE), (6, (64, 48))])
def test_it_begins_anew(frame: int, size: tuple[int, int]) -> None:
    states = VideoStates(list)
    first = states.at("a", 5, SIZE)
    assert states.at("a", frame, size) is not first
    assert len(states) == 1


def test_frames_may_be_skipped_when_allowed() -> None:
    states = VideoStates(list, max_gap=3)
    first = states.at("a", 0, SIZE)
    assert states.at("a", 3, SIZE) is first and states.at("a", 7, SIZE) is not first


def test_the_least_recently_seen_is_forgotten_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    states = VideoStates(list, max_streams=2)
    kept = {name: states.at(name, 0, SIZE) for name in "ab"}
    states.at("a", 1, SIZE)
    with caplog.at_level(logging.WARNING):
        states.at("c", 0, SIZE)
        states.at("d", 0, SIZE)
    assert [r.message for r in caplog.records if "forgot video 'b'" in r.message] == [r.message for r in caplog.records]
    assert len(caplog.records) == 1 and len(states) == 2 and "a" not in states
    assert states.at("a", 2, SIZE) is not kept["a"]


def test_forgetting() -> None:
    states = VideoStates(list)
    first = states.at("a", 0, SIZE)
    states.forget("a")
    states.forget("never seen")
    assert states.at("a", 1, SIZE) is not first
    states.clear()
    assert not len(states)


def test_limits_must_be_positive() -> None:
    with pytest.raises(UserError, match="at least 1"):
        VideoStates(list, max_streams=0)
