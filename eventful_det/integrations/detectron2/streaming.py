"""Frames from files, cameras and addresses for detectron2's models: a loader, and a predictor for videos."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import count, islice

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import build_model
from torch import nn

from eventful_det.data.source import Source
from eventful_det.data.video import open_source
from eventful_det.detectors.checkpoints.weight_files import load_exactly, read_tensors
from eventful_det.files import JsonObject
from eventful_det.gating.selector import Budget, Selector
from eventful_det.integrations.detectron2.loading import Mapper, VIDMapper
from eventful_det.integrations.detectron2.rcnn import EventfulRCNN

_video_ids = (f"source {n}" for n in count())


class SourceLoader(Iterable[list[JsonObject]]):
    """Batches of the next frame of each of some sources that still has one, as inputs of `EventfulRCNN`.

    Every iteration opens the sources anew. Besides what the mapper makes of them, entries have the "frame"
    `(h, w, 3)` uint8 RGB as it came, its "timestamp" in seconds or None, and "flush" behind a gap of a camera.

    Args:
        sources: video files, webcam numbers, addresses, folders of pictures ..., see `open_source`.
        mapper: makes the inputs of the model.
    """

    def __init__(self, sources: Sequence[Source], mapper: Mapper) -> None:
        self.sources, self.mapper = sources, mapper

    def __iter__(self) -> Generator[list[JsonObject], None, None]:
        with ExitStack() as cleanup:
            opened = [cleanup.enter_context(open_source(source)) for source in self.sources]
            playing = {next(_video_ids): (source.name, enumerate(source)) for source in opened}
            while playing:
                batch = []
                for video_id, (name, frames) in list(playing.items()):
                    number, frame = next(frames, (0, None))
                    if frame is None:
                        del playing[video_id]
                        continue
                    entry = {"file_name": name, "frame": frame.image, "timestamp": frame.timestamp}
                    entry |= {"video_id": video_id, "frame_id": number, "flush": frame.resumed}
                    if (mapped := self.mapper(entry)) is not None:
                        batch.append(mapped)
                if batch:
                    yield batch


class VideoPredictor:
    """Detects in videos with an `EventfulRCNN`, as `DefaultPredictor` does in pictures.

    ::

        predictor = VideoPredictor(cfg)  # or VideoPredictor(model), of a LazyConfig
        predictor.model.budget = "40GMACs"  # or 0.25, 400, "50ms": may change between any two frames
        for output in predictor("my.mp4"):
            output["instances"], output["cost"].total, output["frame"]

    `VideoPredictor(cfg)` builds the model of a yacs config and loads MODEL.WEIGHTS with `load_weights`.

    Args:
        model: in evaluation mode from now on.
        budget: of the model, see `EventfulRCNN`; None = as it is.
    """

    @configurable
    def __init__(self, model: EventfulRCNN, *, budget: Budget | Selector | str = None) -> None:
        self.model = model.eval()
        sides, colours = model.input_transform, model.input_format or "RGB"
        self.mapper = VIDMapper(short_side=sides.short_side, long_side=sides.long_side, image_format=colours)
        if budget is not None:
            model.budget = budget

    @classmethod
    def from_config(cls, cfg: CfgNode) -> JsonObject:
        """Arguments from a yacs config with the nodes of `add_eventful_config`."""
        model = build_model(cfg)
        if cfg.MODEL.WEIGHTS:
            load_weights(model, cfg.MODEL.WEIGHTS)
        return {"model": model}

    def __call__(self, source: Source, max_frames: int | None = None) -> Iterator[JsonObject]:
        """Detect in a source, lazily and in constant memory.

        Yields:
            For each frame the model's output, in pixels of the "frame" `(h, w, 3)` uint8 RGB that is in it, too, with
            its "timestamp".
        """
        entry: JsonObject = {}
        with closing(iter(SourceLoader([source], self.mapper))) as batches:
            try:
                for (entry,) in islice(batches, max_frames):
                    with torch.no_grad():
                        (output,) = self.model([entry])
                    yield {**output, "frame": entry["frame"], "timestamp": entry["timestamp"]}
            finally:
                self.model.states.forget(entry.get("video_id"))


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a checkpoint of detectron2 (.pkl, .pth) or of ours (.safetensors) without running anything in it.

    `DetectionCheckpointer` unpickles, which lets a file do what it likes; this reads tensors alone.

    Raises:
        UserError: the file is missing, truncated or holds more than data; or a key is missing, unexpected or of another
            shape. Pixel statistics and anchors, which old files hold, are no part of the weights.
    """
    load_exactly(model, read_tensors(path).tensors, str(path), ("pixel_mean", "pixel_std", "*cell_anchors*"))
