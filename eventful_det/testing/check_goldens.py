"""Compare the `Paper` rule with recordings ("goldens") of the official eventful code, detection and recognition.

    python -m eventful_det.testing.check_goldens FILE...

Every run of every file is replayed, step by step and stream by stream; one line per run says how far our outputs,
operation counts and selected tokens are from the recorded ones. Exit status: 0 if every run agrees, 1 if one does
not, 2 if a file cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.files import JsonObject
from eventful_det.gating.spec import Block, resize_positions
from eventful_det.gating.windows import Grid
from eventful_det.testing.goldens import Golden, Recorded, load_golden, read_recording
from eventful_det.testing.official import OfficialCounts
from eventful_det.testing.replay import (
    ABLATIONS,
    TOLERANCE,
    ReplayedBlock,
    all_agree,
    compare_counts,
    print_table,
    recorded_ablation,
    recorded_selector,
    relative_error,
    replaying,
    run_cells,
    verdict,
)
from eventful_det.testing.vivit_goldens import VIVIT_FORMAT, check_vivit

_HEADER = ("block class", "windowed class", "pool", "policy", "options", "error", "counts", "indices", "verdict")


@dataclass
class Result:
    """Agreement of one run.

    Attributes:
        error: largest ||ours - official|| / ||official|| over the compared steps and streams.
        counts: "equal", or the kinds that differ.
        indices: how the selected tokens compare.
        notes: where the official code is at fault and what was done about it.
    """

    error: float
    counts: str
    indices: str
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.error < TOLERANCE and self.counts == "equal"


@torch.no_grad()
def check_run(golden: Golden, run: JsonObject) -> Result:
    """Replay one run of a golden and compare."""
    steps, streams = golden.inputs.shape[:2]
    if run["outputs"].shape != golden.inputs.shape or len(run["counts"]) != steps:
        raise UserError(f"outputs or counts of a run do not fit inputs of shape {tuple(golden.inputs.shape)}")
    outputs, counts, recorders = _replay(golden, run)
    compared, skipped, notes = steps, set[str](), list(golden.notes)
    if streams > 1 and _pool(run) > 1 and ABLATIONS.get(run["block_class"]) in ("qk", "full"):
        skipped = {"matmul", "accumulator"}
        notes.append("official fault: pooled cells of a batch are repeated; counts of matmul, accumulator not compared")
        if run["block_class"] == "EventfulBlock":
            compared = 1
            notes.append("official fault: A.V of repeated cells accumulates twice; outputs compared at the flush only")
    if streams > 1 and golden.padded_blocks:
        notes.append(
            "official code: the bias of a padded token is counted once per batch; ours, per stream, is reduced"
        )
    surplus = OfficialCounts(bias=(streams - 1) * golden.padded_blocks * 3 * golden.blocks[0].dim)
    return Result(
        error=relative_error(outputs[:compared].flatten(2), run["outputs"][:compared].flatten(2)),
        counts=compare_counts(counts, run["counts"], surplus, skipped),
        indices=Recorded.summary(recorders),
        notes=notes,
    )


def _replay(golden: Golden, run: JsonObject) -> tuple[Tensor, list[OfficialCounts], list[Recorded]]:
    """Our outputs `(T, B, N, D)` and counts per step, and the selectors that noted what was selected."""
    steps, streams = golden.inputs.shape[:2]
    positions = resize_positions(golden.positions, golden.grid, antialias=False)
    outputs = torch.empty_like(golden.inputs)
    counts = [OfficialCounts()] * steps
    recorders = []
    for stream in range(streams):
        recorded = [_recorder(run, i, stream, steps) for i in range(len(golden.blocks))]
        stack = [_prepare(golden.grid, run, *pair) for pair in zip(golden.blocks, recorded, strict=True)]
        recorders += recorded
        for t in range(steps):
            x = golden.inputs[t, stream] + positions
            counts[t] += OfficialCounts(add=x.numel())
            for step in stack:
                x, more = step(x)
                counts[t] += more
            outputs[t, stream] = x
    return outputs, counts, recorders


def _prepare(grid: Grid, run: JsonObject, block: Block, recorded: Recorded) -> ReplayedBlock:
    name = run["block_class"]
    if block.window and run["windowed_class"] is not None:
        name = run["windowed_class"]
    if block.window and recorded_ablation(name) in ("qk", "full"):
        raise UserError(f"windowed blocks cannot be of class {name}; use EventfulTokenwiseBlock")
    return ReplayedBlock(block, grid, name, run["options"], recorded, pool=1 if block.window else _pool(run))


def _pool(run: JsonObject) -> int:
    pool = run["pool_size"]
    sizes = {pool} if isinstance(pool, int) else set(pool or (1,))
    if len(sizes) != 1:
        raise UserError(f"pool_size must be None or square, got {pool}")
    return int(sizes.pop())


def _recorder(run: JsonObject, block: int, stream: int, steps: int) -> Recorded:
    """The run's policy, beside what one block's gates selected in one stream, in the order they are asked."""
    gates = [(run["indices"] or {}).get(f"blocks.{block}.{name}_gate") for name in ("qkv", "projection", "mlp")]
    choices = None
    if all(gate is not None for gate in gates):
        choices = [gate[t][stream].long() for t in range(steps - 1) for gate in gates if gate is not None]
    return Recorded(recorded_selector(run["policy"]), choices)


def check_file(path: Path) -> bool:
    """Replay every run of a file and print how each compares; returns whether all agree.

    Raises:
        UserError: the file cannot be used.
    """
    data = read_recording(path)
    if data["format"] == VIVIT_FORMAT:
        return check_vivit(path, data)
    golden = load_golden(path, data)
    rows: list[tuple[str, ...]] = []
    notes: dict[str, list[str]] = {}
    for number, run in enumerate(golden.runs, 1):
        with replaying(f"{path}: run {number}"):
            result = check_run(golden, run)
        names = (run["block_class"], str(run["windowed_class"] or "-"), str(_pool(run)))
        found = (f"{result.error:.1e}", result.counts, result.indices, verdict(result.passed))
        rows.append((*names, *run_cells(run), *found))
        for note in result.notes:
            notes.setdefault(note, []).append(str(number))
    steps, streams = golden.inputs.shape[:2]
    title = f"{path}: {golden.grid[0]} x {golden.grid[1]} tokens, {steps} steps, {streams} stream(s)"
    print_table(title, _HEADER, rows, "over steps and streams")
    for note, numbers in notes.items():
        print(f"{note} (run {', '.join(numbers) if len(numbers) < len(rows) else '1 to ' + numbers[-1]})")
    return all_agree(rows, "runs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="check_goldens", description="Compare our paper rule with official recordings."
    )
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="a recording in the format eventful-golden/1 or eventful-vivit-golden/1",
    )
    status = 0
    for path in parser.parse_args(arguments).files:
        try:
            status = max(status, 0 if check_file(path) else 1)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
