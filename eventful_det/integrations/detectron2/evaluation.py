"""Average precision on video, as `eventful_det.evaluation` counts it, for detectron2's loops."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from pathlib import Path
from statistics import fmean
from typing import Any

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from eventful_det.data.coco_video import CocoVideo
from eventful_det.detectors.results import Detections, FrameCost
from eventful_det.errors import UserError
from eventful_det.evaluation.detection import Entry, coco_results, evaluate
from eventful_det.evaluation.ilsvrc import vid_scores
from eventful_det.files import JsonObject
from eventful_det.integrations.detectron2.datasets import load_registered

logger = logging.getLogger(__name__)


class VIDEvaluator(DatasetEvaluator):
    """Scores detections on a registered COCO-video data set; docs/metrics.md says what each number is.

    The scores stand under the key "video", so that it goes with a `COCOEvaluator` on the same data. Precisions are in
    percent, as detectron2 prints them: AP, AP50, AP75; AP50_vid, AP50_slow, AP50_medium and AP50_fast as papers on
    ImageNet VID count; AP_ilsvrc; AP50-NAME of each class. With `EventfulRCNN` also GMACs and
    GMACs_dense of the whole detector, 1e9 multiply-adds per frame, the same of the backbone, and recomputed, the
    percentage of the tokens. Frames that were not processed are in no number; a warning names how many.

    Args:
        dataset_name: registered by `register_imagenet_vid` or `register_coco_video`.
        output_dir: where the detections are written, as coco_results.json; nowhere if None.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None) -> None:
        self.dataset_name, self.output_dir = dataset_name, output_dir
        self.data = load_registered(dataset_name)
        self.reset()

    def reset(self) -> None:
        """Forget what was processed."""
        self._results: list[Entry] = []
        self._frames: list[int] = []
        self._costs: list[FrameCost] = []

    def process(self, inputs: list[JsonObject], outputs: list[JsonObject]) -> None:
        """Take the detections, and where there is one the cost, of some frames.

        Raises:
            UserError: the model detects another number of classes than the data set has.
        """
        categories = [category for category, _ in self.data.categories]
        for entry, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            found = Detections(instances.pred_boxes.tensor, instances.scores, instances.pred_classes)
            self._check_classes(output.get("num_classes"), found)
            self._frames.append(entry["image_id"])
            self._results += coco_results({entry["image_id"]: found}, categories)
            if "cost" in output:
                self._costs.append(output["cost"])

    def evaluate(self) -> dict[str, dict[str, float]]:
        """The scores of all processes' frames; empty in all processes but the first."""
        results, frames, costs = (_gather(rows) for rows in (self._results, self._frames, self._costs))
        if not comm.is_main_process():
            return {}
        if self.output_dir is not None:
            Path(self.output_dir).mkdir(parents=True, exist_ok=True)
            (Path(self.output_dir) / "coco_results.json").write_text(json.dumps(results) + "\n")
        data = self._processed(set(frames))
        scores, vid = evaluate(data, results), vid_scores(data, results)
        precisions = {
            "AP": scores.ap,
            "AP50": scores.ap50,
            "AP75": scores.ap75,
            "AP50_vid": vid.ap50_vid,
            "AP50_slow": vid.ap50_slow,
            "AP50_medium": vid.ap50_medium,
            "AP50_fast": vid.ap50_fast,
            "AP_ilsvrc": vid.ap_ilsvrc,
            **{f"AP50-{name}": value for name, value in scores.ap50_by_class.items()},
        }
        return {"video": {name: 100 * value for name, value in precisions.items()} | _cost(costs)}

    def _check_classes(self, count: int | None, found: Detections) -> None:
        known, label = len(self.data.categories), int(found.labels.max()) if len(found) else -1
        if label >= known or count not in (None, known):
            detected = f"at least {label + 1}" if count is None else count
            raise UserError(
                f"the model detects {detected} classes, but the data set {self.dataset_name!r} has {known}; set "
                f"model.roi_heads.num_classes={known} (yacs: MODEL.ROI_HEADS.NUM_CLASSES) and load weights of it"
            )

    def _processed(self, frames: set[int]) -> CocoVideo:
        """The data set without the frames that were not processed."""
        lacking = sum(frame.image_id not in frames for frame in self.data.frames)
        if lacking:
            logger.warning("%s: %d frames were not processed; they are in no number", self.dataset_name, lacking)
        videos = [
            dataclasses.replace(video, frames=[frame for frame in video.frames if frame.image_id in frames])
            for video in self.data.videos
        ]
        return dataclasses.replace(self.data, videos=videos)


def _gather(rows: list[Any]) -> list[Any]:
    """The rows of all processes in the first one, in the others nothing."""
    return list(itertools.chain.from_iterable(comm.gather(rows, dst=0)))


def _cost(costs: list[FrameCost]) -> dict[str, float]:
    if not costs:
        return {}
    return {
        "GMACs": fmean(cost.total for cost in costs) / 1e9,
        "GMACs_dense": fmean(cost.dense_total for cost in costs) / 1e9,
        "GMACs_backbone": fmean(cost.macs["backbone"] for cost in costs) / 1e9,
        "GMACs_backbone_dense": fmean(cost.dense["backbone"] for cost in costs) / 1e9,
        "recomputed": 100 * sum(cost.recomputed for cost in costs) / sum(cost.tokens for cost in costs),
    }
