"""detectron2's COCO Mask R-CNN with a ViTDet-B, as in projects/ViTDet, its backbone eventful on videos.

Weights of the zoo fit. Still pictures run as ever; inputs with "video_id" and "frame_id" go on from frame to frame.

    python path/to/detectron2/tools/lazyconfig_train_net.py \
        --config-file configs/detectron2/mask_rcnn_vitdet_b_eventful.py \
        --eval-only train.init_checkpoint=model_final_61ccd1.pkl
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

from .model import make_model
from .schedule import make_lr_multiplier, make_optimizer

model = make_model()

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.total_batch_size = 64
dataloader.train.mapper.update(
    image_format="RGB",
    recompute_boxes=True,
    augmentations=[
        L(T.RandomFlip)(horizontal=True),
        L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=1024, target_width=1024),
        L(T.FixedSizeCrop)(crop_size=(1024, 1024), pad=False),
    ],
)
dataloader.test.mapper.augmentations = [L(T.ResizeShortestEdge)(short_edge_length=1024, max_size=1024)]

train = model_zoo.get_config("common/train.py").train
train.amp.enabled = True
train.ddp.fp16_compression = True
train.init_checkpoint = "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth?matching_heuristics=True"
train.max_iter = 184375  # 100 epochs of 64 images

optimizer = make_optimizer()
lr_multiplier = make_lr_multiplier(train.max_iter)
