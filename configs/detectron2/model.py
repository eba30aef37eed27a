"""detectron2's Mask R-CNN with a ViTDet-B, carrying tokens from frame to frame."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from eventful_det.gating.policy import Focus
from eventful_det.gating.rows import Rows
from eventful_det.integrations.detectron2 import EventfulRCNN


def make_model():
    """The model of projects/ViTDet as an EventfulRCNN, with the rule and the options of its streams."""
    model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    model.update(
        _target_=EventfulRCNN,
        rule=L(Rows)(policy=L(Focus)(threshold=2.0, cap=0.35, floor=0.25)),
        budget=None,  # instead of the rule's policy: tokens per frame (int) or share of the tokens (float)
        incremental_heads=True,
        max_streams=8,
    )
    return model
