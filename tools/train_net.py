"""Train a detector.

    python tools/train_net.py                                    # vitdet_tiny on the synthetic data set
    python tools/train_net.py train.steps=500 output=runs/short
    torchrun --nproc_per_node=2 tools/train_net.py               # one process per GPU (or CPU)

The same command goes on from the last checkpoint when a run was cut off.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.distributed as dist
from common import choose_device, console, plain, tool, write_results
from omegaconf import DictConfig, OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eventful_det.data.augmentation import Augmentation
from eventful_det.data.coco_video import load_coco_video
from eventful_det.data.training_set import TrainingSet
from eventful_det.errors import UserError
from eventful_det.evaluation.summary import evaluate_detector, jsonable
from eventful_det.models.config import MODELS, ModelConfig
from eventful_det.models.detector import Detector
from eventful_det.models.pretrained import init_backbone
from eventful_det.training.trainer import Trainer, TrainOptions


def build_model(config: DictConfig, classes: tuple[str, ...]) -> Detector:
    """The model of a config, its backbone started from `model.init` if given."""
    sizes = dict(plain(config.model))
    name, init = sizes.pop("name"), sizes.pop("init", None)
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    detector = Detector(ModelConfig.from_dict({**asdict(MODELS[name](classes)), **sizes}))
    if init:
        init_backbone(detector.backbone.net, init)
    return detector


def train(config: DictConfig) -> None:
    """Train, then write the results."""
    directory = Path(config.output)
    device = choose_device(config.device)
    if dist.is_initialized() and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    main_process = not dist.is_initialized() or dist.get_rank() == 0
    options = TrainOptions(**plain(config.train))
    augmentation = Augmentation(**plain(config.augment))
    data = load_coco_video(config.data.train)
    torch.manual_seed(options.seed)
    detector = build_model(config, tuple(name for _, name in data.categories)).to(device)
    samples = TrainingSet(data, augmentation, options.seed, config.data.repeat_threshold)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
    with progress if main_process else nullcontext():
        task = progress.add_task("training", total=options.steps)

        def show(step: int, metrics: dict[str, float]) -> None:
            progress.update(task, completed=step, description=f"loss {metrics['loss']:.3f}")

        trainer = Trainer(detector, samples, options, directory, show)
        if main_process:
            OmegaConf.save(config, directory / "config.yaml", resolve=True)
            if trainer.step:
                console.print(f"resuming at step {trainer.step} from {directory / 'checkpoint.pt'}")
        detector = trainer.train()
    if main_process:
        results = {
            "command": " ".join(sys.argv),
            "steps": options.steps,
            "weights": str(directory / "model.safetensors"),
            "validation": evaluate(config, detector) if config.evaluate else None,
        }
        write_results(directory, results)


def evaluate(config: DictConfig, detector: Detector) -> dict[str, Any]:
    """Average precision of the dense detector on the validation split."""
    data = load_coco_video(config.data.val)
    columns = [TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(len(video.frames) for video in data.videos))
        scores = evaluate_detector(detector, data, on_frame=lambda _: progress.advance(task))
    console.print(f"AP50 {100 * scores['ap50']:.1f}, AP {100 * scores['ap']:.1f} on {config.data.val}")
    return jsonable(scores)


@hydra.main(version_base="1.3", config_path="../configs", config_name="train_net")
@tool
def main(config: DictConfig) -> None:
    """Entry point, with or without torchrun."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        train(config)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
