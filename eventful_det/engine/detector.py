"""`CompiledDetector`: a `VideoDetector` whose steps are compiled graphs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from eventful_det.detectors.protocol import DEFAULT_RULE, AnyRule, InputTransform
from eventful_det.detectors.results import Detections, FrameCost, StepResult
from eventful_det.detectors.saliency import token_saliency
from eventful_det.detectors.stopwatch import Stopwatch
from eventful_det.detectors.streaming import StreamingDetector
from eventful_det.detectors.vitdet.config import ModelConfig
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.detectors.vitdet.incremental import HeadsState, refresh_regions
from eventful_det.detectors.vitdet.pooling import pool_regions
from eventful_det.detectors.vitdet.roi_heads import Reader, SingleHead
from eventful_det.engine.backends import Backend, ONNXRuntime, OpenVINO, Precision, quickest_precision
from eventful_det.engine.graphs import Geometry, check_exportable
from eventful_det.errors import UserError
from eventful_det.files import JsonObject
from eventful_det.gating.dense import Dense
from eventful_det.gating.macs import dense_macs
from eventful_det.gating.rules import per_stream
from eventful_det.gating.selector import DEFAULT, RandomK, Select
from eventful_det.gating.state import State, TensorTree
from eventful_det.gating.whole_windows import (
    Chosen,
    Windows,
    WindowsState,
    cache_shape,
    global_blocks,
    new_state,
    windows_macs,
)
from eventful_det.gating.windows import Grid, windows_of

MANIFEST, FORMAT = "engine.json", "eventful-det-engine/1"
_REGION_STEPS = 4  # the region head is compiled for quarters of the proposals


@dataclass
class CompiledStream(TensorTree):
    """What a compiled detector remembers of one stream.

    Attributes:
        size: (height, width) of the last frame in pixels.
        gate: state of the rule; its outputs are empty. None under the dense rule, like `heads`.
        heads: maps of the pyramid and the heads, each with one more row at its end, for what lies outside.
        detections: of the last frame.
    """

    size: tuple[int, int]
    gate: WindowsState | None = None
    heads: HeadsState | None = None
    detections: Detections | None = None


@dataclass(frozen=True)
class WindowsCosts:
    """What frames cost by the number of windows: a `CostModel`.

    Attributes:
        rule: says how many windows there are for so many tokens.
        totals: MACs without regions for every number of windows in the rule's list, and for none.
        regions: MACs of all proposals.
        windows: of the frame.
    """

    rule: Windows
    totals: tuple[tuple[int, int], ...]
    regions: int
    windows: int

    @property
    def variable(self) -> str:
        """The part of which only a bound is known."""
        return "roi"

    def macs(self, grid: Grid, order: Tensor, variable: int | None = None) -> Tensor:
        """See `CostModel.macs`."""
        prices = _prices(self, grid[0] * grid[1]).to(order.device)
        total = prices[: len(order) + 1].clone()
        total[1:] += self.regions if variable is None else variable
        return total

    def everything(self, grid: Grid) -> int:
        """See `CostModel.everything`."""
        return int(_prices(self, grid[0] * grid[1])[-1]) + self.regions


@lru_cache(maxsize=64)
def _prices(costs: WindowsCosts, tokens: int) -> Tensor:
    """`(N + 1,)` MACs for 0, 1, ... N selected tokens, without regions."""
    totals = dict(costs.totals)
    numbers = (costs.rule.windows_for(count, tokens, costs.windows) for count in range(tokens + 1))
    return torch.tensor([totals[number] for number in numbers])


class _RegionHead(SingleHead):
    """A region head whose layers are a graph, run for a quarter, a half, ... of all proposals."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__(config)
        self.backend, self.step = backend, -(-config.proposals // _REGION_STEPS)

    def _predict(self, read: Reader, proposals: list[Tensor]) -> tuple[Tensor, Tensor]:
        pooled = read(proposals).permute(0, 2, 3, 1)  # (n, 7, 7, C), as it lies in memory
        count = len(pooled)
        pooled = F.pad(pooled, (0, 0, 0, 0, 0, 0, 0, -count % self.step))
        if not len(pooled):
            pooled = pooled.new_zeros(self.step, *pooled.shape[1:])
        logits, deltas = self.backend.run("regions", pooled)
        return logits[:count].clone(), deltas[:count].clone()


class CompiledDetector(StreamingDetector):
    """A detector for video in a compiled engine, for frames of one size: a `VideoDetector`.

    Whole windows are recomputed, see `Windows`; heads run on tiles of them. Gate, boxes, non-maximum suppression and
    the reading of regions are PyTorch's, in float32. All that is remembered of a stream belongs to the caller.

    Args:
        config: of the detector.
        size: (height, width) of its inputs in pixels, multiples of 32; smaller frames are padded at the bottom
            and right.
        rule: with the numbers of windows that are compiled.
        backend: runs the graphs.

    Attributes:
        rule: as given; the only one beside `Dense`.
    """

    device = torch.device("cpu")

    def __init__(self, config: ModelConfig, size: tuple[int, int], rule: Windows, backend: Backend) -> None:
        self.config, self.size, self.rule, self.backend = config, size, rule, backend
        with torch.device("meta"):  # sizes and settings; the weights are in the graphs
            self._plain = Detector(config).eval()
            self._regions = _RegionHead(config, backend).eval()
        self.shape, self.head_weights = self._plain.spec.shape, self._plain.head_weights
        side = check_exportable(self.shape, self._plain.roi_heads)
        self.grid = (size[0] // config.patch, size[1] // config.patch)
        self.geometry = Geometry(self.grid, side, config.rpn_convs)
        self._side = side
        self._windows = windows_of(self.grid, side, self.device).count
        self._mean, self._std = (torch.tensor(v).view(3, 1, 1) for v in (config.pixel_mean, config.pixel_std))
        self._inside = torch.cat([self.geometry.layout.inside, torch.tensor([False])]).float()[:, None]

    @property
    def names(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return self.config.classes

    @property
    def input_transform(self) -> InputTransform:
        """How a frame becomes an input, as large as fits."""
        return InputTransform(min(self.size), max(self.size), self.config.patch, self.config.pixel_mean)

    def init_state(self, batch: int = 1) -> State[CompiledStream]:
        """An empty state for `batch` streams."""
        return State([None] * batch)

    def to(self, device: torch.device | str) -> CompiledDetector:
        """This detector, if the device is the CPU.

        Raises:
            UserError: it is another.
        """
        if torch.device(device).type != "cpu":
            raise UserError(f"a compiled engine runs on CPUs, not on {device}; give device=cpu")
        return self

    def warm_up(self) -> None:
        """Compile what gated frames need, so that no frame has to wait for it."""
        state, frame = self.init_state(), torch.zeros(3, *self.size)
        for count in self.rule.sizes(self._windows):
            share = -(-count * self.grid[0] * self.grid[1] // self._windows)
            self.step([frame], state, selector=RandomK(share))
        for count in range(1, _REGION_STEPS + 1):
            pooled = torch.zeros(count * self._regions.step, 7, 7, self.config.channels)
            self.backend.run("regions", pooled)

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(
        self,
        frames: Sequence[Tensor],
        state: State[CompiledStream],
        *,
        rule: AnyRule = DEFAULT_RULE,
        selector: Select = DEFAULT,
        flush: Sequence[bool] | bool = False,
        timing: bool = False,
    ) -> list[StepResult]:
        """Detect in the next frame of every stream; see `VideoDetector.step`.

        Args:
            frames: `(3, h, w)` of each stream, RGB in [0, 1], not larger than `size`.
            state: of the streams, updated in place.
            rule: `Dense()`, or that of this engine, which is also what the default stands for.
            selector: which tokens are recomputed, and with them the windows.
            flush: streams to recompute in full.
            timing: measure the seconds of each part.

        Raises:
            UserError: the numbers of frames and streams differ, a frame is too large, or the rule is another.
        """
        if rule not in (DEFAULT_RULE, self.rule, Dense()):
            raise UserError(
                f"this engine was exported with {self.rule}; it cannot follow {rule}. Use its own or Dense()"
            )
        flushes = [flush] * len(state) if isinstance(flush, bool) else list(flush)
        watch, dense = Stopwatch(self.device, timing), rule == Dense()
        images, streams, begins = [], [], []
        for i, frame in enumerate(per_stream("frames", list(frames), state)):
            images.append(self._prepare(frame))
            size, stream = (frame.shape[-2], frame.shape[-1]), state.streams[i]
            begin = stream is None or stream.size != size or (stream.gate is None) != dense
            if begin or stream is None:
                state.streams[i] = stream = CompiledStream(size)
            streams.append(stream)
            begins.append(begin)
        watch.lap("other")
        if dense:
            choices: Sequence[Chosen | None] = [None] * len(streams)
        else:
            choices = self._choose(images, streams, flushes, selector)
        watch.lap("gate")
        shared = {part: seconds / len(streams) for part, seconds in watch.seconds().items()}
        results = []
        for image, stream, chosen, begin, new in zip(images, streams, choices, begins, flushes, strict=True):
            own = Stopwatch(self.device, timing)
            result = self._run(image, stream, chosen, begin or (new and not dense), own)
            seconds = own.seconds()
            seconds["backbone"] = seconds.get("backbone", 0.0) + shared.get("gate", 0.0)
            if timing:
                result.cost.seconds.update({**seconds, "other": shared["other"]})
            results.append(result)
        return results

    def cost_model(self, rule: AnyRule) -> WindowsCosts:
        """What frames will cost.

        Raises:
            UserError: under the dense rule.
        """
        if rule == Dense():
            raise UserError("costs are known in advance under the windows rule only")
        numbers = (0, *self.rule.sizes(self._windows))
        totals = tuple((count, sum(self._macs(count, 0, False).values())) for count in numbers)
        return WindowsCosts(self.rule, totals, self.head_weights.regions * self.config.proposals, self._windows)

    def _prepare(self, frame: Tensor) -> Tensor:
        """Normalise a frame and pad it to the engine's size."""
        (height, width), (_, h, w) = self.size, frame.shape
        if h > height or w > width:
            raise UserError(
                f"a frame of {h} x {w} does not fit an engine for {height} x {width}; export it for that size"
            )
        image = (frame - self._mean).div_(self._std)
        return image if (h, w) == (height, width) else F.pad(image, (0, width - w, 0, height - h))

    def _choose(
        self, images: Sequence[Tensor], streams: Sequence[CompiledStream], flushes: Sequence[bool], selector: Select
    ) -> list[Chosen]:
        """The windows of every stream."""
        patches, gates, saliency = [], [], []
        for image, stream, new in zip(images, streams, flushes, strict=True):
            if stream.gate is None:
                self._allocate(stream)
            assert stream.gate is not None
            if new:
                stream.gate.frame = 0
            found = stream.detections
            patches.append(self._patches(image))
            gates.append(stream.gate)
            saliency.append(
                None if found is None else token_saliency(found.boxes, found.scores, self.grid, self.config.patch)
            )
        unit = float(self._std.mean()) / 0.5
        return self.rule.choose(patches, gates, selector, saliency, self._side, 3, unit)

    def _patches(self, image: Tensor) -> Tensor:
        """An image `(3, h, w)` as patches `(N, 3 * patch^2)`."""
        (rows, cols), p = self.grid, self.config.patch
        x = image.unflatten(2, (cols, p)).unflatten(1, (rows, p))  # (3, H, p, W, p)
        return x.permute(1, 3, 0, 2, 4).reshape(rows * cols, -1)

    def _allocate(self, stream: CompiledStream) -> None:
        """What is remembered of a stream from its first frame on."""
        like, shape, ratios = torch.zeros(0), self.shape, len(self.config.anchor_ratios)
        caches = [torch.zeros(cache_shape(shape, self.grid)) for _ in global_blocks(shape)]
        stream.gate = new_state(self.grid, shape.pixels, 0, caches, like)
        geometry, channels = self.geometry, self.config.channels
        stream.heads = HeadsState(
            self.grid,
            inner=torch.zeros(geometry.nowhere + 1, channels),
            feature=torch.zeros(geometry.nowhere + 1, channels),
            hidden=[],
            logits=torch.zeros((geometry.anchors + 1) * ratios),
            deltas=torch.zeros((geometry.anchors + 1) * ratios, 4),
        )

    def _run(
        self, image: Tensor, stream: CompiledStream, chosen: Chosen | None, flush: bool, watch: Stopwatch
    ) -> StepResult:
        """One frame of one stream; `chosen` None = dense."""
        tokens, count = self.grid[0] * self.grid[1], None if chosen is None else len(chosen.windows)
        regions = 0
        if chosen is None:
            regions = self._run_dense(image, stream, watch)
        elif count or stream.detections is None:
            regions = self._run_windows(image, stream, chosen, watch)
        assert stream.detections is not None
        weights = self.head_weights
        everything = {
            "backbone": dense_macs(self.shape, self.grid).total,
            **weights.dense(self.grid, self.config.proposals),
        }
        work = torch.ones(tokens) if chosen is None else torch.zeros(tokens).index_fill_(0, chosen.tokens, 1.0)
        recomputed = tokens if chosen is None else len(chosen.tokens)
        cost = FrameCost(self._macs(count, regions, flush), everything, recomputed, tokens, flush)
        return StepResult(stream.detections.clone(), cost, work.view(self.grid))

    def _macs(self, count: int | None, regions: int, flush: bool) -> dict[str, int]:
        """MACs by part of a frame with so many windows, None = dense."""
        if count is None:
            backbone = dense_macs(self.shape, self.grid, padded_linear=True).total
            heads = self.head_weights.dense(self.grid, regions)
        else:
            backbone = windows_macs(self.shape, self.grid, count, everything=flush).total
            heads = dict.fromkeys(("pyramid", "rpn", "roi"), 0)
            if count:
                heads = self.head_weights.macs(dataclasses.replace(self.geometry.sizes(count), regions=regions))
        return {"backbone": backbone, **heads}

    def _run_dense(self, image: Tensor, stream: CompiledStream, watch: Stopwatch) -> int:
        """The dense network; the number of proposals."""
        feature, logits, deltas = self.backend.run("dense", image[None])
        watch.lap("backbone")  # and pyramid and proposals, which are one graph with it
        layout = self.geometry.layout
        proposals = self._plain.proposal_generator.select(layout.sizes, logits, deltas, stream.size)
        watch.lap("rpn")

        def read(boxes: list[Tensor]) -> Tensor:
            return pool_regions(feature, layout, torch.cat(boxes), self.config.canonical_box)

        output = self._regions.score(read, [proposals], [stream.size])
        stream.detections = self._regions.select(output, stream.size)
        watch.lap("roi")
        return len(proposals)

    def _run_windows(self, image: Tensor, stream: CompiledStream, chosen: Chosen, watch: Stopwatch) -> int:
        """The network where windows are recomputed; the number of proposals that were judged."""
        gate, heads, windows = stream.gate, stream.heads, chosen.windows
        assert gate is not None and heads is not None
        levels, layout, count = self.geometry.levels, self.geometry.layout, len(windows)
        patches = chosen.patches(gate.reference)  # which has just been renewed there
        *kv, cells = self.backend.run("backbone", patches, windows, *gate.caches)
        for cache, rows in zip(gate.caches, kv, strict=True):
            cache.index_copy_(0, windows, rows)
        own = torch.cat([level.own.index_select(0, windows) for level in levels], 1)  # (W, cells)
        heads.inner.index_copy_(0, own.flatten(), cells.flatten(0, 1))
        watch.lap("backbone")
        tiled = [self.geometry.is_tiled(level, count) for level in range(len(layout.sizes))]
        (rows,) = self.backend.run("pyramid", *self._tiles(heads.inner, windows, tiled[: len(levels)], 0))
        numbers = [
            level.write.index_select(0, windows).flatten() if tiled[i] else self._numbers[i]
            for i, level in enumerate(levels)
        ]
        heads.feature.index_copy_(0, torch.cat(numbers), rows)
        heads.feature.index_copy_(0, self._numbers[-1], heads.feature.index_select(0, self._even))  # p6
        watch.lap("pyramid")
        inputs = self._tiles(heads.feature, windows, tiled, 1)
        if self.config.rpn_convs > 1:
            inputs += self._tiles(self._inside, windows, tiled, 1)
        logits, deltas = self.backend.run("proposals", *inputs)
        places = [
            levels[i].places.index_select(0, windows).flatten() if tiled[i] else layout.place[numbers]
            for i, numbers in enumerate(self._numbers)
        ]
        place = torch.cat(places)
        heads.logits.view(-1, logits.shape[1]).index_copy_(0, place, logits)
        heads.deltas.view(-1, deltas.shape[1]).index_copy_(0, place, deltas)
        anchors = self.geometry.anchors * len(self.config.anchor_ratios)
        select = self._plain.proposal_generator.select
        proposals = select(layout.sizes, heads.logits[:anchors], heads.deltas[:anchors], stream.size)
        watch.lap("rpn")
        output, judged = refresh_regions(self._regions, proposals, chosen.tokens, heads, stream.size)
        stream.detections = self._regions.select(output, stream.size)
        watch.lap("roi")
        return judged

    def _tiles(self, values: Tensor, windows: Tensor, tiled: Sequence[bool], stage: int) -> list[Tensor]:
        """What the first (0) or second (1) kind of convolution reads of each level, `(tiles, h, w, C)`."""
        inputs = []
        for level, there in enumerate(tiled):
            if there:
                read = self.geometry.levels[level].read[stage].index_select(0, windows)  # (W, s, s)
                inputs.append(values.index_select(0, read.flatten()).view(*read.shape, -1))
            else:
                whole = self.geometry.layout.view(level, values).permute(0, 2, 3, 1)  # (1, h + 2, w + 2, C)
                more = self.config.rpn_convs - 1 if stage else 0
                inputs.append(F.pad(whole, (0, 0, more, more, more, more)) if more else whole)
        return inputs

    @property
    def _numbers(self) -> list[Tensor]:
        """The cells of each level without its border."""
        return _numbers_of(self.geometry)

    @property
    def _even(self) -> Tensor:
        """The cells of p5 that are those of p6."""
        layout = self.geometry.layout
        rows, cols = layout.sizes[-1]
        return layout.numbers(3, 2 * torch.arange(rows)[:, None], 2 * torch.arange(cols)).flatten()


@lru_cache(maxsize=64)
def _numbers_of(geometry: Geometry) -> list[Tensor]:
    layout = geometry.layout
    return [
        layout.numbers(level, torch.arange(rows)[:, None], torch.arange(cols)).flatten()
        for level, (rows, cols) in enumerate(layout.sizes)
    ]


def load_engine(
    folder: Path,
    *,
    precision: Precision | Literal["auto"] = "float32",
    threads: int | None = None,
    warm_up: bool = True,
) -> CompiledDetector:
    """A detector from a folder that `export_detector` wrote.

    Args:
        folder: of the engine.
        precision: in which it computes; "auto" = the quickest here.
        threads: of the CPU; None = as many as PyTorch uses.
        warm_up: compile everything now.

    Raises:
        UserError: the folder holds no engine, or what runs it is not installed.
    """
    about = read_manifest(folder)
    backend: type[OpenVINO] | type[ONNXRuntime] = OpenVINO if about["engine"] == "openvino" else ONNXRuntime
    if precision == "auto":
        precision = quickest_precision() if backend is OpenVINO else "float32"
    height, width = about["size"]
    config, rule = ModelConfig.from_dict(about["config"]), Windows(tuple(about["buckets"]))
    detector = CompiledDetector(config, (height, width), rule, backend(folder, precision, threads))
    if warm_up:
        detector.warm_up()
    return detector


def is_engine(folder: Path) -> bool:
    """Whether it is the folder of an engine."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> JsonObject:
    """What is in an engine's folder.

    Raises:
        UserError: it is none.
    """
    try:
        about = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if about["format"] != FORMAT or not {"engine", "size", "buckets", "config"} <= set(about):
            raise KeyError("format")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder} holds no engine; eventful-det export writes one") from error
    return dict(about)
