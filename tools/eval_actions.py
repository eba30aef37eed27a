"""Evaluation of recognisers of actions for tools/eval_net.py: accuracy, multiply-adds and time."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from actions import cells_of, read_segments
from common import Data, Gate, progress_bar, show_table, warn

from eventful_det.files import written_whole
from eventful_det.outputs import markdown_table, write_text
from eventful_det.recognition.accuracy import Among, accuracy, per_class, tail, unseen, write_submission
from eventful_det.recognition.data.clip_reader import read_clips
from eventful_det.recognition.data.segments import Segments, read_column
from eventful_det.recognition.evaluation import Evaluation, Way, evaluate_clips, sweep_ways
from eventful_det.recognition.recogniser import Recogniser

_GROUPS = 20  # participants that are told apart


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
