"""Clips out of videos of any frame rate, by time; only the frames that are looked at are kept."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import av
import numpy as np
import torch
from av.error import FFmpegError
from torch import Tensor

from eventful_det.data.video.decoder import best_video, open_container
from eventful_det.data.video.transforms import resize
from eventful_det.errors import UserError
from eventful_det.recognition.config import RecogniserConfig
from eventful_det.recognition.data.segments import Segment
from eventful_det.recognition.data.views import frame_indices, shared_tubelets

_LAST = 1.0  # seconds that the last frame of a video is taken to be shown


@dataclass(frozen=True)
class SparseClip:
    """A clip of which some frames are there.

    Attributes:
        length: frames of the clip at the recogniser's frame rate.
        frames: number of a frame -> `(c, H, W)` uint8.
    """

    length: int
    frames: dict[int, Tensor]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, indices: Sequence[int]) -> Tensor:
        """Some frames, `(n, c, H, W)` uint8."""
        return torch.stack([self.frames[i] for i in indices])


def read_clip(segment: Segment, config: RecogniserConfig, shared: bool = True) -> SparseClip:
    """Read a segment at the recogniser's frame rate, scaled so that its frames just cover a view.

    Frame i is what the video shows at i / fps seconds after the start. A video that ends early is extended by its last
    frame.

    Args:
        segment: what to read.
        config: of the recogniser.
        shared: as of `recognise`, which will look at the clip.

    Raises:
        UserError: the video cannot be read, or shows nothing in the segment.
    """
    start = segment.start or 0.0
    seconds = video_seconds(segment.video) if segment.stop is None else segment.stop - start
    length = max(1, round(seconds * config.fps))
    wanted = wanted_frames(length, config, shared)
    frames: dict[int, Tensor] = {}
    last: Tensor | None = None
    moments = iter(wanted)
    due = next(moments, None)
    for time, image in _decoded(segment.video, start, start + seconds):
        # Every moment before this frame's is shown by the frame before it.
        while due is not None and last is not None and start + due / config.fps < time - 1e-6:
            frames[due] = last
            due = next(moments, None)
        if due is None:
            break
        last = _covering(image, config)
    if last is None:
        raise UserError(f"{segment.video} shows nothing from {start:g} to {start + seconds:g} s")
    for i in [] if due is None else [due, *moments]:
        frames[i] = last
    return SparseClip(length, frames)


def wanted_frames(length: int, config: RecogniserConfig, shared: bool) -> list[int]:
    """Numbers of the frames of a clip that its views look at, ascending."""
    if not shared:
        return sorted({i for view in frame_indices(length, config) for i in view})
    starts, _ = shared_tubelets(length, config)
    offsets = range(0, config.tubelet[0] * config.stride, config.stride)
    return sorted({min(start + offset, length - 1) for start in starts for offset in offsets})


def video_seconds(video: str | os.PathLike[str]) -> float:
    """Duration of a video.

    Raises:
        UserError: it cannot be opened, or does not tell.
    """
    try:
        with open_container(os.fspath(video)) as container:
            if container.duration is None:
                raise UserError(f"{video} does not tell how long it is")
            return container.duration / av.time_base
    except (FFmpegError, OSError, ValueError) as error:
        raise UserError(f"cannot read {video}: {error}") from None


def _decoded(video: str | os.PathLike[str], start: float, stop: float) -> Iterator[tuple[float, Tensor]]:
    """Times in seconds and pictures `(h, w, 3)` of a video from the one shown at `start` to `stop`."""
    try:
        with open_container(os.fspath(video)) as container:
            stream = best_video(container, str(video))
            base = float(stream.time_base or 0) or 1 / av.time_base
            first = stream.start_time or 0
            if start > 0:
                container.seek(first + int(start / base), stream=stream)
            before: tuple[float, object] | None = None
            for frame in container.decode(stream):
                if frame.pts is None:
                    continue
                time = (frame.pts - first) * base
                if time > start and before is not None:
                    yield before[0], _pixels(before[1])
                    before = None
                if time > start:
                    yield time, _pixels(frame)
                else:
                    before = time, frame  # only the last of these is decoded to pixels
                if time > stop:
                    return
            if before is not None and before[0] > start - _LAST:
                yield before[0], _pixels(before[1])
    except (FFmpegError, OSError, ValueError) as error:
        raise UserError(f"cannot read {video}: {error}") from None


def _pixels(frame: object) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frame.to_ndarray(format="rgb24")))  # type: ignore[attr-defined]


def _covering(image: Tensor, config: RecogniserConfig) -> Tensor:
    """A picture `(h, w, 3)` in the size that just covers a view, `(3, h', w')` uint8."""
    height, width = image.shape[:2]
    scale = max(config.size[0] / height, config.size[1] / width)
    target = max(config.size[0], round(scale * height)), max(config.size[1], round(scale * width))
    return torch.from_numpy(resize(image.numpy(), *target)).permute(2, 0, 1)


def read_clips(
    segments: Iterable[Segment], config: RecogniserConfig, shared: bool = True
) -> Iterator[tuple[Segment, SparseClip | UserError]]:
    """The clips of some segments; where one cannot be read, what is wrong with it."""
    for segment in segments:
        try:
            yield segment, read_clip(segment, config, shared)
        except UserError as error:
            yield segment, error
