"""detectron2's Mask R-CNN with a ViTDet-B, carrying tokens from frame to frame."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from eventful_det.gating.rows import Rows
from eventful_det.integrations.detectron2 import EventfulRCNN


def make_model():
    """The model of projects/ViTDet as an EventfulRCNN, with the rule and the options of its streams."""
    model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    model.update(
        _target_=EventfulRCNN,
        rule=L(Rows)(),
        budget=None,  # tokens per frame (int), share of the tokens (float) or a Selector; None = the default
        incremental_heads=True,
        max_streams=8,
    )
    return model
