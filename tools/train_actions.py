"""Training of recognisers of actions for tools/train_net.py: end to end, or in two stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from actions import MODELS, read_segments
from common import Data, progress_bar, warn

from eventful_det.errors import UserError
from eventful_det.options import Count, NonNegative, Share, from_values, nearest
from eventful_det.recognition.checkpoints import (
    load_recogniser,
    start_from_image,
)
from eventful_det.recognition.config import RecogniserConfig
from eventful_det.recognition.data.segments import Segments
from eventful_det.recognition.data.synthetic_actions import ACTIONS, ActionOptions
from eventful_det.recognition.recogniser import Recogniser
from eventful_det.recognition.training.features import FeatureClips, cache_features, cache_views, gated_ways
from eventful_det.recognition.training.samples import Samples, SyntheticClips, VideoClips
from eventful_det.recognition.training.trainer import RecogniserTrainer
from eventful_det.training.options import TrainOptions


@dataclass(frozen=True, kw_only=True)
class RecognitionOptions:
    """What training a recogniser needs beside `train`; configs/train_net.yaml explains it."""

    stage: Literal["temporal"] | None = None
    budgets: tuple[Share, ...] = (1.0, 0.5, 0.25, 0.125)
    clips: Count = 6000
    noise: NonNegative = 0.1
    features: str | None = None


def train(
    model: dict[str, Any],
    start: str | None,
    data: Data,
    train: TrainOptions,
    options: RecognitionOptions,
    directory: Path,
    device: torch.device,
) -> dict[str, Any]:
    """Train a recogniser in a directory and return what `results.json` holds.

    Args:
        model, start: see `build`.
        data: a table or a folder per class; `train: synthetic` renders clips as it goes.
        train: as of detection.
        options: what recognition needs beside it.
        directory: of the run.
        device: to train on.
    """
    synthetic = data.train == "synthetic"
    if data.train is None:
        raise UserError("data: there is nothing to train on; give data.train=FOLDER, a table, or synthetic")
    torch.manual_seed(train.seed)
    segments = None if synthetic else read_segments(data.train, data, None)
    classes = {"action": ACTIONS} if segments is None else segments.classes
    recogniser = build(model, start, classes).to(device)
    samples: Samples
    if options.stage == "temporal":
        folder = Path(options.features) if options.features else directory / "features"
        cache(recogniser.eval(), segments, options, train.seed, folder)
        samples = FeatureClips(folder, train.seed, options.noise)
    elif segments is None:
        samples = rendered_clips(recogniser, options, train.seed)
    else:
        samples = VideoClips(recogniser, segments, train.seed)
    with progress_bar() as progress:
        task = progress.add_task("training", total=train.steps)

        def show(step: int, metrics: dict[str, float]) -> None:
            progress.update(task, completed=step, description=f"loss {metrics['loss']:.3f}")

        trainer = RecogniserTrainer(recogniser, samples, train, directory, show)
        trainer.train()
    return {"steps": trainer.step, "weights": str(directory / "model.safetensors")}


def rendered_clips(
    recogniser: Recogniser, options: RecognitionOptions, seed: int, *, keep: bool = True
) -> SyntheticClips:
    """Synthetic actions in the size of a recogniser."""
    height, width = recogniser.config.size
    actions = ActionOptions(width, height, recogniser.config.span)
    return SyntheticClips(recogniser, actions, seed, count=options.clips, keep=keep)


def cache(
    recogniser: Recogniser, segments: Segments | None, options: RecognitionOptions, seed: int, folder: Path
) -> None:
    """The spatial outputs of all clips, gated; those of an interrupted run are kept."""
    ways = gated_ways(options.budgets)
    with progress_bar() as progress:
        task = progress.add_task("spatial outputs", total=options.clips if segments is None else len(segments))

        def show(done: int) -> None:
            progress.update(task, completed=done)

        if segments is None:
            samples = rendered_clips(recogniser, options, seed, keep=False)
            cache_views(recogniser, samples, options.clips, folder, ways, seed, show)
        elif failed := cache_features(recogniser, segments, folder, ways, seed, show):
            warn(f"{len(failed)} clips could not be read. The first: {next(iter(failed.values()))}")


def build(model: dict[str, Any], start: str | None, classes: Mapping[str, Sequence[str]]) -> Recogniser:
    """The recogniser to train: that of `start`, or one of a model's sizes, its spatial part from `init` if given.

    Raises:
        UserError: a name is unknown, or sizes do not fit.
    """
    if start is not None:
        return load_recogniser(start)
    sizes = dict(model)
    name, init = sizes.pop("name"), sizes.pop("init", None)
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; {nearest(name, MODELS)}")
    standard = MODELS[name]({head: tuple(names) for head, names in classes.items()})
    recogniser = Recogniser(from_values(RecogniserConfig, {**asdict(standard), **sizes}, "model"))
    if init:
        start_from_image(recogniser, init)
    return recogniser
