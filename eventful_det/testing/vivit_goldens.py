"""Recordings of the official action recogniser, replayed: views, spatial and temporal model, heads, counts, choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.files import JsonObject
from eventful_det.gating.selector import Select
from eventful_det.gating.windows import Grid
from eventful_det.recognition.config import RecogniserConfig, numbered
from eventful_det.recognition.data.views import average, cut_views
from eventful_det.recognition.layers import SubModel
from eventful_det.recognition.recogniser import Recogniser
from eventful_det.testing import official_vivit
from eventful_det.testing.goldens import Recorded
from eventful_det.testing.official import OfficialCounts
from eventful_det.testing.replay import (
    TOLERANCE,
    ReplayedBlock,
    all_agree,
    compare_counts,
    pair,
    print_table,
    recorded_selector,
    relative_error,
    replaying,
    run_cells,
    verdict,
)

VIVIT_FORMAT = "eventful-vivit-golden/1"

_GATES = ("qkv_gate", "projection_gate", "mlp_gate")  # of a block, in the order in which they are asked
_HEADER = ("part", "class", "policy", "views", "options", "error", "counts", "indices", "verdict")
_VIEWS = 1e-5  # largest accepted difference of a preprocessed pixel, in standard deviations


@dataclass
class VivitGolden:
    """A recording.

    Attributes:
        recogniser: with the recorded weights.
        clips: `(T, 3, H, W)` uint8 each.
        data: the rest of the file, see its description.
    """

    recogniser: Recogniser
    clips: list[Tensor]
    data: JsonObject


@dataclass
class Compared:
    """How a replay compares.

    Attributes:
        error: largest ||ours - official|| / ||official|| of everything that was computed.
        counts: "equal", or the kinds that differ.
        recorders: the selectors, which noted how their choices compare.
    """

    error: float
    counts: str
    recorders: list[Recorded]

    @property
    def passed(self) -> bool:
        """Whether everything agrees."""
        different = any(recorder.outcomes["different"] for recorder in self.recorders)
        return self.error < TOLERANCE and self.counts == "equal" and not different


class EventfulStack:
    """The blocks of a sub-model as one stream."""

    def __init__(self, model: SubModel, grid: Grid, block_class: str, options: JsonObject, select: Select) -> None:
        self.model, self.grid = model, grid
        self.blocks = [ReplayedBlock(one, grid, block_class, options, select, prefix=1) for one in model.blocks()]

    def __call__(self, x: Tensor) -> tuple[Tensor, OfficialCounts]:
        """Tokens `(N, D)` of a step to those after the last block, `(1 + N, D)`, and what was counted."""
        x = self.model.embed(x, self.grid)
        counts = OfficialCounts(add=x.numel())  # positions
        for block in self.blocks:
            x, more = block(x)
            counts += more
        return x, counts


def load_vivit(data: JsonObject) -> VivitGolden:
    """Build the recogniser of a recording.

    Raises:
        UserError: the recording is malformed.
    """
    config, weights = data["config"], data["state_dict"]
    spatial, temporal = config["spatial"], config["temporal"]
    clips = [clip[0] for clip in data["clips"]]
    if not data["runs"]:
        raise UserError("no runs")
    model = Recogniser(
        RecogniserConfig(
            classes={"action": numbered(config["classes"])},
            dim=config["dim"],
            depth=spatial["depth"],
            heads=spatial["heads"],
            mlp=_hidden(weights, "spatial_model"),
            temporal_depth=temporal["depth"],
            temporal_heads=temporal["heads"],
            temporal_mlp=_hidden(weights, "temporal_model"),
            position_grid=pair(spatial["position_encoding_size"]),
            tubelet=cast(tuple[int, int, int], tuple(config["tubelet_shape"])),
            **_clip_options(config),
        )
    )
    model.load_state_dict(weights)
    return VivitGolden(model.eval(), clips, data)


def _hidden(weights: dict[str, Tensor], model: str) -> int:
    return weights[f"{model}.backbone.blocks.0.mlp_1.weight"].shape[0]


def _clip_options(config: JsonObject) -> JsonObject:
    """What a recorded config says of clips, as `RecogniserConfig` has it."""
    frames, channels, *size = config["input_shape"]
    mean, std = (
        tuple(map(float, [values] * channels if isinstance(values, (int, float)) else values))
        for values in (config["normalize_mean"], config["normalize_std"])
    )
    return {
        "frames": frames,
        "size": tuple(size),
        "mean": mean,
        "std": std,
        "stride": config["temporal_stride"],
        "spatial_views": config["spatial_views"],
        "temporal_views": config["temporal_views"],
    }


def check_views(golden: VivitGolden, recorded: JsonObject) -> float:
    """Cut a clip into views; the largest difference from the recorded pixels and means; infinite for another shape."""
    options = _clip_options({**golden.data["config"], **recorded["changes"]})
    views = cut_views(golden.clips[recorded["clip"]], dataclasses.replace(golden.recogniser.config, **options))[None]
    if list(views.shape) != list(recorded["shape"]):
        return float("inf")
    pairs = (
        (views[:, :, 0], recorded["first"]),
        (views[:, :, -1], recorded["last"]),
        (views.flatten(3).mean(3), recorded["means"]),
    )
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


@torch.no_grad()
def check_run(golden: VivitGolden, run: JsonObject) -> Compared:
    """Replay a run: clips to class probabilities."""
    model = golden.recogniser
    config = dataclasses.replace(model.config, spatial_views=run["spatial_views"], temporal_views=run["temporal_views"])
    views = torch.cat([cut_views(golden.clips[clip], config) for clip in run["clips"]])  # (B * V, t, c, h, w)
    count = config.spatial_views * config.temporal_views
    # Groups of streams whose operations were counted together: all of them, or the clips of one view after the other.
    order = range(len(views))
    groups = [list(order)] if run["batch_views"] else [list(order[v::count]) for v in range(count)]
    outputs = views.new_empty(model.config.steps, len(views), model.config.dim)
    differing, recorders, tokens = set[str](), [], []
    for group, members in enumerate(groups):
        counted = [OfficialCounts()] * model.config.steps
        for place, stream in enumerate(members):
            recorded = _recorder(run, len(model.spec.blocks), group, place, model.config.steps)
            recorders.append(recorded)
            for step, (x, more) in enumerate(_spatial_steps(model, views[stream], run, recorded)):
                outputs[step, stream] = model.spatial_model.layer_norm(x[0])
                counted[step] += more
                if stream == 0:
                    tokens.append(x)
        differing.add(compare_counts(counted, run["counts"][group], OfficialCounts(), set()))
    errors = [relative_error(outputs, run["spatial"])]
    if run["tokens"] is not None:
        errors.append(relative_error(torch.stack(tokens).flatten(1), run["tokens"][:, 0].flatten(1)))
    if run["temporal_class"] != "Block":
        raise UserError(f"a temporal model of class {run['temporal_class']} in a run is unknown; known: Block")
    temporal = model.temporal_model(outputs.transpose(0, 1))  # (B * V, D)
    logits = model.classifier(temporal)
    clips = torch.stack([average(part) for part in logits.unflatten(0, (-1, count))]).softmax(-1)
    for ours, name in ((temporal, "temporal"), (logits, "logits"), (clips, "output")):
        errors.append(relative_error(ours, run[name]))
    differing.add(_compare_total(official_vivit.temporal_window(model.config), len(views), run["temporal_counts"]))
    differing.add(_compare_total(official_vivit.head(model.config), len(views), run["head_counts"]))
    return Compared(max(errors), _worst(differing), recorders)


def _compare_total(ours: OfficialCounts, number: int, theirs: dict[str, int]) -> str:
    return compare_counts([official_vivit.times(ours, number)], [theirs], OfficialCounts(), set())


def _worst(verdicts: set[str]) -> str:
    return "; ".join(sorted(verdicts - {"equal"})) or "equal"


def _spatial_steps(model: Recogniser, view: Tensor, run: JsonObject, select: Select) -> Any:
    """Tokens after the last block and counts of every step of a view `(t, c, h, w)`."""
    embedded = model.embedding(model.tubelets(view[None])[0])  # (T', D, H, W)
    grid = (embedded.shape[2], embedded.shape[3])
    stack = EventfulStack(model.spatial_model, grid, run["spatial_class"], run["options"], select)
    for x in embedded.flatten(2).mT:  # (N, D)
        yield stack(x)


def _recorder(run: JsonObject, blocks: int, group: int, stream: int, steps: int) -> Recorded:
    """The run's policy, beside what the gates selected in one stream, in the order in which they are asked."""
    recorded = {name: steps_of[group] for name, steps_of in (run["indices"] or {}).items()}
    return _recorded(run["policy"], recorded, blocks, stream, steps)


def _recorded(
    policy: JsonObject | None, recorded: dict[str, Sequence[Tensor]], blocks: int, stream: int, steps: int
) -> Recorded:
    if unknown := set(recorded) - {f"blocks.{i}.{gate}" for i in range(blocks) for gate in _GATES}:
        raise UserError(f"unknown gates {', '.join(sorted(unknown)[:3])}; known: blocks.0.qkv_gate and the like")
    gates = [recorded.get(f"blocks.{i}.{gate}") for i in range(blocks) for gate in _GATES]
    choices = [None if gate is None else gate[step][stream].long() for step in range(steps - 1) for gate in gates]
    return Recorded(recorded_selector(policy), choices if recorded else None)


@torch.no_grad()
def check_temporal_run(golden: VivitGolden, run: JsonObject) -> Compared:
    """Replay the temporal model on one window after the other, as one stream."""
    model, windows = golden.recogniser, golden.data["temporal_windows"]
    temporal = model.temporal_model
    recorder = _recorded(run["policy"], run["indices"] or {}, len(temporal.blocks()), 0, len(windows))
    stack = EventfulStack(temporal, temporal.grid, run["temporal_class"], run.get("options", {}), recorder)
    outputs, counts = zip(*(stack(window) for window in windows), strict=True)
    features = torch.stack([temporal.layer_norm(x[:1]) for x in outputs])  # (windows, 1, D)
    error = relative_error(features, run["temporal"])
    error = max(error, relative_error(model.classifier(features), run["logits"]))
    return Compared(error, compare_counts(list(counts), run["counts"], OfficialCounts(), set()), [recorder])


def check_vivit(path: Path, data: JsonObject) -> bool:
    """Replay everything in a recording and print how each part compares; returns whether all agree.

    Raises:
        UserError: the recording cannot be used.
    """
    rows: list[tuple[str, ...]] = []
    with replaying(f"{path}: model"):
        golden = load_vivit(data)
    for number, recorded in enumerate(data.get("preprocessing", []), 1):
        with replaying(f"{path}: preprocessing {number}"):
            difference = check_views(golden, recorded)
        rows.append(("views", "", "", "", "", f"{difference:.1e}", "", "", verdict(difference < _VIEWS)))
    for number, run in enumerate(data["runs"], 1):
        with replaying(f"{path}: run {number}"):
            views = f"{len(run['clips'])} x {run['spatial_views'] * run['temporal_views']}"
            rows.append(_row("clips", run["spatial_class"], run, views, check_run(golden, run)))
    for number, run in enumerate(data.get("temporal_runs", []), 1):
        with replaying(f"{path}: temporal run {number}"):
            rows.append(_row("windows", run["temporal_class"], run, "", check_temporal_run(golden, run)))
    config = golden.recogniser.config
    title = f"{config.grid[0]} x {config.grid[1]} tokens, {config.steps} tubelets of {config.tubelet[0]} frames"
    print_table(f"{path}: {title}", _HEADER, rows, "over steps, streams and outputs; of views, of a pixel")
    return all_agree(rows, "parts")


def _row(part: str, name: str, run: JsonObject, views: str, result: Compared) -> tuple[str, ...]:
    policy, options = run_cells(run)
    indices = Recorded.summary(result.recorders)
    return (part, name, policy, views, options, f"{result.error:.1e}", result.counts, indices, verdict(result.passed))
