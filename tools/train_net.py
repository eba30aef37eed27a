"""Train a detector.

    python tools/train_net.py                                    # vitdet_tiny on the synthetic data set
    python tools/train_net.py train.steps=500 output=runs/short
    python tools/train_net.py experiment=eventful_finetune       # with gates on, from the shipped weights
    torchrun --nproc_per_node=8 tools/train_net.py experiment=vitdet_b_vid    # one process per GPU (or CPU)

The same command goes on from the last checkpoint when a run was cut off. docs/training.md explains all of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.distributed as dist
from common import choose_device, console, plain, tool, write_results
from omegaconf import DictConfig, OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from eventful_det.data.absent import assume_absent
from eventful_det.data.augmentation import Augmentation
from eventful_det.data.clips import ClipOptions, ClipSet
from eventful_det.data.coco_video import CocoVideo, load_coco_video
from eventful_det.data.mixed import MixedSet
from eventful_det.data.training_set import Samples, TrainingSet
from eventful_det.errors import UserError
from eventful_det.evaluation.summary import evaluate_detector, jsonable
from eventful_det.models.checkpoints import load_detector
from eventful_det.models.config import MODELS, ModelConfig
from eventful_det.models.detector import Detector
from eventful_det.models.pretrained import init_backbone
from eventful_det.training.objective import EventfulObjective, EventfulOptions
from eventful_det.training.options import TrainOptions
from eventful_det.training.probe import probe
from eventful_det.training.trainer import Trainer

SAME = ("model", "start", "data", "mix", "augment", "clips", "eventful")  # of the config: what a run is made of


def build_model(config: DictConfig, classes: tuple[str, ...]) -> Detector:
    """The model to train: that of `start` if given, else that of `model`, its backbone started from `model.init`.

    With gates on, a trained detector is needed, of these classes: the shipped default, if `start` is not given.
    """
    if config.eventful is not None:
        return load_detector(config.start)
    if config.start:
        return load_detector(config.start, classes=classes)
    sizes = dict(plain(config.model))
    name, init = sizes.pop("name"), sizes.pop("init", None)
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    detector = Detector(ModelConfig.from_dict({**asdict(MODELS[name](classes)), **sizes}))
    if init:
        init_backbone(detector.backbone.net, init)
    return detector


def build_task(config: DictConfig, data: list[CocoVideo], detector: Detector) -> tuple[Samples, nn.Module | None]:
    """What to train on and what to minimise: stills and the detector's losses, or clips with gates on."""
    augmentation = Augmentation(**plain(config.augment))
    order = config.train.seed, config.data.repeat_threshold, plain(config.data.emphasis)
    ratio = [1.0, *(entry.ratio for entry in config.mix)]
    if config.eventful is None:
        stills = [TrainingSet(part, augmentation, *order) for part in data]
        return MixedSet(stills, ratio, config.train.seed), None
    clips = [ClipSet(part, augmentation, ClipOptions(**plain(config.clips)), *order) for part in data]
    objective = EventfulObjective(detector, EventfulOptions(**plain(config.eventful)))
    return MixedSet(clips, ratio, config.train.seed), objective


def check_classes(path: str, data: CocoVideo, names: tuple[str, ...]) -> CocoVideo:
    """The data set, whose classes have to be `names`."""
    found = tuple(name for _, name in data.categories)
    if found != names:
        raise UserError(f"{path} has the classes {', '.join(found)}; the detector {', '.join(names)}")
    return data


def train(config: DictConfig) -> None:
    """Train, then write the results."""
    directory = Path(config.output)
    device = choose_device(config.device)
    if dist.is_initialized() and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    main_process = not dist.is_initialized() or dist.get_rank() == 0
    options = TrainOptions(**plain(config.train))
    paths = [config.data.train, *(entry.train for entry in config.mix)]
    data = [load_coco_video(path) for path in paths]
    data[0] = assume_absent(data[0], plain(config.data.absent))
    torch.manual_seed(options.seed)
    detector = build_model(config, tuple(name for _, name in data[0].categories)).to(device)
    data = [check_classes(path, part, detector.names) for path, part in zip(paths, data, strict=True)]
    samples, objective = build_task(config, data, detector)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)

    def show(step: int, metrics: dict[str, float]) -> None:
        progress.update(task, completed=step, description=f"loss {metrics['loss']:.3f}")

    judge = make_judge(config) if options.eval_every and main_process else None
    trainer = Trainer(detector, samples, options, directory, show, objective, judge)
    if main_process:
        if trainer.step:
            check_same(config, directory / "config.yaml")
        OmegaConf.save(config, directory / "config.yaml", resolve=True)
        if trainer.step:
            console.print(f"resuming at step {trainer.step} from {directory / 'checkpoint.pt'}")
    if config.probe and trainer.step < options.steps:
        estimate = probe(trainer)
        if main_process:
            console.print(f"{estimate}, {trainer.ranks} of them" if trainer.ranks > 1 else str(estimate))
    with progress if main_process else nullcontext():
        task = progress.add_task("training", total=options.steps, completed=trainer.step)
        detector = trainer.train()
    if main_process:
        results = {
            "command": " ".join(sys.argv),
            "steps": options.steps,
            "weights": str(directory / "model.safetensors"),
            "best_ap50": trainer.best_score if options.eval_every else None,
            "validation": evaluate(config, detector) if config.evaluate else None,
        }
        write_results(directory, results)


def check_same(config: DictConfig, path: Path) -> None:
    """Make sure that a run goes on with what it was begun with; the trainer looks after `train` itself.

    Raises:
        UserError: it would not.
    """
    before = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
    now = OmegaConf.to_container(config, resolve=True)
    assert isinstance(before, dict) and isinstance(now, dict)
    changed = [key for key in SAME if key in before and before[key] != now.get(key)]
    if changed:
        raise UserError(f"{path}: the run was begun with other values of {', '.join(changed)}; choose another output")


def evaluate(config: DictConfig, detector: Detector) -> dict[str, Any]:
    """Average precision and more of the dense detector on the validation split."""
    data = check_classes(config.data.val, load_coco_video(config.data.val), detector.names)
    columns = [TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(len(video.frames) for video in data.videos))
        scores = evaluate_detector(detector, data, on_frame=lambda _: progress.advance(task))
    console.print(f"AP50 {100 * scores['ap50']:.1f}, AP {100 * scores['ap']:.1f} on {config.data.val}")
    return jsonable(scores)


def make_judge(config: DictConfig) -> Callable[[Detector], dict[str, float]]:
    """What the trainer calls now and then: average precision on a part of the validation split."""
    whole = load_coco_video(config.data.val)
    data = CocoVideo(whole.categories, whole.videos[:: config.val_every], whole.image_root)

    def judge(detector: Detector) -> dict[str, float]:
        scores = evaluate_detector(detector, check_classes(config.data.val, data, detector.names))
        return {name: scores[name] for name in ("ap", "ap50", "ap75")}

    return judge


@hydra.main(version_base="1.3", config_path="../configs", config_name="train_net")
@tool
def main(config: DictConfig) -> None:
    """Entry point, with or without torchrun."""
    if "WORLD_SIZE" in os.environ:
        # The others wait while the first process evaluates.
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=6))
    try:
        train(config)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
