"""What detectors of a gated backbone have in common: the step of several streams, heads apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from eventful_det.detectors.hub import HubDetector
from eventful_det.detectors.protocol import DEFAULT_RULE, AnyRule
from eventful_det.detectors.results import Detections, FrameCost, StepResult
from eventful_det.detectors.saliency import token_saliency
from eventful_det.detectors.stopwatch import Stopwatch
from eventful_det.detectors.streaming import StreamingDetector
from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.rows import Rows
from eventful_det.gating.rules import per_stream, step_streams
from eventful_det.gating.selector import DEFAULT, Select
from eventful_det.gating.spec import ViTSpec
from eventful_det.gating.state import State, StreamState, TensorTree, Update
from eventful_det.gating.windows import Grid


@dataclass
class GatedStream(TensorTree):
    """What a detector remembers of one stream, heads apart.

    Attributes:
        backbone: state of the update rule.
        size: (height, width) of the last frame in pixels.
        detections: of the last frame; they stand while nothing changes.
    """

    backbone: State[StreamState]
    size: tuple[int, int]
    detections: Detections | None = dataclasses.field(default=None, kw_only=True)


S = TypeVar("S", bound=GatedStream)


class GatedDetector(StreamingDetector, HubDetector, nn.Module, Generic[S]):
    """A `VideoDetector` whose heads follow a gated backbone.

    Attributes:
        spec: the backbone as the update rules see it.
        rule: how tokens are recomputed in `stream` unless it is told.
    """

    spec: ViTSpec
    rule: AnyRule = DEFAULT_RULE
    _stream: type[S]  # what is remembered of a stream

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.spec.device

    def init_state(self, batch: int = 1) -> State[S]:
        """An empty state for `batch` streams."""
        return State([None] * batch)

    @torch.inference_mode(False)  # so that the state can go on in and outside of inference mode
    @torch.no_grad()
    def step(
        self,
        frames: Tensor | Sequence[Tensor],
        state: State[S],
        *,
        rule: AnyRule = DEFAULT_RULE,
        selector: Select = DEFAULT,
        flush: Sequence[bool] | bool = False,
        timing: bool = False,
    ) -> list[StepResult]:
        """Detect in the next frame of every stream.

        Args:
            frames: `(B, 3, h, w)` or B tensors `(3, h, w)`, RGB in [0, 1]; sizes may differ.
            state: of the B streams, updated in place. A frame of a new size flushes its stream alone.
            rule: how tokens are recomputed.
            selector: which tokens are recomputed.
            flush: streams to recompute in full.
            timing: measure the seconds of each part, for which a GPU is waited for once.

        Raises:
            UserError: the numbers of frames and streams differ, a module is in training mode, or the backbone does not
                know the rule.
        """
        if any(module.training for module in self.modules()):
            name = type(self).__name__
            raise UserError(f"{name}.step is for inference, and the detector or a part of it trains; call .eval()")
        stopwatch = Stopwatch(self.device, timing)
        images, streams = [], []
        for i, frame in enumerate(per_stream("frames", list(frames), state)):
            check_frame(frame)
            size = (frame.shape[1], frame.shape[2])
            stream = state.streams[i]
            if stream is None or stream.size != size:
                state.streams[i] = stream = self._stream(State([None]), size)
            images.append(self._normalised(frame))
            streams.append(stream)
        stopwatch.lap("other")
        backbones = State([stream.backbone.streams[0] for stream in streams])
        saliency = [self._saliency(*pair) for pair in zip(images, streams, strict=True)]
        updates = step_streams(
            self.spec, images, backbones, rule=rule, selector=selector, flush=flush, saliency=saliency
        )
        for stream, backbone in zip(streams, backbones.streams, strict=True):
            stream.backbone.streams[0] = backbone
        stopwatch.lap("backbone")
        heads = [Stopwatch(self.device, timing) for _ in streams]
        results = []
        with torch.autocast(self.device.type, enabled=False):  # the heads compute in the type of their parameters
            for update, stream, watch in zip(updates, streams, heads, strict=True):
                update = dataclasses.replace(update, tokens=update.tokens.to(self.spec.dtype))
                results.append(self._step_heads(update, stream, isinstance(rule, Dense), watch))
        shared = {part: seconds / len(streams) for part, seconds in stopwatch.seconds().items()}
        for result, watch in zip(results, heads, strict=True):
            result.cost.seconds.update(shared | watch.seconds())
        return results

    def _normalised(self, frame: Tensor) -> Tensor:
        """A frame `(3, h, w)` as the backbone takes it."""
        raise NotImplementedError

    def _step_heads(self, update: Update, stream: S, dense: bool, watch: Stopwatch) -> StepResult:
        """Detections from the backbone's update of one stream; while nothing changes, those of the frame before."""
        grid = (update.tokens.shape[0], update.tokens.shape[1])
        everything = self._dense_macs(grid)
        macs = {**dict.fromkeys(everything, 0), "backbone": update.macs.total}
        if dense or update.changed.numel() or stream.detections is None:
            stream.detections, heads = self._run_heads(update, stream, dense, watch)
            macs |= heads
        cost = FrameCost(macs, everything, round(float(update.work.sum())), len(update.work), update.flush)
        return StepResult(stream.detections.clone(), cost, update.work.view(grid))

    def _dense_macs(self, grid: Grid) -> dict[str, int]:
        """MACs of the dense detector by part, "backbone" among them."""
        raise NotImplementedError

    def _run_heads(self, update: Update, stream: S, dense: bool, watch: Stopwatch) -> tuple[Detections, dict[str, int]]:
        """Detections from the backbone's update of one stream, and the MACs of the heads by part."""
        raise NotImplementedError

    def _saliency(self, image: Tensor, stream: S) -> Tensor | None:
        """How much each token of a normalised frame matters, `(N,)`: by what was detected on the frame before."""
        found = stream.detections
        if found is None:
            return None
        return token_saliency(found.boxes, found.scores, self.spec.grid(*image.shape[-2:]), self.spec.patch)


def check_frame(frame: object) -> None:
    """Make sure of a frame `(3, h, w)`, RGB in [0, 1].

    Raises:
        UserError: it is something else, such as an array or a file.
    """
    if not isinstance(frame, Tensor) or frame.dim() != 3 or len(frame) != 3 or not frame.is_floating_point():
        shape = f" of shape {tuple(frame.shape)}" if isinstance(frame, Tensor) else ""
        raise UserError(
            f"got a {type(frame).__name__}{shape}; expected float tensors (3, height, width), RGB in [0, 1]. Arrays "
            "(height, width, 3), files and cameras go to stream: detector.stream([array]), detector.stream(path)"
        )


def priced_statically(rule: AnyRule, device: torch.device) -> bool:
    """Whether the rows rule, whose costs are known in advance, runs with static shapes on a device.

    Raises:
        UserError: it is not the rows rule with the patch gate.
    """
    if not isinstance(rule, Rows) or rule.gate != "patches":
        raise UserError("costs are known in advance under the rows rule with the patch gate only")
    return rule.is_static(device)
