"""serving/live.py: which frames a page gets, quick or slow, alone or with others."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import cv2
import numpy as np
import pytest
import served
import torch

from eventful_det.data.video import VideoFrame, VideoSource
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.runtime.session import StreamResult
from eventful_det.serving import views
from eventful_det.serving.live import Notifier, show
from eventful_det.serving.reports import message
from eventful_det.serving.sources import OpenedSource


class Stream:
    """A stream whose frames are done when the test says so, and the pages that see it."""

    def __init__(self, result: StreamResult, detector: Detector) -> None:
        self.runner = served.PoolRunner(served.StreamPool(detector))
        self.view = self.runner.views["gate"] = views.StreamView("gate", lambda: None)
        self.notifier, self.result, self.count = Notifier(), result, 0

    def advance(self, frames: int) -> None:
        """Frames are done, at once."""
        for _ in range(frames):
            self.view.show(dataclasses.replace(self.result, frame_index=self.count))
            self.count += 1
        self.notifier.notify()

    async def see(self, look: Callable[[list[Page]], Awaitable[None]], pages: int = 1) -> None:
        """Open pages, and close them after the test has looked at what they get."""
        opened = [Page() for _ in range(pages)]
        shown = [asyncio.create_task(show(page, self.runner, self.notifier)) for page in opened]  # type: ignore[arg-type]
        await look(opened)
        for page in opened:
            page.answers.put_nowait({"type": "websocket.disconnect"})
        await asyncio.wait_for(asyncio.gather(*shown), 10)


class Page:
    """The far end of a WebSocket."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[dict[str, str]] = asyncio.Queue()
        self.got: list[int] = []  # numbers of frames
        self.turns = 0
        self.receive = self.answers.get

    async def accept(self) -> None:
        pass

    async def send_text(self, text: str) -> None:
        self.turns += 1
        assert json.loads(text)["streams"][0]["name"] == "gate"

    async def send_bytes(self, data: bytes) -> None:
        (length,) = struct.unpack(">I", data[:4])
        self.got.append(json.loads(data[4 : 4 + length])["number"])

    def draw(self) -> None:
        self.answers.put_nowait({"type": "websocket.receive", "text": "drawn"})

    async def until(self, *numbers: int) -> None:
        """It got these frames, and no others."""
        deadline = time.monotonic() + 10
        while len(self.got) < len(numbers) and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        assert self.got == list(numbers)


@pytest.fixture
def stream(tiny_detector: Detector) -> Stream:
    image = np.random.default_rng(0).integers(0, 256, (96, 144, 3), np.uint8)
    (result,) = tiny_detector.stream([image])
    return Stream(result, tiny_detector)


async def two_turns(stream: Stream, page: Page) -> None:
    """The page gets a second one although it has not drawn the first."""
    stream.advance(1)
    await page.until(1)
    stream.advance(1)
    await page.until(1, 2)


def test_two_frames_that_are_done_at_once_are_both_seen(stream: Stream) -> None:
    """Where every second frame is held, it is done before anybody could fetch the one before it."""

    async def look(pages: list[Page]) -> None:
        (page,) = pages
        await asyncio.sleep(0.05)
        page.draw()
        for pair in range(1, 4):
            stream.advance(2)
            await page.until(*range(1, 2 * pair + 1))
            page.draw()

    asyncio.run(stream.see(look))


def test_the_next_frame_does_not_wait_for_the_last_to_be_drawn(stream: Stream) -> None:
    async def look(pages: list[Page]) -> None:
        (page,) = pages
        await two_turns(stream, page)

    asyncio.run(stream.see(look))


def test_a_page_that_is_late_gets_the_present_and_nothing_piles_up(stream: Stream) -> None:
    async def look(pages: list[Page]) -> None:
        (page,) = pages
        await two_turns(stream, page)
        for _ in range(20):
            stream.advance(1)
            await asyncio.sleep(0)
        await page.until(1, 2)
        assert page.turns == 2 and len(stream.view.frames) == 2
        page.draw()
        await page.until(1, 2, 22)
        for _ in range(5):
            page.draw()  # more often than it was asked: it gets no more turns under way for that
        await page.until(1, 2, 22)
        for _ in range(5):
            stream.advance(1)
            await asyncio.sleep(0.05)
        assert page.turns <= 6, page.turns

    asyncio.run(stream.see(look))


def test_a_frame_is_encoded_once_for_all_pages(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []

    def encode(image: Any) -> bytes:
        encoded.append(1)
        time.sleep(0.1)
        return b"jpeg"

    monkeypatch.setattr(views, "encode_jpeg", encode)
    stream.advance(3)
    assert not encoded, "nobody is there"

    async def look(pages: list[Page]) -> None:
        for page in pages:
            await page.until(2, 3)

    asyncio.run(stream.see(look, pages=4))
    assert len(encoded) == 2


def test_a_held_frame_shows_the_tokens_that_its_boxes_come_from(stream: Stream) -> None:
    """Or the picture would flash, as every second one has none."""
    stream.view.show(stream.result)
    stream.view.show(dataclasses.replace(stream.result, work=torch.zeros_like(stream.result.work), held=True))
    first, second = (message("gate", frame, []) for frame in stream.view.frames)
    for data in (first, second):
        (length,) = struct.unpack(">I", data[:4])
        about = json.loads(data[4 : 4 + length])
        assert about["flush"] and set(base64.b64decode(about["work"]["share"])) == {255}


class Camera(VideoSource):
    """30 frames/s."""

    live = True

    def __init__(self) -> None:
        super().__init__("camera", 30.0)
        self.closed = threading.Event()

    def _read(self) -> Iterator[VideoFrame]:
        began, number = time.monotonic(), 0
        while not self.closed.wait(max(0.0, began + number / 30 - time.monotonic())):
            image = np.zeros((96, 144, 3), np.uint8)
            cv2.circle(image, (20 + number % 100, 48), 12, (255, 255, 255), -1)
            yield VideoFrame(image, number / 30)
            number += 1

    def close(self) -> None:
        self.closed.set()


def test_a_quick_page_gets_all_that_the_detector_does(tiny_detector: Detector) -> None:
    """Through the real server."""
    client = pytest.importorskip("websockets.sync.client")
    runner = served.PoolRunner(served.StreamPool(tiny_detector, hold=2))
    with served.listening(runner, served.SourceOpener()) as port:
        runner.add(OpenedSource(Camera(), "camera"))
        with client.connect(f"ws://127.0.0.1:{port}/api/live") as page:
            numbers: list[int] = []
            until = time.monotonic() + 3
            while time.monotonic() < until:
                for _ in range(json.loads(page.recv())["frames"]):
                    data = page.recv()
                    numbers.append(json.loads(data[4 : 4 + struct.unpack(">I", data[:4])[0]])["number"])
                page.send("drawn")
    assert numbers == sorted(set(numbers))
    assert len(numbers) > 10 and len(numbers) >= 0.9 * (numbers[-1] - numbers[0]), numbers
