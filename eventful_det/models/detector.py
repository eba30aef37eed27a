"""The detector: dense training and inference, and `step` for video streams."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eventful_det.errors import UserError
from eventful_det.gating.anatomy import Anatomy, anatomy_of
from eventful_det.gating.closed_form import ViTShape, dense_counts
from eventful_det.gating.convert import Rule, flush_flags, step_streams
from eventful_det.gating.cost import Counts
from eventful_det.gating.policy import JointPolicy, Policy
from eventful_det.gating.rows import Rows, RowsState
from eventful_det.gating.state import State, TensorTree
from eventful_det.gating.update import Update
from eventful_det.models.cascade import region_heads
from eventful_det.models.config import ModelConfig
from eventful_det.models.cost import FrameCost, pyramid_macs, roi_macs, rpn_macs, window_padding_macs
from eventful_det.models.incremental import (
    HeadsState,
    init_heads,
    refresh_proposals,
    refresh_pyramid,
    refresh_regions,
)
from eventful_det.models.saliency import token_saliency
from eventful_det.models.rpn import ProposalGenerator
from eventful_det.models.roi_heads import Detections
from eventful_det.models.vitdet import ViTDetBackbone

if TYPE_CHECKING:
    from eventful_det.runtime.stream import Stream

DIVISOR = 32  # sides of the network's input are multiples of the stride of p5


@dataclass
class DetectorStream(TensorTree):
    """What a detector remembers of one stream.

    Attributes:
        backbone: state of the update rule.
        size: (height, width) of the last frame in pixels.
        heads: maps of the pyramid and the heads, and the last proposals.
        detections: of the last frame; they stand while nothing changes.
    """

    backbone: State
    size: tuple[int, int]
    heads: HeadsState | None = None
    detections: Detections | None = None


@dataclass(frozen=True)
class StepResult:
    """One frame of one stream.

    Attributes:
        detections: in pixels of the frame given to `step`.
        cost: of this frame.
        work: `(H, W)` share of its token-wise work that each token had done, 0 to 1.
    """

    detections: Detections
    cost: FrameCost
    work: Tensor


class Detector(nn.Module):
    """ViTDet: a windowed ViT, a simple feature pyramid, region proposals and region heads.

    Parameters carry detectron2's names. Dense in `forward`; eventful in `step` and `stream`, by `rule`.

    Args:
        config: sizes and class names.
        rule: how a frame's tokens are recomputed in `step`; `Rows()` by default. Set `rule` to None for dense.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: ModelConfig, rule: Rule | None = None) -> None:
        super().__init__()
        if not config.classes:
            raise UserError("model: classes is empty; a detector needs at least one class name")
        self.config = config
        self.rule: Rule | None = Rows() if rule is None else rule
        self.backbone = ViTDetBackbone(config)
        self.proposal_generator = ProposalGenerator(config)
        self.roi_heads = region_heads(config)
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std).view(3, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def names(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return self.config.classes

    @property
    def policy(self) -> Policy | None:
        """Which tokens are recomputed; None = dense. Settable between any two frames."""
        return None if self.rule is None else self.rule.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        if self.rule is None:
            self.rule = Rows(policy)
        else:
            self.rule.policy = policy

    def with_rule(self, rule: Rule | None) -> Detector:
        """A view of this detector, sharing all modules, that recomputes tokens by another rule; None = dense."""
        view = copy.copy(self)
        view.rule = rule
        return view

    def forward(
        self, images: Tensor | Sequence[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """The dense detector.

        Args:
            images: `(B, 3, h, w)` or B tensors `(3, h, w)`, RGB in [0, 1].
            targets: per image "boxes" `(n, 4)` xyxy in pixels and "labels" `(n,)` from 0; needed for training.

        Returns:
            Losses in training mode, otherwise the detections of each image.
        """
        batch, sizes = self._batch(images)
        levels = self.backbone(batch)
        if not self.training:
            proposals, _ = self.proposal_generator(levels, sizes)
            return self.roi_heads.detect(levels, proposals, sizes)
        if targets is None:
            raise UserError("Detector: training needs targets; give them or call .eval() first")
        proposals, losses = self.proposal_generator(levels, sizes, targets)
        return {**losses, **self.roi_heads.losses(levels, proposals, targets)}

    def init_state(self, batch: int = 1) -> State:
        """An empty state for `batch` streams."""
        return State([None] * batch)

    @torch.no_grad()
    def step(
        self,
        frames: Tensor | Sequence[Tensor],
        state: State,
        flush: Sequence[bool] | bool = False,
        joint: JointPolicy | None = None,
    ) -> list[StepResult]:
        """Detect in the next frame of every stream.

        Args:
            frames: `(B, 3, h, w)` or B tensors `(3, h, w)`, RGB in [0, 1]; sizes may differ.
            state: of the B streams, updated in place. A frame of a new size flushes its stream alone.
            flush: streams to recompute in full.
            joint: selects the tokens of all streams together; by default `policy` is asked about each alone.

        Raises:
            UserError: the numbers of frames and streams differ, or the module is in training mode.
        """
        if self.training:
            raise UserError("Detector.step is for inference; call .eval() first")
        flushes = flush_flags(frames, state, flush)
        stopwatch = _Stopwatch(self.device)
        anatomy, images, streams = anatomy_of(self.backbone.net), [], []
        for i, frame in enumerate(frames):
            size = (frame.shape[-2], frame.shape[-1])
            stream = state.streams[i]
            if stream is None or stream.size != size:
                state.streams[i] = stream = DetectorStream(State([None]), size)
            images.append(self._prepare(frame, *size))
            streams.append(stream)
        stopwatch.lap("other")
        updates = self._update_tokens(anatomy, images, streams, flushes, joint)
        stopwatch.lap("backbone")
        shared = {part: seconds / len(streams) for part, seconds in stopwatch.seconds.items()}
        dense = {update.tokens.shape: self._dense_macs(anatomy, update.tokens) for update in updates}
        return [
            self._step_heads(update, stream, dense[update.tokens.shape], _Stopwatch(self.device, shared))
            for update, stream in zip(updates, streams, strict=True)
        ]

    def stream(self, source: Any, **options: Any) -> Stream:
        """Detect in a video, lazily and in constant memory; see `eventful_det.runtime.stream.stream`."""
        from eventful_det.runtime.stream import stream

        return stream(self, source, **options)

    def _batch(self, images: Tensor | Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Normalise and pad all images to the size of the largest."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        height, width = (max(side) for side in zip(*sizes, strict=True))
        return torch.stack([self._prepare(image, height, width) for image in images]), sizes

    def _prepare(self, image: Tensor, height: int, width: int) -> Tensor:
        """Normalise an image `(3, h, w)`, and pad it at the bottom and right to at least `height` and `width`.

        Sides become multiples of `DIVISOR`, so that the pyramid can halve them.
        """
        image = (image - self.pixel_mean).div_(self.pixel_std)
        least, (_, h, w) = self.config.square_pad, image.shape
        height, width = (-(-max(side, least) // DIVISOR) * DIVISOR for side in (height, width))
        return image if (h, w) == (height, width) else F.pad(image, (0, width - w, 0, height - h))

    def _update_tokens(
        self,
        anatomy: Anatomy,
        images: Sequence[Tensor],
        streams: Sequence[DetectorStream],
        flushes: Sequence[bool],
        joint: JointPolicy | None,
    ) -> list[Update]:
        """The token maps of the next frames `(3, h, w)`, and what changed in them."""
        if self.rule is None:
            return [self._dense_update(anatomy, *pair) for pair in zip(images, flushes, strict=True)]
        for stream in streams:
            self._point_out(stream)
        backbones = State([stream.backbone.streams[0] for stream in streams])
        updates = step_streams(self.rule, anatomy, images, backbones, flushes, joint)
        for stream, backbone in zip(streams, backbones.streams, strict=True):
            stream.backbone.streams[0] = backbone
        return updates

    def _point_out(self, stream: DetectorStream) -> None:
        """Tell the gate where something was found on the last frame."""
        backbone, found = stream.backbone.streams[0], stream.detections
        if isinstance(backbone, RowsState) and found is not None:
            backbone.interest.copy_(token_saliency(found.boxes, found.scores, backbone.grid, self.config.patch))

    def _dense_update(self, anatomy: Anatomy, image: Tensor, flush: bool) -> Update:
        """Everything, as if all tokens had changed."""
        tokens = self.backbone.net(image[None])[0].permute(1, 2, 0)
        shape, grid = ViTShape.of(anatomy), anatomy.grid(*image.shape[-2:])
        changed = torch.arange(tokens[..., 0].numel(), device=tokens.device)
        counts = Counts(linear=dense_counts(shape, grid).macs + window_padding_macs(shape, grid))
        return Update(tokens, changed, torch.ones(changed.numel()), flush, counts)

    def _dense_macs(self, anatomy: Anatomy, tokens: Tensor) -> dict[str, int]:
        """What the dense detector spends on a frame with a token map like `(H, W, D)`, by part."""
        grid = (tokens.shape[0], tokens.shape[1])
        return {
            "backbone": dense_counts(ViTShape.of(anatomy), grid).macs,
            "pyramid": pyramid_macs(self.backbone, grid),
            "rpn": rpn_macs(self.proposal_generator.rpn_head, grid),
            "roi": roi_macs(self.roi_heads, self.config.proposals),
        }

    def _step_heads(
        self, update: Update, stream: DetectorStream, dense: dict[str, int], stopwatch: _Stopwatch
    ) -> StepResult:
        """Detections from the token map of one stream."""
        if self.rule is None:
            macs = {**dense, "backbone": update.counts.macs}
            stream.detections = self._run_heads(update.tokens, stream.size, stopwatch, macs)
        else:
            macs = {**dict.fromkeys(dense, 0), "backbone": update.counts.macs}
            if update.changed.numel() or stream.detections is None:
                stream.detections = self._refresh_heads(update, stream, stopwatch, macs)
        recomputed = round(float(update.work.sum()))
        cost = FrameCost(macs, dense, recomputed, len(update.work), update.flush, stopwatch.seconds)
        return StepResult(stream.detections.clone(), cost, update.work.view(update.tokens.shape[:2]))

    def _run_heads(
        self, tokens: Tensor, size: tuple[int, int], stopwatch: _Stopwatch, macs: dict[str, int]
    ) -> Detections:
        """All heads in full, from the token map `(H, W, D)`."""
        levels = self.backbone.pyramid(tokens.permute(2, 0, 1)[None])
        stopwatch.lap("pyramid")
        proposals, _ = self.proposal_generator(levels, [size])
        stopwatch.lap("rpn")
        (detections,) = self.roi_heads.detect(levels, proposals, [size])
        macs["roi"] = roi_macs(self.roi_heads, len(proposals[0]))
        stopwatch.lap("roi")
        return detections

    def _refresh_heads(
        self, update: Update, stream: DetectorStream, stopwatch: _Stopwatch, macs: dict[str, int]
    ) -> Detections:
        """The heads where changed tokens reach."""
        tokens, changed, generator = update.tokens, update.changed, self.proposal_generator
        if stream.heads is None:
            stream.heads = init_heads(self.backbone, generator, tokens)
            changed = torch.arange(len(update.work), device=tokens.device)
        heads = stream.heads
        cells, macs["pyramid"] = refresh_pyramid(self.backbone, tokens, changed, heads)
        stopwatch.lap("pyramid")
        macs["rpn"] = refresh_proposals(generator, heads, cells)
        proposals = generator.select(heads.layout.sizes, heads.logits, heads.deltas, stream.size)
        stopwatch.lap("rpn")
        scores, boxes, computed = refresh_regions(self.roi_heads, proposals, changed, heads, stream.size)
        macs["roi"] = roi_macs(self.roi_heads, computed)
        detections = self.roi_heads.select(proposals, scores, boxes, stream.size)
        stopwatch.lap("roi")
        return detections


class _Stopwatch:
    """Seconds between laps, by name, added to those given."""

    def __init__(self, device: torch.device, seconds: dict[str, float] | None = None) -> None:
        self.device = device
        self.seconds = dict(seconds or {})
        self.last = self._now()

    def lap(self, name: str) -> None:
        now = self._now()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
