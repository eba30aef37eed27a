"""Action recognition in the tools: what `task=recognition`, or weights of a recogniser, make of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from command_line import refuse
from common import AnyDetector, Data, Gate, Side, choose_device, open_detector, say, warn

from eventful_det.detectors.checkpoints.weight_files import find_weights
from eventful_det.detectors.rf_detr.loading import is_rf_detr
from eventful_det.engine.backends import Precision
from eventful_det.engine.folder import holds_recogniser, is_engine
from eventful_det.errors import UserError
from eventful_det.gating.selector import DEFAULT as SELECTOR
from eventful_det.options import Count, Share, nearest
from eventful_det.recognition.checkpoints import (
    is_recogniser,
    load_recogniser,
    read_recogniser,
    save_official,
    save_recogniser,
    save_tadaconv,
)
from eventful_det.recognition.config import RecogniserConfig, vivit_b_epic, vivit_b_k400, vivit_tiny
from eventful_det.recognition.data.segments import Segments, read_durations, read_epic, read_folders
from eventful_det.recognition.data.synthetic_actions import ACTIONS
from eventful_det.recognition.recogniser import Recogniser
from eventful_det.recognition.session import DEFAULT as RECOGNITION
from eventful_det.testing import official_vivit

Task = Literal["detection", "recognition"]
MODELS = {"vivit_tiny": vivit_tiny, "vivit_b_epic": vivit_b_epic, "vivit_b_k400": vivit_b_k400}
DEFAULT = "vivit_tiny_synthetic"  # shipped weights
_STEPS = {"vivit_b_epic": (50, 100, 200), "vivit_b_k400": (24, 48, 96)}  # tokens of the paper's tables


def recognises(task: Task | None, weights: str | None) -> bool:
    """Whether a tool is to recognise actions: it is told to, or the weights are a recogniser's."""
    if task is not None or weights is None:
        return task == "recognition"
    if is_engine(Path(weights)):  # asked first: any folder may be one of RF-DETR
        return holds_recogniser(Path(weights))
    if is_rf_detr(weights):
        return False
    try:
        path = find_weights(weights)
    except UserError:
        return False  # detection says what is wrong
    return is_recogniser(path)


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """What `detect` and `serve` have in common; configs/demo.yaml explains it."""

    positional: ClassVar = ("source",)
    aliases: ClassVar = {"model": "weights", "conf": "min_score"}  # as other detectors call them
    # Of detectors alone:
    boxes: ClassVar = ["labels", "min_score", "hold", "live", "rescore", "track", "short_side", "long_side"]

    task: Task | None
    gate: dict[str, Any]
    weights: str | None
    precision: Precision | Literal["auto"]
    labels: str | None
    min_score: Share | None
    hold: Count | Literal["auto", "adaptive"]
    live: bool
    rescore: bool
    track: bool
    short_side: Side | None
    long_side: Side | None
    device: str


def open_network(tool: str, options: NetworkOptions, sources: Sequence[str | Path]) -> AnyDetector | Recogniser:
    """The detector or recogniser that the options ask for.

    Raises:
        UserError: it cannot be loaded, or an option is not for it.
    """
    if options.gate.get("rule") == "dense":
        refuse(tool, options, ("budget",), "gate=dense recomputes everything; choose gate=rows or gate=paper")
    if not recognises(options.task, options.weights):
        return open_detector(options.weights, options.labels, options.device, sources, options.precision)
    refuse(tool, options, options.boxes, "for detectors; a recogniser of actions has no boxes")
    recogniser = load_recogniser(options.weights or DEFAULT, precision=options.precision)
    return recogniser.to(choose_device(options.device))


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


def cells_of(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows as lines of text, the header first."""
    header = list(rows[0])
    return [header, *([_text(row[name]) for name in header] for row in rows)]


def _text(value: object) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


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
