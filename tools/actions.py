"""Action recognition in the tools: what `task=recognition`, or weights of a recogniser, make of them."""

from __future__ import annotations

import csv
import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from common import Data, Gate, progress_bar, say, show_table, warn

from eventful_det.detectors.checkpoints.weight_files import find_weights
from eventful_det.detectors.rf_detr.loading import is_rf_detr
from eventful_det.engine.folder import holds_recogniser, is_engine
from eventful_det.errors import UserError
from eventful_det.files import written_whole
from eventful_det.gating.selector import DEFAULT as SELECTOR
from eventful_det.options import Count, NonNegative, Share, from_values, nearest
from eventful_det.outputs import markdown_table, write_text
from eventful_det.recognition.accuracy import Among, accuracy, per_class, tail, unseen, write_submission
from eventful_det.recognition.checkpoints import (
    is_recogniser,
    load_recogniser,
    read_recogniser,
    save_official,
    save_recogniser,
    save_tadaconv,
    start_from_image,
)
from eventful_det.recognition.config import RecogniserConfig, vivit_b_epic, vivit_b_k400, vivit_tiny
from eventful_det.recognition.data.clip_reader import read_clips
from eventful_det.recognition.data.segments import Segments, read_column, read_durations, read_epic, read_folders
from eventful_det.recognition.data.synthetic_actions import ACTIONS, ActionOptions
from eventful_det.recognition.evaluation import Evaluation, Way, evaluate_clips, sweep_ways
from eventful_det.recognition.recogniser import Recogniser
from eventful_det.recognition.session import DEFAULT as RECOGNITION
from eventful_det.recognition.training.features import FeatureClips, cache_features, cache_views, gated_ways
from eventful_det.recognition.training.samples import Samples, SyntheticClips, VideoClips
from eventful_det.recognition.training.trainer import RecogniserTrainer
from eventful_det.testing import official_vivit
from eventful_det.training.options import TrainOptions

Task = Literal["detection", "recognition"]
MODELS = {"vivit_tiny": vivit_tiny, "vivit_b_epic": vivit_b_epic, "vivit_b_k400": vivit_b_k400}
DEFAULT = "vivit_tiny_synthetic"  # shipped weights
_GROUPS = 20  # participants that are told apart
_STEPS = {"vivit_b_epic": (50, 100, 200), "vivit_b_k400": (24, 48, 96)}  # tokens of the paper's tables


@dataclass(frozen=True, kw_only=True)
class RecognitionOptions:
    """What training a recogniser needs beside `train`; configs/train_net.yaml explains it."""

    stage: Literal["temporal"] | None = None
    budgets: tuple[Share, ...] = (1.0, 0.5, 0.25, 0.125)
    clips: Count = 6000
    noise: NonNegative = 0.1
    features: str | None = None


def recognises(task: Task | None, weights: str | None) -> bool:
    """Whether a tool is to recognise actions: it is told to, or the weights are a recogniser's."""
    if task is not None or weights is None or is_rf_detr(weights):
        return task == "recognition"
    if is_engine(Path(weights)):
        return holds_recogniser(Path(weights))
    try:
        path = find_weights(weights)
    except UserError:
        return False  # detection says what is wrong
    return is_recogniser(path)


def own_gate(gate: Gate) -> Gate:
    """A gate for recognisers: where that of detection is left as it is, the default of recognition stands for it."""
    return gate._replace(selector=RECOGNITION) if gate.selector == SELECTOR else gate


def read_segments(path: str, data: Data, classes: Mapping[str, Sequence[str]] | None) -> Segments:
    """A table of EPIC-Kitchens 100 or a folder per class, by what is there.

    Args:
        path: of the table or folder.
        data: the other paths.
        classes: of the recogniser; None = as the folders say.
    """
    if Path(path).suffix == ".csv":
        names = {key: table for key, table in (("verbs", data.verbs), ("nouns", data.nouns)) if table}
        segments = read_epic(path, data.videos or data.root, **names)
    else:
        heads = [None] if classes is None else list(classes.values())
        segments = read_folders(path, heads[0])
    if segments.missing:
        warn(f"{len(segments.missing)} videos are missing, and {segments.left_out} segments with them")
    return segments


# Evaluation


def evaluate(
    recogniser: Recogniser,
    data: Data,
    gate: Gate | None,
    directory: Path,
    *,
    max_clips: int | None = None,
    hold: int = 1,
    views: Literal["shared", "separate", "both"] = "shared",
    kept: Path | None = None,
) -> dict[str, Any]:
    """Accuracy, multiply-adds and time of one rule, or of all ways of a sweep; returns what `results.json` holds.

    Args:
        recogniser: in evaluation mode.
        data: whose validation split is looked at.
        gate: rule and selector; None = a sweep.
        directory: of the files.
        max_clips: look at so many, evenly spread.
        hold: of the one rule, see `recognise`.
        views: whether temporal views share tubelets.
        kept: see `evaluate_clips`.
    """
    segments = read_segments(data.val, data, recogniser.config.classes)
    count = len(segments) if max_clips is None else min(max_clips, len(segments))
    items = [segments.items[i * len(segments) // count] for i in range(count)]
    kinds = [True, False] if views == "both" else [views == "shared"]
    steps = recogniser.config.steps
    evaluations: list[Evaluation] = []
    with progress_bar() as progress:
        task = progress.add_task("clips", total=count * len(kinds))
        for shared in kinds:
            ways = [Way("rule", *gate, shared, hold)] if gate else list(sweep_ways(shared=shared, steps=steps))
            clips = read_clips(items, recogniser.config, shared)
            evaluations += evaluate_clips(recogniser, clips, ways, lambda _: progress.advance(task), kept)
    groups = groups_of(data, segments)
    rows = [row_of(evaluation, evaluations[0], groups) for evaluation in evaluations]
    cells = cells_of(rows)
    write_text(directory / "accuracy.md", markdown_table(cells, left=len(rows[0])))
    with written_whole(directory / "accuracy.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if {"verb", "noun"} <= recogniser.config.classes.keys() and gate is not None:
        write_submission(directory / "test.json", evaluations[0].scored)
    show_table(cells)
    failed = evaluations[0].failed
    if failed:
        warn(f"{len(failed)} clips could not be read. The first: {next(iter(failed.values()))}")
    classes = {
        head: {str(label): asdict(found) for label, found in of.items()}
        for head, of in per_class(evaluations[0].scored).items()
    }
    return {"rows": rows, "clips": count - len(failed), "failed": failed, "first_by_class": classes}


def groups_of(data: Data, segments: Segments) -> dict[str, Among]:
    """The segments whose accuracy is told apart: of each of few participants, of unseen ones, of rare classes."""
    people = sorted({segment.participant for segment in segments.items} - {""})
    groups = {person: unseen({person}) for person in people if 1 < len(people) <= _GROUPS}
    if data.unseen is not None:
        groups["unseen"] = unseen(read_column(data.unseen, "participant_id"))
    rare = {
        head: [int(label) for label in read_column(table, head)]
        for head, table in (("verb", data.tail_verbs), ("noun", data.tail_nouns))
        if table is not None
    }
    if rare:
        groups["tail"] = tail(rare.get("verb", ()), rare.get("noun", ()))
    return groups


def row_of(evaluation: Evaluation, dense: Evaluation, groups: Mapping[str, Among]) -> dict[str, Any]:
    """A way as a row of a table; percent, GMACs per clip, and milliseconds per clip beside those of the first way."""
    way, scored = evaluation.way, evaluation.scored
    row: dict[str, Any] = {"way": way.name, "views": "shared" if way.shared else "separate"}
    for head, found in evaluation.accuracy.items():
        row |= {f"{head} top-1": round(found.top1, 2), f"{head} top-5": round(found.top5, 2)}
    for group, among in groups.items():
        for head, found in accuracy(scored, among).items():
            row[f"{head} top-1, {group}"] = round(found.top1, 2)
    ratios = [own / other for own, other in zip(evaluation.times, dense.times, strict=True)]
    share = evaluation.gmacs / evaluation.dense_gmacs
    return row | {
        "GMACs": round(evaluation.gmacs, 4),
        "share of dense": round(share, 4),
        "ms": round(1e3 * evaluation.seconds, 2),
        "time of first": round(statistics.median(ratios), 4),
    }


def cells_of(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows as lines of text, the header first."""
    header = list(rows[0])
    return [header, *([_text(row[name]) for name in header] for row in rows)]


def _text(value: object) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


# Training


class TrainingConfig(Protocol):
    """What training a recogniser knows of the options of tools/train_net.py."""

    @property
    def model(self) -> dict[str, Any]:
        """Its name, and sizes that are changed."""

    @property
    def data(self) -> Data:
        """A table or a folder per class; `train: synthetic` renders clips as it goes."""

    @property
    def train(self) -> TrainOptions:
        """As of detection."""

    @property
    def recognition(self) -> RecognitionOptions:
        """What recognition needs beside it."""

    @property
    def start(self) -> str | None:
        """Recogniser to start from."""


def train(config: TrainingConfig, directory: Path, device: torch.device) -> dict[str, Any]:
    """Train a recogniser in a directory and return what `results.json` holds."""
    data, train, options = config.data, config.train, config.recognition
    synthetic = data.train == "synthetic"
    if data.train is None:
        raise UserError("data: there is nothing to train on; give data.train=FOLDER, a table, or synthetic")
    torch.manual_seed(train.seed)
    segments = None if synthetic else read_segments(data.train, data, None)
    recogniser = build(config, {"action": ACTIONS} if segments is None else segments.classes).to(device)
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


def build(config: TrainingConfig, classes: Mapping[str, Sequence[str]]) -> Recogniser:
    """The recogniser to train: that of `start`, or one of a model's sizes, its spatial part from `init` if given.

    Raises:
        UserError: a name is unknown, or sizes do not fit.
    """
    if config.start is not None:
        return load_recogniser(config.start)
    sizes = dict(config.model)
    name, init = sizes.pop("name"), sizes.pop("init", None)
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; {nearest(name, MODELS)}")
    model = MODELS[name]({head: tuple(names) for head, names in classes.items()})
    recogniser = Recogniser(from_values(RecogniserConfig, {**asdict(model), **sizes}, "model"))
    if init:
        start_from_image(recogniser, init)
    return recogniser


# Weights and counts


def convert(
    source: str,
    output: Path,
    dtype: torch.dtype | None,
    notes: Mapping[str, str],
    names: Literal["official", "tadaconv"],
) -> dict[str, Any]:
    """Rewrite a recogniser: `.safetensors` is ours; other suffixes the official code's names, or TAdaConv's."""
    path = find_weights(source)
    found = read_recogniser(path)
    recogniser = load_recogniser(path)
    if output.suffix == ".safetensors":
        save_recogniser(recogniser, output, dtype or torch.float16, {**found.notes, **notes})
    elif dtype not in (None, torch.float32) or notes:
        raise UserError(f"{output}: dtype and notes are for .safetensors; others hold float32 alone")
    else:
        (save_tadaconv if names == "tadaconv" else save_official)(recogniser, output)
    megabytes = output.stat().st_size / 1e6
    say(f"{output}: {megabytes:.1f} MB, from {found.format} names")
    digest = hashlib.sha256(output.read_bytes()).hexdigest()
    return {"input": source, "format": found.format, "output": str(output), "megabytes": megabytes, "sha256": digest}


def count(model: str | None, k: Sequence[int] | None, durations: str | None) -> list[dict[str, Any]]:
    """Operations of published recognisers as the official code counts them, in GMACs: of a step, and of a clip.

    The clip's views are computed each by itself, whatever its length; or they share tubelets, on average over the clips
    of a table, without one in a clip of twice a view's length.
    """
    seconds = None if durations is None else read_durations(durations)
    rows: list[dict[str, Any]] = []
    for name in _STEPS if model is None else [model]:
        config = config_of(name)
        tokens = config.grid[0] * config.grid[1] + 1  # the class token is one of them
        for budget in (None, *(k or _STEPS.get(name, (tokens // 8, tokens // 4, tokens // 2)))):
            if budget is not None and not 1 <= budget <= tokens:
                raise UserError(f"k must be a whole number of 1 to {tokens} tokens, got {budget}")
            step, clip = (
                f(config, budget).total / 1e9 for f in (official_vivit.spatial_step, official_vivit.clip_counts)
            )
            lengths = [2 * config.span] if seconds is None else [round(config.fps * length) for length in seconds]
            shared = official_vivit.shared_counts(config, lengths, budget) / 1e9
            entry = {"model": name, "tokens": tokens, "k": budget, "clips": len(lengths), "step": step, "clip": clip}
            rows.append(entry | {"shared views": shared, "shared / clip": shared / clip})
    return rows


def config_of(model: str) -> RecogniserConfig:
    """Of a model by name."""
    if model not in MODELS:
        raise UserError(f"unknown model {model!r}; {nearest(model, MODELS)}")
    return vivit_tiny({"action": ACTIONS}) if model == "vivit_tiny" else MODELS[model]()  # type: ignore[call-arg]
