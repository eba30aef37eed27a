"""Streaming loader: a batch is the next frame of each of several videos, read and resized ahead by threads.

::

    for batch in VideoStreams(load_coco_video("val.json"), slots=8, size=(576, 1024), workers=4):
        for item in batch:
            item.slot, item.video.id, item.is_first, item.frame.image_id, item.image, item.resized

A slot shows one video from its first frame to its last, then takes the next one. The longest videos come first, so
that the slots run dry together; a batch has one frame of every slot that still has a video, so the last ones are
smaller. Order and content depend on the data set and the number of slots alone, not on the number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from eventful_det.data.coco_video import CocoVideo, Frame, Video
from eventful_det.data.frame_reader import FrameReader
from eventful_det.data.video.transforms import Image, fit
from eventful_det.errors import UserError

_AHEAD = 2  # batches that are read ahead; bounds the memory to that of `slots * 3` frames


@dataclass(frozen=True)
class StreamFrame:
    """The next frame of one stream.

    Attributes:
        slot: place of the stream in the batch, from 0.
        video: the stream; `video.id` tells it from all others.
        frame: image id, frame id, size and labels.
        is_first, is_last: whether the stream begins or ends with this frame.
        image: `(h, w, 3)` uint8 RGB as stored; None if it cannot be read.
        resized: the same in the size asked for; None if it cannot be read.
        fault: why it cannot be read, naming the file; "" if it can.
    """

    slot: int
    video: Video
    frame: Frame
    is_first: bool
    is_last: bool
    image: Image | None
    resized: Image | None
    fault: str = ""


Pending = Callable[[], StreamFrame]  # waits for a frame that is being read


class VideoStreams(Iterable[list[StreamFrame]]):
    """Iterates over batches. Every iteration begins anew; leaving it ends its threads and closes its files.

    A frame that cannot be read takes its turn like any other, without pixels and with the reason.

    Args:
        data: videos whose frames are pictures or lie in video files; those without frames are left out.
        slots: streams side by side, at least 1.
        size: (short side, long side) in pixels that frames are resized to, see `fit_size`; None = as they are.
        workers: threads that read a few batches ahead; 0 = read when asked, in the thread that asks.

    Raises:
        UserError: a number is out of its range.
    """

    def __init__(
        self, data: CocoVideo, slots: int = 1, *, size: tuple[int, int] | None = None, workers: int = 0
    ) -> None:
        for name, value, least in (("slots", slots, 1), ("workers", workers, 0)):
            if value < least:
                raise UserError(f"streams: {name} must be at least {least}, got {value}")
        filled = [video for video in data.videos if video.frames]
        self.data, self.videos = data, sorted(filled, key=lambda video: -len(video.frames))
        self.slots, self.size, self.workers = slots, size, workers

    def __iter__(self) -> Generator[list[StreamFrame], None, None]:
        with ExitStack() as cleanup:
            read = partial(self._read, cleanup.enter_context(FrameReader(self.data)))
            start = self._starter(read, cleanup)
            waiting: deque[list[Pending]] = deque()
            for step in plan([len(video.frames) for video in self.videos], self.slots):
                waiting.append([start(*place) for place in step])
                if len(waiting) > (_AHEAD if self.workers else 0):
                    yield [frame() for frame in waiting.popleft()]
            while waiting:
                yield [frame() for frame in waiting.popleft()]

    def _starter(
        self, read: Callable[..., StreamFrame], cleanup: ExitStack
    ) -> Callable[..., Callable[[], StreamFrame]]:
        """A function that begins to read a frame and returns what waits for it."""
        if not self.workers:
            return partial(partial, read)
        pool = ThreadPoolExecutor(self.workers, "streams")
        cleanup.callback(pool.shutdown, cancel_futures=True)
        return lambda *place: pool.submit(read, *place).result

    def _read(self, reader: FrameReader, slot: int, number: int, index: int) -> StreamFrame:
        video = self.videos[number]
        frame = video.frames[index]
        image, resized, fault = None, None, ""
        try:
            image = reader.read(video, frame)
            resized = image if self.size is None else fit(image, *self.size)
        except UserError as error:
            fault = str(error)
        return StreamFrame(slot, video, frame, index == 0, index == len(video.frames) - 1, image, resized, fault)


def plan(lengths: Sequence[int], slots: int) -> Iterator[list[tuple[int, int, int]]]:
    """What every batch consists of, as (slot, video, place of the frame in it).

    Args:
        lengths: frames of each video, at least 1; they are begun in this order.
        slots: streams side by side.
    """
    waiting = iter(range(len(lengths)))
    playing: dict[int, tuple[int, int]] = {}  # by slot: video, place
    while True:
        for slot in range(slots):
            if slot not in playing:
                video = next(waiting, None)
                if video is not None:
                    playing[slot] = video, 0
        if not playing:
            return
        yield [(slot, video, place) for slot, (video, place) in sorted(playing.items())]
        playing = {slot: (v, place + 1) for slot, (v, place) in playing.items() if place + 1 < lengths[v]}


def share_out(lengths: Sequence[int], shares: int) -> list[list[int]]:
    """Deal out videos, the longest first, each to the share with the fewest frames so far (Graham 1969).

    Args:
        lengths: frames of each video.
        shares: how many.

    Returns:
        The videos of each share, the longest first.
    """
    dealt: list[list[int]] = [[] for _ in range(shares)]
    frames = [0] * shares
    for video in sorted(range(len(lengths)), key=lambda v: -lengths[v]):
        share = frames.index(min(frames))
        dealt[share].append(video)
        frames[share] += lengths[video]
    return dealt
