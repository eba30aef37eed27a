"""Pictures of what a detector did: boxes, the map of recomputed tokens, what each frame cost.

Drawing uses OpenCV and NumPy; images are `(h, w, 3)` uint8 RGB.
"""

from __future__ import annotations

import colorsys
import os
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from eventful_det.data.transforms import resize
from eventful_det.models.cost import PARTS, FrameCost
from eventful_det.models.regions import Detections
from eventful_det.runtime.stream import StreamResult

Image = NDArray[np.uint8]
Colour = tuple[int, int, int]

PART_COLOURS: dict[str, Colour] = {
    "backbone": (45, 196, 178),
    "pyramid": (86, 146, 246),
    "rpn": (172, 120, 246),
    "roi": (246, 172, 66),
}
_INK, _FAINT, _LINE, _PAPER = (236, 239, 244), (148, 156, 168), (58, 64, 74), (20, 23, 28)
_FLUSH, _HELD = (240, 92, 84), (112, 120, 132)
_VIEW = 768  # long side of each view of `annotate` in pixels, so that its text has one size for all sources
_MARGIN, _HEADER, _PANEL = 16, 40, 148
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def class_colour(label: int) -> Colour:
    """The colour of a class; the same in every frame and program, far from those of the next classes."""
    red, green, blue = colorsys.hsv_to_rgb((0.08 + label * 0.618034) % 1.0, 0.72, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(image: Image, detections: Detections, names: Sequence[str], show: float = 0.5) -> Image:
    """A copy of an image with the detections whose score is at least `show`; line and text suit its size."""
    canvas = image.copy()
    unit = max(1.0, min(image.shape[:2]) / 360)
    tracks = [-1] * len(detections) if detections.tracks is None else detections.tracks.tolist()
    found = (detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), tracks)
    boxes = [b for b in zip(*found, strict=True) if b[1] >= show]
    for box, score, label, track in reversed(boxes):  # the best on top
        colour = class_colour(label)
        x1, y1, x2, y2 = (round(v) for v in box)
        cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, round(2 * unit), cv2.LINE_AA)
        name = names[label] if track < 0 else f"{names[label]} #{track}"
        _draw_label(canvas, f"{name} {score:.2f}", x1, y1, round(14 * unit), colour)
    return canvas


def draw_work(image: Image, work: Tensor, token_size: tuple[float, float]) -> Image:
    """A copy of an image in which the tokens that were recomputed shine and the others are dim and grey.

    Args:
        image: a frame.
        work: `(H, W)` share of its work that each token had done, 0 to 1.
        token_size: height and width of a token in pixels of the image.
    """
    height, width = image.shape[:2]
    rows = np.minimum(np.arange(height) / token_size[0], work.shape[0] - 1).astype(np.intp)
    cols = np.minimum(np.arange(width) / token_size[1], work.shape[1] - 1).astype(np.intp)
    share = work.cpu().numpy().astype(np.float32)[rows][:, cols, None]
    edge = (np.diff(rows, prepend=0) > 0)[:, None] | (np.diff(cols, prepend=0) > 0)[None]
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)[..., None] * 0.5
    bright = image * np.float32(0.8) + np.array((44, 40, 8), np.float32)
    bright[edge] *= 0.8
    return np.asarray(grey + (bright - grey) * share, dtype=np.uint8)


def draw_cost(canvas: Image, cost: FrameCost, held: bool = False) -> None:
    """Fill a panel, at least 480 x 148 pixels, with the numbers of one frame: MACs by part, tokens, time."""
    dense = max(cost.dense_total, 1)
    x = _text(canvas, f"{cost.total / 1e9:.2f}", 0, 28, 34) + 8
    x = _text(canvas, "GMACs", x, 28, 18, _FAINT) + 18
    x = _text(canvas, f"{cost.total / dense:.0%}", x, 28, 34) + 8
    _text(canvas, f"of dense ({dense / 1e9:.2f})", x, 28, 18, _FAINT)
    flag = ("HELD", _HELD) if held else ("FLUSH", _FLUSH) if cost.flush else None
    right = canvas.shape[1]
    if flag:
        _pill(canvas, flag[0], right, 4, flag[1])
    cv2.rectangle(canvas, (0, 46), (right - 1, 62), _LINE, -1)
    _stack(canvas, cost.macs, 0, (46, 62), right / dense)
    x = 0
    for part in PARTS:
        cv2.rectangle(canvas, (x, 77), (x + 9, 86), PART_COLOURS[part], -1)
        x = _text(canvas, part, x + 15, 87, 14, _FAINT) + 6
        x = _text(canvas, f"{cost.macs[part] / 1e9:.2f}", x, 87, 14) + 20
    x = _text(canvas, f"{cost.recomputed}", 0, 124, 22) + 6
    x = _text(canvas, f"of {cost.tokens} tokens", x, 124, 16, _FAINT) + 28
    if cost.latency:
        x = _text(canvas, f"{cost.latency * 1e3:.0f}", x, 124, 22) + 6
        _text(canvas, "ms", x, 124, 16, _FAINT)


def draw_history(canvas: Image, history: Sequence[FrameCost], length: int = 100) -> None:
    """Fill a panel with a strip chart: MACs of the last `length` frames by part, relative to dense."""
    height, width = canvas.shape[:2]
    top, bottom, left = 22, height - 6, 44
    step = (width - left) / length
    for share in (0.0, 0.5, 1.0):
        y = round(bottom - share * (bottom - top))
        cv2.line(canvas, (left, y), (width - 1, y), _LINE, 1)
        _text(canvas, f"{share:.0%}", left - 8, y + 5, 13, _FAINT, right=True)
    shown = list(history)[-length:]
    for i, cost in enumerate(shown):
        x = left + (length - len(shown) + i) * step
        scale = (bottom - top) / max(cost.dense_total, 1)
        y = float(bottom)
        for part in PARTS:
            above = y - cost.macs[part] * scale
            if round(above) < round(y):
                right = max(round(x), round(x + step) - 2)
                cv2.rectangle(canvas, (round(x), round(above)), (right, round(y) - 1), PART_COLOURS[part], -1)
            y = above
    cv2.line(canvas, (left, top), (width - 1, top), _INK, 1)
    _text(canvas, f"GMACs of the last {length} frames, dense = 100%", left, 13, 14, _FAINT)
    if shown:
        mean = sum(c.total for c in shown) / max(sum(c.dense_total for c in shown), 1)
        _text(canvas, f"mean {mean:.0%}", width, 13, 14, right=True)


def annotate(result: StreamResult, history: Sequence[FrameCost] = (), show: float = 0.5) -> Image:
    """One picture of a frame: its detections, its recomputed tokens, what it and the frames before it cost.

    Args:
        result: the frame.
        history: costs of the last frames, this one's last.
        show: detections of a lower score are not drawn.

    Returns:
        `(h, w, 3)` uint8 RGB. Its size depends on the aspect ratio of the frame alone.
    """
    scale = _VIEW / max(result.image.shape[:2])
    size = [max(1, round(side * scale)) for side in result.image.shape[:2]]
    view = resize(result.image, *size)
    detections = result.detections.scaled(size[1] / result.image.shape[1], size[0] / result.image.shape[0])
    token = (result.token_size[0] * scale, result.token_size[1] * scale)
    column = max(size[1], 540)
    canvas = np.full((_HEADER + size[0] + _PANEL + 2 * _MARGIN, 2 * column + 3 * _MARGIN, 3), _PAPER, np.uint8)
    left, right = (_MARGIN + i * (column + _MARGIN) for i in range(2))
    clock = "" if result.timestamp is None else f"   {result.timestamp:.2f} s"
    _text(canvas, f"frame {result.frame_index}{clock}", left, 26, 16, _FAINT)
    _text(canvas, "recomputed tokens", right, 26, 16, _FAINT)
    centre = (column - size[1]) // 2
    for x, picture in (
        (left + centre, draw_detections(view, detections, result.names, show)),
        (right + centre, draw_work(view, result.work, token)),
    ):
        canvas[_HEADER : _HEADER + size[0], x : x + size[1]] = picture
    panel = canvas[_HEADER + size[0] + _MARGIN :][:_PANEL]
    draw_cost(panel[:, left : left + column], result.cost, result.held)
    draw_history(panel[:, right : right + column], history)
    return canvas


def cost_row(cost: FrameCost) -> dict[str, float]:
    """A frame's cost as one flat row for tables: GMACs and ms by part, tokens, flush."""
    return {
        **{f"gmacs_{part}": cost.macs[part] / 1e9 for part in PARTS},
        "gmacs_total": cost.total / 1e9,
        **{f"dense_{part}": cost.dense[part] / 1e9 for part in PARTS},
        "dense_total": cost.dense_total / 1e9,
        **{f"ms_{part}": cost.seconds.get(part, 0.0) * 1e3 for part in (*PARTS, "other")},
        "ms_total": cost.latency * 1e3,
        "recomputed": cost.recomputed,
        "tokens": cost.tokens,
        "flush": int(cost.flush),
    }


def plot_cost(rows: Mapping[str, NDArray[np.float64]], path: str | os.PathLike[str]) -> None:
    """Plot a run: GMACs per frame by part against dense, and latency.

    Args:
        rows: the columns of `cost_row`, each `(frames,)`.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    frames = np.arange(len(rows["gmacs_total"]) + 1)
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    floor = np.zeros(len(frames))
    for part in PARTS:
        ceiling = floor + _steps(rows[f"gmacs_{part}"])
        colour = np.divide(PART_COLOURS[part], 255)
        top.fill_between(frames, floor, ceiling, step="post", label=part, color=colour, linewidth=0)
        floor = ceiling
    top.step(frames, _steps(rows["dense_total"]), where="post", color="black", label="dense", linewidth=1.2)
    share = rows["gmacs_total"].sum() / max(rows["dense_total"].sum(), 1e-9)
    top.set_title(f"mean {rows['gmacs_total'].mean():.2f} GMACs per frame, {share:.0%} of dense", loc="left")
    top.set_ylabel("GMACs")
    top.legend(ncols=len(PARTS) + 1, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    latency = rows["ms_total"]
    bottom.step(frames, _steps(latency), where="post", color="0.35", linewidth=1)
    median = float(np.median(latency))
    bottom.axhline(median, color="tab:red", linewidth=1, label=f"median {median:.1f} ms")
    bottom.set_ylim(0, max(1e-3, 1.3 * float(np.percentile(latency, 99))))
    bottom.legend(loc="upper right", frameon=False)
    bottom.set(xlabel="frame", ylabel="ms", xlim=(0, frames[-1]))
    top.set_ylim(bottom=0)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _steps(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.append(values, values[-1])


def _stack(canvas: Image, macs: Mapping[str, int], x: float, rows: tuple[int, int], scale: float) -> None:
    """Horizontal bars of the parts, one after the other."""
    for part in PARTS:
        end = x + macs[part] * scale
        if round(end) > round(x):
            cv2.rectangle(canvas, (round(x), rows[0]), (round(end) - 1, rows[1]), PART_COLOURS[part], -1)
        x = end


def _draw_label(canvas: Image, text: str, x: int, y: int, size: int, colour: Colour) -> None:
    """Text on a coloured ground on top of a box's upper left corner, moved into the picture where it would leave it."""
    width, height, pad = _text_width(text, size), round(1.4 * size), round(0.35 * size)
    x = max(0, min(x, canvas.shape[1] - width - 2 * pad))
    y = max(0, y - height)
    cv2.rectangle(canvas, (x, y), (x + width + 2 * pad, y + height), colour, -1)
    dark = np.dot(colour, (0.299, 0.587, 0.114)) < 120
    _text(canvas, text, x + pad, y + round(1.05 * size), size, _INK if dark else _PAPER)


def _pill(canvas: Image, text: str, right: int, top: int, colour: Colour) -> None:
    width = _text_width(text, 16) + 20
    cv2.rectangle(canvas, (right - width, top), (right - 1, top + 26), colour, -1)
    _text(canvas, text, right - width + 10, top + 19, 16)


def _text(canvas: Image, text: str, x: int, y: int, size: int, colour: Colour = _INK, right: bool = False) -> int:
    """Write with the baseline at `y`, from or (`right`) up to `x`; returns where the text ends."""
    x = x - _text_width(text, size) if right else x
    cv2.putText(canvas, text, (x, y), _FONT, size / 32, colour, max(1, round(size / 20)), cv2.LINE_AA)
    return x + _text_width(text, size)


def _text_width(text: str, size: int) -> int:
    return int(cv2.getTextSize(text, _FONT, size / 32, max(1, round(size / 20)))[0][0])
