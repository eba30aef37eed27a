"""Train a detector, or a recogniser of actions.

    python tools/train_net.py                                    # vitdet_tiny on the synthetic data set
    python tools/train_net.py train.steps=500 output=runs/short
    python tools/train_net.py experiment=eventful_finetune       # with gates on, from the shipped weights
    python tools/train_net.py experiment=actions                 # a recogniser, on rendered clips
    torchrun --nproc_per_node=8 tools/train_net.py experiment=vitdet_b_vid    # one process per GPU (or CPU)

The same command goes on from the last checkpoint when a run was cut off. docs/training.md explains all of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import actions
import eval_actions
import torch
import torch.distributed as dist
import train_actions
from common import AnyDetector, Data, Gate, Side, choose_device, command, progress_bar, say, write_results
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from yaml import YAMLError

from eventful_det.data.augmentation import Augmentation
from eventful_det.data.clips import ClipOptions, ClipSet
from eventful_det.data.coco_video import CocoVideo, load_coco_video
from eventful_det.data.labelling.absent import assume_absent
from eventful_det.data.mixed import MixedSet
from eventful_det.data.training_set import Samples, TrainingSet
from eventful_det.detectors.checkpoints.files import load_detector
from eventful_det.detectors.checkpoints.pretrained import init_backbone
from eventful_det.detectors.rf_detr.model import EventfulRFDETR
from eventful_det.detectors.vitdet.config import MODELS, ModelConfig
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.evaluation.sweep.summary import evaluate_detector
from eventful_det.gating.dense import Dense
from eventful_det.gating.selector import DEFAULT as GATE
from eventful_det.options import Count, Positive, from_values, nearest
from eventful_det.outputs import owned, write_text
from eventful_det.recognition.checkpoints import load_recogniser
from eventful_det.training.objective import EventfulObjective, EventfulOptions
from eventful_det.training.options import TrainOptions
from eventful_det.training.probe import probe
from eventful_det.training.rf_detr import TINY, RFDETRObjective, tiny
from eventful_det.training.trainer import Trainer

SAME = ("model", "start", "data", "mix", "augment", "clips", "eventful")  # of the config: what a run is made of


@dataclass(frozen=True)
class Mix:
    """A further file to train on, and how many of its samples come on one of `data.train`."""

    train: str
    ratio: Positive = 1.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What may be asked of the training; configs/train_net.yaml explains it."""

    task: actions.Task | None = None
    recognition: train_actions.RecognitionOptions = train_actions.RecognitionOptions()
    model: dict[str, Any]
    data: Data
    train: TrainOptions
    augment: Augmentation
    clips: ClipOptions | None = None
    eventful: EventfulOptions | None
    start: str | None
    mix: tuple[Mix, ...]
    output: str
    device: str
    probe: bool
    evaluate: bool
    val_every: Count

    def made_of(self) -> dict[str, Any]:
        """What a run is made of, and cannot be continued without; the trainer looks after `train` itself."""
        data = replace(self.data, root="", val="", weights=None)  # no part in training
        return {name: data if name == "data" else getattr(self, name) for name in SAME}


@dataclass(frozen=True, kw_only=True)
class TinyRFDETR:
    """The sizes of configs/model/rf_detr_tiny.yaml."""

    init: str | None = None
    side: Side = 256
    queries: Count = 50
    groups: Count = 4


def is_main() -> bool:
    """Whether this is the process that prints and writes; of several under torchrun the first."""
    return not dist.is_initialized() or dist.get_rank() == 0


def build_model(config: Options, classes: tuple[str, ...]) -> Detector | EventfulRFDETR:
    """The model to train: that of `start` if given, else that of `model`, its backbone started from `model.init`.

    With gates on, a trained detector is needed, of these classes: the shipped default, if `start` is not given.
    """
    if config.eventful is not None:
        return load_detector(config.start)
    if config.start:
        return load_detector(config.start, classes=classes)
    sizes = dict(config.model)
    name = sizes.pop("name")
    if is_main() and str(sizes.get("init")).startswith("timm:"):
        say(f"backbone: {sizes['init']}, from huggingface.co or its cache")
    if name == TINY:
        return tiny(classes, **asdict(from_values(TinyRFDETR, sizes, "model")))
    init = sizes.pop("init", None)
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; {nearest(name, [*MODELS, TINY])}")
    detector = Detector(from_values(ModelConfig, {**asdict(MODELS[name](classes)), **sizes}, "model"))
    if init:
        init_backbone(detector.backbone.net, init)
    return detector


def build_task(
    config: Options, data: list[CocoVideo], detector: Detector | EventfulRFDETR
) -> tuple[Samples, nn.Module | None]:
    """What to train on and what to minimise: stills and the detector's losses, or clips with gates on."""
    augmentation = config.augment
    order = config.train.seed, config.data.repeat_threshold, config.data.emphasis
    ratio = [1.0, *(entry.ratio for entry in config.mix)]
    if config.eventful is None:
        stills = [TrainingSet(part, augmentation, *order) for part in data]
        samples = MixedSet(stills, ratio, config.train.seed)
        return samples, None if isinstance(detector, Detector) else RFDETRObjective(detector)
    if not isinstance(detector, Detector):
        raise UserError("eventful: training with gates on is for ViTDet; leave start out, or name one")
    clips = [ClipSet(part, augmentation, config.clips or ClipOptions(), *order) for part in data]
    objective = EventfulObjective(detector, config.eventful)
    return MixedSet(clips, ratio, config.train.seed), objective


def load_data(path: str | None, names: tuple[str, ...] | None = None) -> CocoVideo:
    """A data set, whose classes have to be `names` if they are given."""
    if path is None:
        raise UserError("data: there is nothing to train on; give data.train=FILE")
    data = load_coco_video(path)
    found = tuple(name for _, name in data.categories)
    if names is not None and found != names:
        raise UserError(f"{path} has the classes {', '.join(found)}; the detector {', '.join(names)}")
    return data


def run(config: Options) -> None:
    """Train with or without torchrun."""
    if "WORLD_SIZE" in os.environ:
        # The others wait while the first process evaluates.
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=6))
    try:
        with owned(Path(config.output)) if is_main() else nullcontext():
            train(config)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train(config: Options) -> None:
    """Train, then write the results."""
    directory, options = Path(config.output), config.train
    if config.model["name"] in actions.MODELS or actions.recognises(config.task, config.start):
        train_recogniser(config)
        return
    device = choose_device(config.device)
    if dist.is_initialized() and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    main_process = is_main()
    first = load_data(config.data.train)
    torch.manual_seed(options.seed)
    detector = build_model(config, tuple(name for _, name in first.categories)).to(device)
    data = [first, *(load_data(entry.train, detector.names) for entry in config.mix)]
    data[0] = assume_absent(load_data(config.data.train, detector.names), config.data.absent)
    validation = load_data(config.data.val, detector.names) if config.evaluate or options.eval_every else None
    samples, objective = build_task(config, data, detector)
    progress = progress_bar()

    def show(step: int, metrics: dict[str, float]) -> None:
        progress.update(task, completed=step, description=f"loss {metrics['loss']:.3f}")

    judge = make_judge(validation, config.val_every) if validation and options.eval_every and main_process else None
    trainer = Trainer(detector, samples, options, directory, show, objective, judge)
    if main_process:
        if trainer.step:
            check_same(config, directory / "config.yaml")
            say(f"resuming at step {trainer.step} from {directory / 'checkpoint.pt'}")
        write_text(directory / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
    if config.probe and trainer.step < options.steps:
        estimate = probe(trainer)
        if main_process:
            say(f"{estimate}, {trainer.ranks} of them" if trainer.ranks > 1 else str(estimate))
    with progress if main_process else nullcontext():
        task = progress.add_task("training", total=options.steps, completed=trainer.step)
        detector = trainer.train()
    if main_process:
        results = {
            "command": command(),
            "steps": options.steps,
            "weights": str(directory / "model.safetensors" if isinstance(detector, Detector) else directory),
            "best_ap50": trainer.best_score if options.eval_every else None,
            "validation": evaluate(validation, config.data.val, detector) if validation and config.evaluate else None,
        }
        write_results(directory, results)


def train_recogniser(config: Options) -> None:
    """Train a recogniser, evaluate it, and write the results."""
    directory, device = Path(config.output), choose_device(config.device)
    main_process = is_main()
    how = (config.train, config.recognition)
    results = train_actions.train(config.model, config.start, config.data, *how, directory, device)
    if main_process:
        if config.evaluate:
            recogniser = load_recogniser(results["weights"])
            dense = Gate(Dense(), GATE)
            results["validation"] = eval_actions.evaluate(recogniser, config.data, dense, directory)["rows"]
        write_results(directory, {"command": command(), **results})


def check_same(config: Options, path: Path) -> None:
    """Make sure that a run goes on with what it was begun with.

    Raises:
        UserError: it would not.
    """
    if not path.is_file():
        return
    try:
        begun = from_values(Options, cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path))), "").made_of()
    except (OSError, ValueError, TypeError, AttributeError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} does not say what the run was begun with ({error}); choose another output") from error
    changed = [name for name, value in config.made_of().items() if value != begun[name]]
    if changed:
        raise UserError(f"{path}: the run was begun with other values of {', '.join(changed)}; choose another output")


def evaluate(data: CocoVideo, path: str, detector: Detector | EventfulRFDETR) -> dict[str, Any]:
    """Average precision and more of the dense detector on the validation split."""
    with progress_bar() as progress:
        task = progress.add_task("evaluating", total=sum(len(video.frames) for video in data.videos))
        scores = evaluate_detector(cast(AnyDetector, detector.eval()), data, on_frame=lambda _: progress.advance(task))
    say(f"AP50 {100 * scores['ap50']:.1f}, AP {100 * scores['ap']:.1f} on {path}")
    return scores


def make_judge(data: CocoVideo, every: int) -> Callable[[Detector | EventfulRFDETR], dict[str, float]]:
    """What the trainer calls now and then: average precision on a part of the validation split."""
    part = CocoVideo(data.categories, data.videos[::every], data.image_root)

    def judge(detector: Detector | EventfulRFDETR) -> dict[str, float]:
        training = detector.training
        scores = evaluate_detector(cast(AnyDetector, detector.eval()), part)
        detector.train(training)
        return {name: scores[name] for name in ("ap", "ap50", "ap75")}

    return judge


if __name__ == "__main__":
    from command_line import start

    start("train_net")
