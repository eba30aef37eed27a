"""What is remembered of videos whose frames arrive one by one, told apart by ids, as frameworks without streams do."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from eventful_det.errors import UserError

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass
class _Video(Generic[T]):
    frame_id: int
    size: tuple[int, int]
    state: T


class VideoStates(Generic[T]):
    """The states of the videos seen last.

    A video goes on when its frame is of the same size as the one before and follows it closely enough; else it
    begins anew, with a new state.

    Args:
        make: makes the state of a video that begins, from the (height, width) of its frames.
        max_streams: videos remembered; beyond, the least recently seen one is forgotten, with a warning.
        max_gap: largest step of the frame number with which a video goes on.
    """

    def __init__(self, make: Callable[[tuple[int, int]], T], max_streams: int = 8, max_gap: int = 1) -> None:
        if max_streams < 1 or max_gap < 1:
            raise UserError(f"max_streams and max_gap must be at least 1, got {max_streams} and {max_gap}")
        self.make, self.max_streams, self.max_gap = make, max_streams, max_gap
        self._videos: OrderedDict[Hashable, _Video[T]] = OrderedDict()
        self._warned = False

    def __len__(self) -> int:
        return len(self._videos)

    def __contains__(self, video_id: Hashable) -> bool:
        return video_id in self._videos

    def at(self, video_id: Hashable, frame_id: int, size: tuple[int, int]) -> T:
        """The state with which to process a frame: the video's own, or a new one where it begins anew.

        Args:
            video_id: of the video.
            frame_id: number of the frame in its video; 0 always begins anew.
            size: (height, width) of the frame in pixels.
        """
        video = self._videos.get(video_id)
        if video is None or frame_id == 0 or size != video.size or not 0 < frame_id - video.frame_id <= self.max_gap:
            video = self._videos[video_id] = _Video(frame_id, size, self.make(size))
        video.frame_id = frame_id
        self._videos.move_to_end(video_id)
        if len(self._videos) > self.max_streams:
            self._forget_oldest()
        return video.state

    def forget(self, video_id: Hashable) -> None:
        """Forget a video, if it is known."""
        self._videos.pop(video_id, None)

    def clear(self) -> None:
        """Forget all videos."""
        self._videos.clear()

    def _forget_oldest(self) -> None:
        video_id, _ = self._videos.popitem(last=False)
        if not self._warned:
            self._warned = True
            logger.warning(
                "more than max_streams=%d videos are under way: forgot video %r; should it go on, its next frame is "
                "recomputed in full. Interleave fewer videos, or raise max_streams (this is said once)",
                self.max_streams,
                video_id,
            )
