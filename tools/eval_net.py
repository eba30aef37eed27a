"""Evaluate a detector on video: average precision, multiply-adds, time.

    python tools/eval_net.py                                     # the shipped weights on the synthetic data set
    python tools/eval_net.py gate=dense weights=runs/train/model.safetensors
    python tools/eval_net.py eval=sweep                          # budgets and baselines: CSV, table, plot
    python tools/eval_net.py eval=sweep max_videos=2 max_frames=20
    python tools/eval_net.py eval=sweep data=clips               # your own, labelled or not: agreement with dense

The same command goes on where a killed run was, and does not run finished videos again; `torchrun --nproc_per_node=N`
shares the videos out between processes.

Writes results.json to `output`; beside it coco_results.json (detections of a single evaluation), or sweep.csv,
sweep.json, sweep.md and sweep.png.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any, cast

import hydra
import torch
import torch.distributed as dist
from common import build_rule, choose_device, console, tool, write_results
from omegaconf import DictConfig, OmegaConf, open_dict
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from eventful_det.data.coco_video import CocoVideo, load_coco_video
from eventful_det.data.remap import for_classes
from eventful_det.errors import UserError
from eventful_det.evaluation import report
from eventful_det.evaluation.detection import labelled_frames
from eventful_det.evaluation.flushes import ap50_since_flush
from eventful_det.evaluation.store import ResultStore, file_hash
from eventful_det.evaluation.summary import jsonable, row_of, rows_of
from eventful_det.evaluation.sweep import Method, MethodRun, first, run_methods
from eventful_det.gating.convert import Rule
from eventful_det.models.checkpoints import DEFAULT, find_weights, load_detector
from eventful_det.models.detector import Detector

COMMON = 10  # objects: average precision of a class with fewer is noise
NOTE = (
    "Precisions lie in [0, 1]. GMACs are 1e9 multiply-adds per frame. Times come from this one run on this machine, "
    "in which the methods took turns video by video; relative_time is the median over videos of the ratio to dense."
)


def sweep_methods(config: DictConfig) -> list[Method]:
    """The methods of an `eval` config with curves (configs/eval/sweep.yaml).

    Raises:
        UserError: a curve is not written as there.
    """
    methods: list[Method] = []
    for curve, entry in config.curves.items():
        unknown = sorted(set(entry) - {"gate", "vary"})
        vary = entry.get("vary") or {}
        if unknown or len(vary) > 1:
            raise UserError(f"eval.curves.{curve}: expected gate and vary, vary with one option; got {dict(entry)}")
        if not vary:
            methods.append(Method(curve, rule=_rule_with(entry.get("gate"))))
        for option, values in vary.items():
            for value in values:
                own = {option: value} if option in ("hold", "scale") else {}
                rule = _rule_with(entry.get("gate"), **({} if own else {option: value}))
                methods.append(Method(curve, float(value), rule, **own))
    return methods


def _rule_with(gate: DictConfig | None, **policy: Any) -> Rule | None:
    if gate is None:
        if policy:
            raise UserError(f"eval.curves: {', '.join(policy)} varies a policy, but the curve has no gate")
        return None
    with open_dict(gate):
        return build_rule(cast(DictConfig, OmegaConf.merge(gate, {"policy": policy} if policy else {})))


def evaluate_single(config: DictConfig, detector: Detector, data: CocoVideo, directory: Path) -> dict[str, Any]:
    """Evaluate the rule of the gate group."""
    labelled_frames(data)
    rule = build_rule(config.gate)
    name = "dense" if rule is None else config.gate.rule
    (run,) = _run(config, detector, data, [Method(name, None, rule, config.eval.hold, config.eval.scale)])
    scores = run.scores()
    row = row_of(run, scores)
    (directory / "coco_results.json").write_text(json.dumps(run.results) + "\n")
    _show([list(line) for line in zip(*report.table([row]), strict=True) if line[1] != "-"])
    lines = [[n, report.percent(ap, 1), str(scores.objects_by_class[n])] for n, ap in scores.ap50_by_class.items()]
    _show([["class", "AP50", "objects"], *lines])
    common = scores.ap50_of_common(COMMON)
    console.print(f"AP50 {report.percent(common, 1)} over the classes with {COMMON} or more objects")
    return {
        "rows": [row],
        "ap50_by_class": scores.ap50_by_class,
        "objects_by_class": scores.objects_by_class,
        f"ap50_of_classes_with_{COMMON}_objects": common,
        "ap50_since_flush": ap50_since_flush(data, run.results, run.ages()),
        "efficiency": run.efficiency,
        "videos": _by_video(run),
    }


def evaluate_sweep(config: DictConfig, detector: Detector, data: CocoVideo, directory: Path) -> dict[str, Any]:
    """Evaluate all curves in one run."""
    rows = rows_of(_run(config, detector, data, sweep_methods(config.eval)))
    report.write_csv(rows, directory / "sweep.csv")
    (directory / "sweep.json").write_text(json.dumps(jsonable(rows), indent=1) + "\n")
    (directory / "sweep.md").write_text(report.markdown(rows))
    title = f"Average precision against cost: {rows[0].videos} videos, {rows[0].frames} frames"
    report.plot(rows, directory / "sweep.png", title)
    _show(
        [[*line[:2], line[6], *line[10:12], *line[13:14]] for line in report.table(rows)]
    )  # what fits on a terminal; sweep.md has all
    console.print(f"plot: {directory / 'sweep.png'}", soft_wrap=True)
    return {"rows": rows}


def _run(config: DictConfig, detector: Detector, data: CocoVideo, methods: list[Method]) -> list[MethodRun]:
    """Run the methods, on all processes of torchrun; only the first returns, the others are done.

    Every process runs videos of its own and leaves the results in the store, from where the first one takes them.
    """
    about = {
        "weights": file_hash(find_weights(config.weights)),
        "detector": detector.config.to_json(),
        "scene_cuts": config.scene_cuts,
        "device": detector.device.type,
    }
    store = ResultStore(Path(config.output) / "videos", about)
    if dist.is_initialized():
        rank, ranks = dist.get_rank(), dist.get_world_size()
        own = CocoVideo(data.categories, data.videos[rank::ranks], data.image_root)
        run_methods(detector, own, methods, scene_cuts=config.scene_cuts, store=store)
        dist.barrier()
        if rank:
            sys.exit()
    frames = sum(len(video.frames) for video in data.videos)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("warming up", total=frames * len(methods))

        def advance(method: Method) -> None:
            progress.update(task, advance=1, description=method.name)

        return run_methods(detector, data, methods, scene_cuts=config.scene_cuts, on_frame=advance, store=store)


def _by_video(run: MethodRun) -> list[dict[str, Any]]:
    """AP50 and cost of each video; None where a video has no label."""
    return [
        {
            "name": video.video.name,
            "frames": len(video.costs),
            "ap50": run.scores(video).ap50 if any(frame.labelled for frame in video.video.frames) else None,
            "gmacs_total": sum(cost.total for cost in video.costs) / len(video.costs) / 1e9,
            "ms_mean": 1e3 * video.seconds / len(video.costs),
        }
        for video in run.videos
    ]


def _show(cells: list[list[str]]) -> None:
    header, *lines = cells
    table = Table(*header, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for line in lines:
        table.add_row(*line)
    console.print(table)


def run(config: DictConfig) -> None:
    """Evaluate, then write the results."""
    data = first(load_coco_video(config.data.val), config.max_videos, config.max_frames)
    device = choose_device(config.device)
    detector = load_detector(config.weights, config.labels).to(device)
    if config.common_classes:
        data = for_classes(data, detector.names)
    directory = Path(config.output)
    directory.mkdir(parents=True, exist_ok=True)
    evaluate = evaluate_sweep if "curves" in config.eval else evaluate_single
    results = evaluate(config, detector, data, directory)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    about = {
        "command": " ".join(sys.argv),
        "weights": config.weights or DEFAULT,
        "labelled_frames": sum(frame.labelled for frame in data.frames),
        "data": config.data.val,
        "machine": f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "note": NOTE,
    }
    write_results(directory, jsonable(about | results))


@hydra.main(version_base="1.3", config_path="../configs", config_name="eval_net")
@tool
def main(config: DictConfig) -> None:
    """Entry point, with or without torchrun."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    try:
        run(config)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
