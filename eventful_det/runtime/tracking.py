"""Ids for objects: which box of this frame shows the same object as which box of the frames before.

::

    tracker = Tracker(fps=25)
    for result in map(tracker, detector.stream("video.mp4")):
        print(result.detections.tracks)

The tracker is ByteTrack of the `trackers` library: ``python -m pip install trackers supervision``.
"""

from __future__ import annotations

import dataclasses

import torch

from eventful_det.errors import UserError
from eventful_det.runtime.session import StreamResult


class Tracker:
    """ByteTrack (Zhang et al., ECCV 2022) for one stream.

    Sure detections start tracks; unsure ones only carry them on. An object gets its id on its second frame.

    Args:
        fps: frames per second of the source; 30 where it has no clock.
        start: the least score of a detection that starts a track.
        memory: seconds after which an object that is not seen any more is forgotten.

    Raises:
        UserError: the `trackers` library is not installed.
    """

    def __init__(self, fps: float | None = None, start: float = 0.5, memory: float = 1.0) -> None:
        try:
            from trackers import ByteTrackTracker
        except ImportError as error:
            raise UserError(f"track ids need the trackers library ({error}); pip install trackers") from error
        self._tracker = ByteTrackTracker(
            lost_track_buffer=round(30 * memory),  # the library counts in frames of a 30th of a second
            frame_rate=fps or 30.0,
            track_activation_threshold=start,
            high_conf_det_threshold=start,
        )

    def __call__(self, result: StreamResult) -> StreamResult:
        """The same result, its detections with track ids. Results have to come in the order of their frames."""
        import supervision

        found = result.detections
        rows = supervision.Detections(
            xyxy=found.boxes.cpu().numpy(),
            confidence=found.scores.cpu().numpy(),
            data={"row": torch.arange(len(found)).numpy()},
        )
        followed = self._tracker.update(rows, timestamp=result.timestamp)
        tracks = torch.full((len(found),), -1, dtype=torch.int64)
        if len(followed):  # in an order of the tracker's own
            tracks[torch.as_tensor(followed.data["row"])] = torch.as_tensor(followed.tracker_id, dtype=torch.int64)
        return dataclasses.replace(result, detections=dataclasses.replace(found, tracks=tracks.to(found.boxes.device)))
