"""Eventful detection in detectron2: a meta-architecture, configs, ImageNet VID and its evaluator.

Importing this package registers `EventfulRCNN` and `build_eventful_vitdet_backbone`. docs/detectron2.md shows how to
use it, and how to install detectron2.
"""

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError(
        "eventful_det.integrations.detectron2 needs detectron2, which is not on PyPI; docs/detectron2.md has the "
        "commands that install it"
    ) from error

from eventful_det.integrations.detectron2.config import add_eventful_config as add_eventful_config
from eventful_det.integrations.detectron2.datasets import register_coco_video as register_coco_video
from eventful_det.integrations.detectron2.datasets import register_imagenet_vid as register_imagenet_vid
from eventful_det.integrations.detectron2.evaluation import VIDEvaluator as VIDEvaluator
from eventful_det.integrations.detectron2.loading import VideoSampler as VideoSampler
from eventful_det.integrations.detectron2.loading import VIDMapper as VIDMapper
from eventful_det.integrations.detectron2.loading import build_vid_test_loader as build_vid_test_loader
from eventful_det.integrations.detectron2.rcnn import EventfulRCNN as EventfulRCNN
from eventful_det.integrations.detectron2.streaming import SourceLoader as SourceLoader
from eventful_det.integrations.detectron2.streaming import VideoPredictor as VideoPredictor
from eventful_det.integrations.detectron2.streaming import load_weights as load_weights
