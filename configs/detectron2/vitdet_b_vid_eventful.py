"""The paper's detector for ImageNet VID: ViTDet-B without masks, eventful on the validation videos.

    python path/to/detectron2/tools/lazyconfig_train_net.py \
        --config-file configs/detectron2/vitdet_b_vid_eventful.py \
        --eval-only train.init_checkpoint=frcnn_vitdet_final.pth

Data: $DETECTRON2_DATASETS/ILSVRC2015 (default: datasets/), prepared by datasets/prepare_imagenet_vid.py.
"""

import os

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data import transforms as T

from eventful_det.integrations.detectron2 import (
    VIDEvaluator,
    VIDMapper,
    build_vid_test_loader,
    register_imagenet_vid,
)

from .model import make_model
from .schedule import make_lr_multiplier, make_optimizer

if not {"imagenet_vid_train", "imagenet_vid_val"} <= set(DatasetCatalog):  # those that you registered stay
    register_imagenet_vid(os.path.join(os.environ.get("DETECTRON2_DATASETS", "datasets"), "ILSVRC2015"))

model = make_model()
model.backbone.square_pad = 0  # frames are padded to multiples of 32 pixels only
model.proposal_generator.post_nms_topk = (1000, 300)
model.roi_heads.update(num_classes=30, batch_size_per_image=128)
model.roi_heads.box_predictor.update(box_reg_loss_type="giou", loss_weight={"loss_box_reg": 2.0})
for mask in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(mask)

dataloader = dict(
    train=L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names=("imagenet_vid_train", "imagenet_det_train")),
        mapper=L(VIDMapper)(
            is_train=True,
            augmentations=[
                L(T.RandomFlip)(horizontal=True),
                L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=1024, target_width=1024),
                L(T.FixedSizeCrop)(crop_size=(1024, 1024), pad=False),
            ],
        ),
        total_batch_size=16,
        num_workers=4,
    ),
    test=L(build_vid_test_loader)(
        names="imagenet_vid_val",
        mapper=L(VIDMapper)(short_side=576, long_side=1024),
        streams=1,
        num_workers=4,
    ),
    evaluator=L(VIDEvaluator)(dataset_name="${..test.names}", output_dir="${train.output_dir}"),
)

train = model_zoo.get_config("common/train.py").train
train.amp.enabled = True
train.ddp.fp16_compression = True
train.init_checkpoint = "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth?matching_heuristics=True"
train.max_iter = 90000

optimizer = make_optimizer()
lr_multiplier = make_lr_multiplier(train.max_iter)
