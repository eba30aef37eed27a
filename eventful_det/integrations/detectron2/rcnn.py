"""`EventfulRCNN`: detectron2's ViTDet, whose ViT recomputes only what changed from frame to frame of a video."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, ROIHeads, SimpleFeaturePyramid
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import ImageList, Instances
from torch import Tensor

from eventful_det.data.source import VideoFrame
from eventful_det.detectors.gated import GatedDetector, GatedStream, priced_statically
from eventful_det.detectors.protocol import AnyRule, InputTransform
from eventful_det.detectors.results import Detections
from eventful_det.detectors.stopwatch import Stopwatch
from eventful_det.detectors.vitdet.incremental import HeadsState
from eventful_det.detectors.vitdet.macs import DetectorCosts
from eventful_det.errors import UserError
from eventful_det.files import JsonObject
from eventful_det.gating.dense import Dense
from eventful_det.gating.macs import dense_macs
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.gating.selector import Budget, Selector
from eventful_det.gating.state import Update
from eventful_det.gating.vit_spec import spec_of
from eventful_det.gating.windows import Grid
from eventful_det.integrations.detectron2.config import eventful_options
from eventful_det.integrations.detectron2.heads import Heads
from eventful_det.integrations.video_states import VideoStates
from eventful_det.runtime.budget import parse_budget, selector_for
from eventful_det.runtime.control import Stepper
from eventful_det.runtime.session import KeyFrame, StreamResult, StreamSession

_RULES: dict[object, AnyRule] = {"rows": Rows(), "paper": Paper(), "dense": Dense()}


@dataclass
class RCNNStream(GatedStream):
    """What is remembered of a video.

    Attributes:
        heads: maps of the pyramid and the proposal network, where these are incremental.
        instances: the `detections` as detectron2 has them, in pixels of the network's input.
    """

    heads: HeadsState | None = None
    instances: Instances | None = None


@META_ARCH_REGISTRY.register()
class EventfulRCNN(GatedDetector[RCNNStream], GeneralizedRCNN):
    """A `GeneralizedRCNN` for video, and a `VideoDetector`.

    Modifications against `GeneralizedRCNN`, with the same modules and parameters under the same names:
      - in evaluation mode, an input with "video_id" and "frame_id" goes on from the last frame of its video: the ViT
        recomputes the tokens that are selected. Frame 0, a gap, a new size, a scene cut and "flush" recompute
        everything. Inputs without "video_id" are still pictures, and "is_last_frame" says that nothing of the video
        will follow;
      - frames are padded one by one, not to the largest of the batch, so that videos do not influence each other, and
        to sides that the pyramid can halve, as still pictures are not unless the backbone pads to squares;
      - outputs of frames have beside "instances" a "cost" (`FrameCost`), the "work" `(H, W)` that each token had done,
        and "num_classes";
      - what is remembered is in `states`: no part of a checkpoint, gone when training starts or weights are loaded.

    Args:
        backbone: a `SimpleFeaturePyramid` on a `ViT`.
        proposal_generator, roi_heads, pixel_mean, pixel_std, input_format, vis_period: of `GeneralizedRCNN`.
        rule: how tokens are recomputed: a `Rows` or `Paper`, or "rows" or "paper"; "dense" for detectron2's inference.
        budget: what a frame may cost: a share of the tokens (float), tokens (int), or a `Selector`. `Gmacs`, `Latency`
            and texts such as "40GMACs" and "50ms" are for the frames of a batch together. None = the default selector.
        incremental_heads: recompute pyramid and proposals where tokens changed, with equal results.
        scene_cuts: recompute everything when another scene begins.
        max_streams: videos remembered at once.
        max_gap: largest step of "frame_id" with which a video goes on.
        short_side, long_side: of the input in pixels, where frames come from elsewhere than a loader.
        names: of the classes; by default their numbers.

    Raises:
        UserError: the model or an option is not supported.
    """

    backbone: SimpleFeaturePyramid
    pixel_mean: Tensor
    pixel_std: Tensor
    _stream = RCNNStream

    @configurable
    def __init__(
        self,
        *,
        backbone: SimpleFeaturePyramid,
        proposal_generator: RPN,
        roi_heads: ROIHeads,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str | None = None,
        vis_period: int = 0,
        rule: AnyRule | Literal["rows", "paper", "dense"] = "rows",
        budget: Budget | Selector | str = None,
        incremental_heads: bool = True,
        scene_cuts: bool = True,
        max_streams: int = 8,
        max_gap: int = 1,
        short_side: int = 1024,
        long_side: int = 1024,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__(
            backbone=backbone,
            proposal_generator=proposal_generator,
            roi_heads=roi_heads,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            input_format=input_format,
            vis_period=vis_period,
        )
        if not all(hasattr(backbone, name) for name in ("net", "stages", "in_feature")):
            raise UserError(f"EventfulRCNN needs a SimpleFeaturePyramid backbone, got {type(backbone).__name__}")
        if proposal_generator is None:
            raise UserError("EventfulRCNN needs a proposal generator; precomputed proposals are not supported")
        if isinstance(rule, str) and rule not in _RULES:
            raise UserError(f"unknown rule {rule!r}; expected rows, paper or dense, or a Rows or Paper")
        self.rule = _RULES[rule] if isinstance(rule, str) else rule
        std = sum(pixel_std) / len(pixel_std) / 255  # detectron2's pixels go to 255
        self.spec = dataclasses.replace(spec_of(backbone.net), pixel_std=std)
        self.names = tuple(names) or tuple(map(str, range(roi_heads.num_classes)))
        self.input_transform = InputTransform(short_side, long_side, self.spec.patch)
        self.heads = Heads(self.backbone, self.proposal_generator, self.roi_heads, incremental_heads)
        self.states = VideoStates(partial(self._session, scene_cuts), max_streams, max_gap)
        selector = selector_for(budget if isinstance(budget, Selector) else parse_budget(budget))
        self._stepper = Stepper(self, rule=self.rule, budget=selector, options=None, timing=False)
        self.register_load_state_dict_post_hook(_forget)
        # Constants; DDP would exchange them before each forward, and wait for processes that have fewer frames.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]

    @classmethod
    def from_config(cls, cfg: CfgNode) -> JsonObject:
        """Arguments from a yacs config with the nodes of `add_eventful_config`."""
        return {**super().from_config(cfg), **eventful_options(cfg)}

    @property
    def dense(self) -> bool:
        """Whether inference is detectron2's own."""
        return isinstance(self.rule, Dense)

    @property
    def budget(self) -> Selector:
        """The selector that holds the budget; whatever the argument `budget` may be can be set between any frames."""
        return cast(Selector, self._stepper.budget)

    @budget.setter
    def budget(self, budget: Budget | Selector | str) -> None:
        if self.dense:
            raise UserError("rule is 'dense': there is no budget; build EventfulRCNN with rule 'rows' or 'paper'")
        self._stepper.budget = selector_for(budget if isinstance(budget, Selector) else parse_budget(budget))

    def train(self, mode: bool = True) -> EventfulRCNN:
        """As for any module; training changes the weights, so all videos are forgotten."""
        if mode:
            self.states.clear()
        return super().train(mode)

    def inference(
        self,
        batched_inputs: list[JsonObject],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[Instances] | list[JsonObject]:
        """As `GeneralizedRCNN.inference`; frames of videos go on from the frame before.

        Frames of one video may follow each other in a batch, and frames of several may alternate. While PyTorch traces,
        as detectron2's `analyze_model.py` does to count, the dense network runs.
        """
        stills = not any("video_id" in x for x in batched_inputs)
        if self.dense or stills or detected_instances is not None or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return super().inference(batched_inputs, detected_instances, do_postprocess)
        results: dict[int, tuple[Instances, StreamResult]] = {}
        try:
            for chosen in _rounds([x.get("video_id") for x in batched_inputs]):
                results |= zip(chosen, self._advance([batched_inputs[i] for i in chosen]), strict=True)
        except BaseException:
            self.states.clear()  # a frame that was half processed is in some parts of its state, not in others
            raise
        instances, about = zip(*(results[i] for i in range(len(batched_inputs))), strict=True)
        if not do_postprocess:
            return list(instances)
        outputs = GeneralizedRCNN._postprocess(instances, batched_inputs, [x.image_size for x in instances])
        return [
            {**output, "cost": result.cost, "work": result.work, "num_classes": len(self.names)}
            for output, result in zip(outputs, about, strict=True)
        ]

    def cost_model(self, rule: AnyRule) -> DetectorCosts:
        """What frames will cost under a rule.

        Raises:
            UserError: it is not the rows rule with the patch gate, or the heads are not incremental.
        """
        if self.heads.weights is None or not self.heads.incremental:
            raise UserError("costs are known in advance with incremental_heads only")
        static = priced_statically(rule, self.device)
        return DetectorCosts(self.spec.shape, self.heads.weights, self.heads.regions.most, static)

    def _advance(self, inputs: Sequence[JsonObject]) -> list[tuple[Instances, StreamResult]]:
        """Process frames of different videos."""
        due = [self._begin(x) for x in inputs]
        results = self._stepper.step(due)
        streams = [cast(RCNNStream, session.state.streams[0]) for session, _ in due]
        # Postprocessing scales instances in place.
        return [(copy.deepcopy(s.instances), result) for s, result in zip(streams, results, strict=True)]

    def _begin(self, frame: JsonObject) -> tuple[StreamSession[RCNNStream], KeyFrame]:
        """The session of the video of a frame, and the frame."""
        pixels = frame["image"].permute(1, 2, 0).cpu().numpy()  # (h, w, 3), 0 to 255
        pixels = pixels[..., ::-1] if self.input_format == "BGR" else pixels
        image = np.ascontiguousarray(pixels if pixels.dtype == np.uint8 else pixels.clip(0, 255).astype(np.uint8))
        session = self._session_of(frame, (image.shape[0], image.shape[1]))
        key = session.begin(VideoFrame(image, resumed=bool(frame.get("flush"))), resized=pixels)
        return session, cast(KeyFrame, key)  # nothing is held

    def _session_of(self, frame: JsonObject, size: tuple[int, int]) -> StreamSession[RCNNStream]:
        if "video_id" not in frame:
            return self._session(False, size)
        if "frame_id" not in frame:
            raise UserError('an input has "video_id" but no "frame_id"; give its number in the video, from 0')
        session = self.states.at(frame["video_id"], frame["frame_id"], size)
        if frame.get("is_last_frame"):
            self.states.forget(frame["video_id"])
        return session

    def _session(self, scene_cuts: bool, size: tuple[int, int]) -> StreamSession[RCNNStream]:
        """A session for frames that a loader has resized to this (height, width)."""
        transform = InputTransform(min(size), max(size), self.spec.patch)
        return StreamSession(self, transform, scene_cuts=scene_cuts)

    def _normalised(self, frame: Tensor) -> Tensor:
        """A frame `(3, h, w)`, RGB in [0, 1], normalised, and padded so that the pyramid can halve its token map.

        `preprocess_image` leaves that out unless the backbone pads to squares: the pyramid misspells its wish.
        """
        pixels = 255 * (frame.flip(0) if self.input_format == "BGR" else frame)
        image = (pixels - self.pixel_mean) / self.pixel_std
        wishes = self.backbone.padding_constraints
        divisor = wishes.get("size_divisibility", wishes.get("size_divisiblity", 0))
        return cast(Tensor, ImageList.from_tensors([image], divisor, padding_constraints=wishes).tensor[0])

    def _dense_macs(self, grid: Grid) -> dict[str, int]:
        return {"backbone": dense_macs(self.spec.shape, grid).total, **self.heads.dense(grid)}

    def _run_heads(
        self,
        update: Update,
        stream: RCNNStream,
        dense: bool,
        watch: Stopwatch,  # noqa: ARG002 (the heads know)
    ) -> tuple[Detections, dict[str, int]]:
        found, stream.heads, macs = self.heads(update, stream.heads, stream.size)
        stream.instances = found
        watch.lap("heads")
        return Detections(found.pred_boxes.tensor, found.scores, found.pred_classes), macs


def _forget(model: EventfulRCNN, _: object) -> None:
    """Weights were loaded: what is remembered was computed with others."""
    model.states.clear()


def _rounds(videos: Sequence[Hashable | None]) -> Iterator[list[int]]:
    """Split a batch so that no video occurs twice in a round and its frames keep their order; yields indices."""
    seen: Counter[Hashable] = Counter()
    rounds: dict[int, list[int]] = {}
    for i, video in enumerate(videos):
        turn = 0 if video is None else seen[video]
        seen[video] += 1
        rounds.setdefault(turn, []).append(i)
    yield from rounds.values()
