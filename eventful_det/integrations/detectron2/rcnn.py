"""`EventfulRCNN`: detectron2's ViTDet, whose ViT recomputes only what changed from frame to frame of a video."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import ImageList, Instances
from torch import Tensor

from eventful_det.detectors.results import FrameCost
from eventful_det.errors import UserError
from eventful_det.gating.convert import EventfulViT, Rule, eventify
from eventful_det.gating.macs import dense_macs
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.gating.selector import Selector
from eventful_det.gating.state import State, StreamState
from eventful_det.gating.update import Update
from eventful_det.integrations.detectron2.config import eventful_options
from eventful_det.integrations.detectron2.heads import IncrementalHeads, pyramid_features
from eventful_det.integrations.video_states import VideoStates
from eventful_det.models.incremental import HeadsState
from eventful_det.models.saliency import token_saliency
from eventful_det.runtime.budget import selector_for

Input = dict[str, Any]


@dataclass
class RCNNStream:
    """What is remembered of a video.

    Attributes:
        backbone: state of the update rule.
        heads: maps of the pyramid and the proposal network, where these are incremental.
        instances: found in the last frame, in pixels of the network's input; they stand while nothing changes.
    """

    backbone: StreamState | None = None
    heads: HeadsState | None = None
    instances: Instances | None = None


@META_ARCH_REGISTRY.register()
class EventfulRCNN(GeneralizedRCNN):
    """A `GeneralizedRCNN` for video.

    Modifications against `GeneralizedRCNN`, with the same parameters under the same names:
      - in evaluation mode, an input with "video_id" and "frame_id" goes on from the last frame of its video: the ViT
        recomputes the tokens that its rule selects. Frame 0, a gap and a new size recompute everything. Inputs
        without "video_id" are still pictures, and "is_last_frame" says that nothing of the video will follow;
      - frames are padded one by one, not to the largest of the batch, so that videos do not influence each other, and
        to sides that the pyramid can halve, as still pictures are not unless the backbone pads to squares;
      - outputs of frames have a "cost" beside "instances": the backbone's `FrameCost`;
      - what is remembered is in `states`: no part of a checkpoint, gone when training starts or weights are loaded.

    Args:
        rule: "rows", "paper", a `Rows` or a `Paper`; "dense" for detectron2's own inference.
        budget: tokens per frame (int), share of the tokens (float) or a selector; the default selector if None.
        incremental_heads: recompute pyramid and proposals where tokens changed, with equal results.
        max_streams: videos remembered at once.
        max_gap: largest step of "frame_id" with which a video goes on.
        parts: of `GeneralizedRCNN`; `backbone` is a `SimpleFeaturePyramid` on a `ViT`.

    Raises:
        UserError: the backbone or an option is not supported.
    """

    @configurable
    def __init__(
        self,
        *,
        rule: Rows | Paper | Literal["rows", "paper", "dense"] = "rows",
        budget: float | int | Selector | None = None,
        incremental_heads: bool = False,
        max_streams: int = 8,
        max_gap: int = 1,
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        if not all(hasattr(self.backbone, name) for name in ("net", "stages", "in_feature")):
            raise UserError(f"EventfulRCNN needs a SimpleFeaturePyramid backbone, got {type(self.backbone).__name__}")
        if self.proposal_generator is None:
            raise UserError("EventfulRCNN needs a proposal generator; precomputed proposals are not supported")
        self.dense = rule == "dense"
        if not self.dense:
            rules: dict[Any, Rows | Paper] = {"rows": Rows(), "paper": Paper()}
            made = cast(Rule[StreamState], rules.get(rule, cast(Any, rule)))
            self.backbone.net = eventify(self.backbone.net, made, selector_for(budget))
        self._heads = IncrementalHeads(self.backbone, self.proposal_generator) if incremental_heads else None
        self.states = VideoStates(RCNNStream, max_streams, max_gap)
        self.register_load_state_dict_post_hook(_forget)

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        """Arguments from a yacs config with the nodes of `add_eventful_config`."""
        return {**super().from_config(cfg), **eventful_options(cfg)}

    @property
    def budget(self) -> Selector:
        """The selector that holds the budget; set tokens (int), a share of the tokens (float), or a selector."""
        return cast(Selector, self._net.selector)

    @budget.setter
    def budget(self, budget: float | int | Selector) -> None:
        self._net.selector = selector_for(budget)

    def train(self, mode: bool = True) -> EventfulRCNN:
        """As for any module; training changes the weights, so all videos are forgotten."""
        if mode:
            self.states.clear()
        return cast(EventfulRCNN, super().train(mode))

    def inference(
        self,
        batched_inputs: list[Input],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[Any]:
        """As `GeneralizedRCNN.inference`; frames of videos go on from the frame before.

        Frames of one video may follow each other in a batch, and frames of several may alternate.
        """
        stills = not any("video_id" in x for x in batched_inputs)
        if self.dense or stills or detected_instances is not None:
            return super().inference(batched_inputs, detected_instances, do_postprocess)
        found: dict[int, tuple[Instances, FrameCost]] = {}
        try:
            for chosen in _rounds([x.get("video_id") for x in batched_inputs]):
                found |= zip(chosen, self._step([batched_inputs[i] for i in chosen]), strict=True)
        except BaseException:
            self.states.clear()  # a frame that was half processed is in some parts of its state, not in others
            raise
        instances, costs = zip(*(found[i] for i in range(len(batched_inputs))), strict=True)
        if not do_postprocess:
            return list(instances)
        outputs = GeneralizedRCNN._postprocess(instances, batched_inputs, [x.image_size for x in instances])
        return [{**output, "cost": cost} for output, cost in zip(outputs, costs, strict=True)]

    @property
    def _net(self) -> EventfulViT[StreamState]:
        if self.dense:
            raise UserError("rule is 'dense': there is no budget; build EventfulRCNN with rule 'rows' or 'paper'")
        return cast(EventfulViT[StreamState], self.backbone.net)

    @torch.no_grad()
    def _step(self, inputs: Sequence[Input]) -> list[tuple[Instances, FrameCost]]:
        """Process frames of different videos."""
        images = [self._image(x) for x in inputs]
        streams = [self._stream(x, image.image_sizes[0]) for x, image in zip(inputs, images, strict=True)]
        frames = [image.tensor[0] for image in images]
        saliency = [self._saliency(*pair) for pair in zip(frames, streams, strict=True)]
        state = State([stream.backbone for stream in streams])
        updates = self._net.step(frames, state, saliency=saliency)
        results = []
        for stream, backbone, update, image in zip(streams, state.streams, updates, images, strict=True):
            stream.backbone = backbone
            if update.changed.numel() or stream.instances is None:
                stream.instances = self._find(update, stream, image)
            results.append((copy.deepcopy(stream.instances), self._cost(update)))  # postprocessing scales in place
        return results

    def _image(self, frame: Input) -> ImageList:
        """A normalised frame, padded so that the pyramid can halve its token map.

        `preprocess_image` leaves that out unless the backbone pads to squares: the pyramid misspells its wish.
        """
        image = (self._move_to_current_device(frame["image"]) - self.pixel_mean) / self.pixel_std
        wishes = self.backbone.padding_constraints
        divisor = wishes.get("size_divisibility", wishes.get("size_divisiblity", 0))
        return ImageList.from_tensors([image], divisor, padding_constraints=wishes)

    def _stream(self, frame: Input, size: tuple[int, int]) -> RCNNStream:
        """What is remembered of the video of a frame."""
        if "video_id" not in frame:
            return RCNNStream()
        if "frame_id" not in frame:
            raise UserError('an input has "video_id" but no "frame_id"; give its number in the video, from 0')
        stream = self.states.at(frame["video_id"], frame["frame_id"], size)
        if frame.get("is_last_frame"):
            self.states.forget(frame["video_id"])
        return stream

    def _saliency(self, frame: Tensor, stream: RCNNStream) -> Tensor | None:
        """How much each token of a frame matters, by where something was found on the last frame."""
        found, vit = stream.instances, self._net.spec
        if found is None:
            return None
        return token_saliency(found.pred_boxes.tensor, found.scores, vit.grid(*frame.shape[-2:]), vit.patch)

    def _find(self, update: Update, stream: RCNNStream, image: ImageList) -> Instances:
        """The objects on a token map, in pixels of the network's input."""
        if self._heads is None:
            features = pyramid_features(self.backbone, update.tokens)
            proposals, _ = self.proposal_generator(image, features, None)
        else:
            stream.heads = self._heads(update, stream.heads)
            features, proposals = self._heads.read(stream.heads, image)
        (instances,), _ = self.roi_heads(image, features, proposals, None)
        return instances

    def _cost(self, update: Update) -> FrameCost:
        rows, cols = update.tokens.shape[:2]
        dense = dense_macs(self._net.spec.shape, (rows, cols)).total
        recomputed = round(float(update.work.sum()))
        return FrameCost({"backbone": update.macs.total}, {"backbone": dense}, recomputed, rows * cols, update.flush)


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
