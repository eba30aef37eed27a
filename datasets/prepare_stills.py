"""Split a COCO file of still pictures from several sources into two COCO-video files, train and val.

    python datasets/prepare_stills.py path/to/annotations.json --output .data/stills

Writes OUTPUT/annotations/train.json and val.json (the images stay where they are) and split.json, which says how
the split was made and which images are in val. Near duplicates and neighbouring frames of one film are kept on one
side; the share of every source and every class in val comes as near to --holdout as that allows. The same input and
seed give the same split. Of an image may be given, beside what COCO asks for: "source" (the data set it came from;
default: its folder), "orig_name" (its name there; by default its file name) and "labelled_category_ids" (the classes
it was searched for; default: all). Exit status: 0 when done, 2 when the request cannot be met.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from reporting import SEED, WORKERS, Parser, exit_status, plain_console
from rich.console import Console
from rich.progress import track
from rich.table import Table

from eventful_det.data.coco_video import CocoVideo, Frame, json_rows, load_coco_video, read_json_object
from eventful_det.data.labelling.near_duplicates import Hashes, connected, dhash, distances, near_pairs
from eventful_det.data.video.pictures import read_grey
from eventful_det.errors import UserError
from eventful_det.outputs import write_json

NEAR = 6  # bits: above, pictures of unlike things start to chain together
SCENE_GAP = 30  # frames: further apart, two frames of a film no longer count as neighbours
SCENE_BITS = 20  # bits: within a calm scene, neighbouring frames differ by less
NUMBERED = re.compile(r"(.*?frame[_-]?|.*?)(\d+)", re.IGNORECASE)


class Still(NamedTuple):
    """An image and where it came from."""

    frame: Frame
    source: str
    name: str


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("annotations", type=Path, help="COCO JSON file")
    add("--output", type=Path, required=True, help="folder; the files go to its subfolder annotations")
    add("--holdout", type=float, default=0.15, metavar="SHARE", help="what share goes to val (default: 0.15)")
    add("--seed", type=SEED, default=0, help="another seed makes another split (default: 0)")
    add("--workers", type=WORKERS, default=os.cpu_count() or 1, help="threads that read images")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args, console = parse(argv), plain_console()
    return exit_status(lambda: prepare(args, console), args.output)


def prepare(args: argparse.Namespace, console: Console) -> int:
    if not 0 < args.holdout < 1:
        raise UserError(f"--holdout is {args.holdout:g}; expected a share between 0 and 1, for example 0.15")
    data = load_coco_video(args.annotations)
    if any(len(video.frames) != 1 for video in data.videos):
        raise UserError(
            f"{args.annotations} holds videos; expected still pictures. Leave out its 'videos' or split it by video"
        )
    data.videos.sort(key=lambda video: video.name)  # the order of the file must not matter
    found, faults = hash_images(data, args.workers, console)
    data.videos = [video for video in data.videos if video.frames[0].image_id in found]
    stills = read_stills(args.annotations, data)
    hashes = np.array(list(found.values()), np.uint64).reshape(-1, 2)
    groups = group_stills(stills, hashes[:, 0], hashes[:, 1])
    held_out = stratify(stills, groups, args.holdout, args.seed)
    if not 0 < held_out.sum() < len(stills):
        raise UserError(
            f"{args.annotations}: the {len(set(groups))} groups of pictures that belong together cannot be split; "
            f"give more pictures or a --holdout nearer to 0.5 than {args.holdout:g}"
        )

    folder: Path = args.output / "annotations"
    for name, side in ("train", ~held_out), ("val", held_out):
        videos = [video for video, chosen in zip(data.videos, side, strict=True) if chosen]
        CocoVideo(data.categories, videos, data.image_root).save(folder / f"{name}.json")
    sizes = Counter(groups.tolist())
    record = {
        "left_out": faults,
        "annotations_sha256": hashlib.sha256(args.annotations.read_bytes()).hexdigest(),
        "holdout": args.holdout,
        "seed": args.seed,
        "groups": len(sizes),
        "largest_group": max(sizes.values()),
        "train_images": int((~held_out).sum()),
        "val_images": int(held_out.sum()),
        "val": sorted(still.frame.file_name for still, chosen in zip(stills, held_out, strict=True) if chosen),
    }
    write_json(folder / "split.json", record)
    sources = [(source, source) for source in sorted({still.source for still in stills})]
    console.print(summary("source", sources, stills, held_out))
    console.print(summary("class", [(str(i), name) for i, name in data.categories], stills, held_out))
    if faults:
        console.print(f"warning: {len(faults)} images are left out, the first: {faults[0]}", style="yellow")
    console.print(f"{len(stills)} images in {len(sizes)} groups, the largest of {max(sizes.values())}\nwrote {folder}")
    return 0


def read_stills(path: Path, data: CocoVideo) -> list[Still]:
    entries = {int(entry["id"]): entry for entry in json_rows(read_json_object(path), "images", path)}
    stills = []
    for frame in data.frames:
        entry = entries[frame.image_id]
        source = entry.get("source", PurePosixPath(frame.file_name).parent)
        name = PurePosixPath(str(entry.get("orig_name", frame.file_name))).name
        stills.append(Still(frame, str(source), name))
    return stills


def hash_images(
    data: CocoVideo, workers: int, console: Console
) -> tuple[dict[int, tuple[np.uint64, np.uint64]], list[str]]:
    """The hashes by image id, as they are and mirrored; and why other images cannot be read."""

    def hash_image(frame: Frame) -> tuple[np.uint64, np.uint64] | str:
        try:
            image = read_grey(data.image_path(frame))
        except UserError as error:
            return str(error)
        return dhash(image), dhash(np.ascontiguousarray(image[:, ::-1]))

    frames = list(data.frames)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        found = list(track(pool.map(hash_image, frames), "comparing images", len(frames), console=console))
    hashes = {f.image_id: pair for f, pair in zip(frames, found, strict=True) if not isinstance(pair, str)}
    return hashes, [fault for fault in found if isinstance(fault, str)]


def group_stills(stills: Sequence[Still], hashes: Hashes, mirrored: Hashes) -> NDArray[np.intp]:
    """Label the images so that those with one label must be on one side."""
    pairs = [near_pairs(hashes, other, NEAR).tolist() for other in (hashes, mirrored)]
    return connected(len(stills), [*pairs[0], *pairs[1], *neighbours(stills, hashes)])


def neighbours(stills: Sequence[Still], hashes: Hashes) -> Iterator[tuple[int, int]]:
    """Pairs of images that follow each other in a numbered series and seem to be of one scene.

    Frames of a film (``Frame_12.jpg``) belong together until the number jumps or the picture changes by far more
    than it usually does; other numbered pictures only where they change by far less.
    """
    series: defaultdict[tuple[str, str], list[tuple[int, str, int]]] = defaultdict(list)
    for i, still in enumerate(stills):
        if match := NUMBERED.match(still.name):
            series[still.source, match[1].lower()].append((int(match[2]), still.frame.file_name, i))
    for (_, stem), members in series.items():
        members.sort()
        pairs = [(a[-1], b[-1]) for a, b in zip(members, members[1:], strict=False) if b[0] - a[0] <= SCENE_GAP]
        changes = [int(distances(hashes[[i]], hashes[[j]])[0, 0]) for i, j in pairs]
        usual = float(np.median(changes)) if changes else 0.0
        limit = max(SCENE_BITS, 3 * usual) if "frame" in stem else usual / 2
        yield from (pair for pair, change in zip(pairs, changes, strict=True) if change <= limit)


def stratify(stills: Sequence[Still], groups: NDArray[np.intp], holdout: float, seed: int) -> NDArray[np.bool_]:
    """Choose the images of val, whole groups at a time.

    Groups are moved, in random order, those of the rarest source or class first, whenever that brings the shares of
    images and boxes of all sources and classes nearer (in squares) to ``holdout``, until no move does.
    """
    keys = sorted({key for still in stills for key in strata(still)})
    column = {key: n for n, key in enumerate(keys)}
    _, row = np.unique(groups, return_inverse=True)
    shares = np.zeros((row.max(initial=-1) + 1, len(keys)))
    for still, r in zip(stills, row, strict=True):
        for key, count in strata(still).items():
            shares[r, column[key]] += count
    totals = shares.sum(axis=0)
    rarity = np.where(shares > 0, totals, np.inf).min(axis=1, initial=np.inf)
    shares /= totals

    order = np.random.default_rng(seed).permutation(len(shares))
    order = order[np.argsort(rarity[order], kind="stable")]
    chosen = np.zeros(len(shares), dtype=bool)
    excess, moved = np.full(len(keys), -holdout), True
    while moved:
        moved = False
        for r in order:
            change = -shares[r] if chosen[r] else shares[r]
            if change @ (2 * excess + change) < -1e-9:
                chosen[r], excess, moved = not chosen[r], excess + change, True
    return chosen[row]


def strata(still: Still) -> Counter[tuple[str, str]]:
    """How much the image counts towards each share that is to be kept."""
    boxes = Counter(str(a.category_id) for a in still.frame.annotations if not a.iscrowd)
    counts = Counter({("images of source", still.source): 1, ("boxes of source", still.source): boxes.total()})
    for category, count in boxes.items():
        counts["images of class", category] = 1
        counts["boxes of class", category] = count
    return +counts


def summary(kind: str, rows: Sequence[tuple[str, str]], stills: Sequence[Still], held_out: NDArray[np.bool_]) -> Table:
    """Images and boxes of both sides.

    Args:
        kind: "source" or "class".
        rows: the key in `strata` and the title of each row.
    """
    sides: tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]] = (Counter(), Counter())
    for still, chosen in zip(stills, held_out, strict=True):
        sides[int(chosen)].update(strata(still))
    table = Table(title=f"by {kind}")
    table.add_column(kind)
    for title in ("train images", "val images", "train boxes", "val boxes"):
        table.add_column(title, justify="right")
    for key, title in rows:
        table.add_row(title, *(str(side[f"{what} of {kind}", key]) for what in ("images", "boxes") for side in sides))
    return table


if __name__ == "__main__":
    sys.exit(main())
