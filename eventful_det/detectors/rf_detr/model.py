"""`EventfulRFDETR`: a `VideoDetector` around somebody's RF-DETR."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eventful_det.data.video.transforms import Image
from eventful_det.detectors.gated import GatedDetector, GatedStream, priced_statically
from eventful_det.detectors.labels import LabelMap, renamed
from eventful_det.detectors.protocol import AnyRule, InputTransform
from eventful_det.detectors.results import Detections
from eventful_det.detectors.rf_detr.parts import Float32Sampling, Parts, parts_of
from eventful_det.detectors.rf_detr.projector import (
    ProjectorState,
    RFDETRCosts,
    everywhere,
    init_projector,
    projector_macs,
    refresh_projector,
)
from eventful_det.detectors.stopwatch import Stopwatch
from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.macs import dense_macs
from eventful_det.gating.state import Update
from eventful_det.gating.vit_spec import spec_of
from eventful_det.gating.windows import Grid
from eventful_det.outputs import reporting, write_json


@dataclass
class RFDETRStream(GatedStream):
    """What the detector remembers of one stream.

    Attributes:
        projector: None before the first frame, and under the dense rule.
    """

    projector: ProjectorState | None = None


@dataclass(frozen=True)
class Stretch(InputTransform):
    """Frames are stretched to squares of `short_side`, bilinearly and without antialiasing, as RF-DETR is trained.

    Attributes:
        step: sides are multiples of it.
        reciprocal: pixels are multiplied by 1 / 255 rather than divided by 255.
    """

    step: int = 1
    reciprocal: bool = False

    def __post_init__(self) -> None:
        if self.short_side % self.step:
            raise UserError(f"RF-DETR: short_side must be a multiple of {self.step} pixels, got {self.short_side}")

    def scaled(self, scale: float) -> InputTransform:
        """The same transform to a side of another scale, rounded to whole windows."""
        side = max(1, round(scale * self.short_side / self.step)) * self.step
        return dataclasses.replace(self, short_side=side, long_side=side)

    def squared(self) -> InputTransform:
        """It makes squares."""
        return self

    def __call__(self, image: Image) -> Tensor:
        """A frame `(h, w, 3)` as input `(3, side, side)`, RGB in [0, 1]."""
        frame = torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous().float()
        frame = frame * (1 / 255) if self.reciprocal else frame / 255
        size = self._size(image)
        if frame.shape[1:] == size:
            return frame
        return F.interpolate(frame[None], size, mode="bilinear", align_corners=False, antialias=False)[0]

    def _size(self, image: Image) -> tuple[int, int]:
        return self.short_side, self.short_side


class EventfulRFDETR(GatedDetector[RFDETRStream]):
    """RF-DETR for video: a `VideoDetector`.

    Modifications against the network that it is made from:
      - none of its modules or parameters: it is `model` here, left intact;
      - `step` replaces `forward` for video: it takes and updates an explicit `State`.

    The decoder runs in full whenever a token changed; on a still frame
    nothing runs.

    Args:
        model: `transformers.RfDetrForObjectDetection`, a model of the package `rfdetr` (`RFDETRNano()`) or its network.
        min_score: detections below this score are dropped; 0 keeps all, as both packages do before their threshold.
        side: of the square input in pixels; None = the model's own.
        mean, std: of RGB in [0, 1], where they are not the ones of both packages.

    Attributes:
        model: the network.
        parts: what it is made of.
        spec: the backbone as the update rules see it.

    Raises:
        UserError: the model is no RF-DETR that finds boxes, or has a part that is not supported.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    _stream = RFDETRStream

    def __init__(
        self,
        model: object,
        *,
        min_score: float = 0.05,
        side: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.model, parts = parts_of(model)
        parts = dataclasses.replace(parts, side=side or parts.side, mean=mean or parts.mean, std=std or parts.std)
        self.parts: Parts = parts
        self.spec = dataclasses.replace(spec_of(parts.backbone), pixel_std=sum(parts.std) / len(parts.std))
        self.min_score = min_score
        self.dropped: list[int] = []
        self.register_buffer("pixel_mean", torch.tensor(parts.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(parts.std).view(3, 1, 1), persistent=False)
        self.pixel_mean, self.pixel_std = self.pixel_mean.to(self.device), self.pixel_std.to(self.device)
        self.eval()

    @property
    def names(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return self.parts.names

    def relabel(self, labels: LabelMap) -> None:
        """Rename classes, or drop them from the results.

        Args:
            labels: new name, or None to drop, by present name; classes that are not in it stay as they are.

        Raises:
            UserError: there is no such class, or two classes would have one name.
        """
        names, dropped = renamed(self.names, labels)
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"label map: RF-DETR cannot have two classes named {', '.join(sorted(twice))}")
        self.parts = dataclasses.replace(self.parts, names=names)
        self.dropped += [names.index(name) for name in dropped]

    @property
    def input_transform(self) -> InputTransform:
        """How a frame becomes an input, in the model's own size."""
        parts, step = self.parts, self.spec.patch * self.spec.regions
        return Stretch(parts.side, parts.side, self.spec.patch, parts.mean, step=step, reciprocal=parts.reciprocal)

    def forward(self, images: Tensor) -> list[Detections]:
        """The dense detector on images `(B, 3, h, w)`, RGB in [0, 1]."""
        results = self.step(list(images), self.init_state(len(images)), rule=Dense())
        return [result.detections for result in results]

    def _save_files(self, folder: Path, notes: Mapping[str, object]) -> None:
        model: Any = self.model
        if not hasattr(model, "save_pretrained"):
            raise UserError("RF-DETR of the package rfdetr has no format for folders; take that of transformers")
        parts = self.parts
        with reporting(folder):
            model.save_pretrained(folder)
        processing = {"size": {"height": parts.side, "width": parts.side}, "image_mean": parts.mean}
        write_json(folder / "preprocessor_config.json", {**processing, "image_std": parts.std})

    def cost_model(self, rule: AnyRule) -> RFDETRCosts:
        """What frames will cost under a rule.

        Raises:
            UserError: it is not the rows rule with the patch gate.
        """
        static = priced_statically(rule, self.device)
        return RFDETRCosts(self.spec.shape, static, self.parts.projector, self.parts.decoder)

    def _normalised(self, frame: Tensor) -> Tensor:
        return (frame - self.pixel_mean) / self.pixel_std

    def _dense_macs(self, grid: Grid) -> dict[str, int]:
        projector = self.parts.projector
        return {
            "backbone": dense_macs(self.spec.shape, grid, padded_linear=True).total,
            "projector": projector_macs(projector, everywhere(projector, grid)),
            "decoder": self.parts.decoder.macs(grid[0] * grid[1]),
        }

    def _run_heads(
        self, update: Update, stream: RFDETRStream, dense: bool, watch: Stopwatch
    ) -> tuple[Detections, dict[str, int]]:
        grid, projector = (update.tokens.shape[0], update.tokens.shape[1]), self.parts.projector
        changed, state = update.changed, None if dense else stream.projector
        if state is None:
            state = init_projector(projector, grid, update.tokens)
            changed = torch.arange(len(update.work), device=update.tokens.device)
        sizes = refresh_projector(projector, update.tokens, changed, state)
        stream.projector = None if dense else state
        watch.lap("projector")
        features = state.feature.T.unflatten(1, grid)[None]  # (1, C, H, W)
        with Float32Sampling() if features.dtype.itemsize < 4 else contextlib.nullcontext():
            logits, boxes = self.parts.decode(features)
        found = best_pairs(logits[0], boxes[0], stream.size, self.min_score, self.parts.clamped, self.dropped)
        watch.lap("decoder")
        macs = {"projector": projector_macs(projector, sizes), "decoder": self.parts.decoder.macs(len(update.work))}
        return found, macs


def best_pairs(
    logits: Tensor, boxes: Tensor, size: tuple[int, int], min_score: float, clamped: bool, dropped: Sequence[int] = ()
) -> Detections:
    """The best pairs of a query and a class, as many as there are queries.

    Args:
        logits: `(Q, K)`.
        boxes: `(Q, 4)` centre and size, 0 to 1.
        size: (height, width) in pixels.
        min_score: pairs below it are dropped.
        clamped: whether boxes end at the borders of the frame.
        dropped: classes that are not reported.
    """
    scores = logits.float().sigmoid()
    scores[:, list(dropped)] = -1.0
    scores, best = scores.flatten().sort(descending=True, stable=True)
    scores, best = scores[: len(logits)], best[: len(logits)]
    keep = scores >= max(min_score, 0.0)
    scores, best = scores[keep], best[keep]
    centre, extent = boxes.float()[best // logits.shape[1]].split(2, 1)
    corners = torch.cat([centre - 0.5 * extent, centre + 0.5 * extent], 1)  # (n, 4)
    scale = corners.new_tensor([size[1], size[0], size[1], size[0]])
    corners = corners * scale
    if clamped:
        corners = torch.minimum(corners.clamp(min=0), scale)
    return Detections(corners, scores, best % logits.shape[1])
