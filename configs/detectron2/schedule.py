"""Optimiser and learning rate of projects/ViTDet for ViT-B."""

from functools import partial

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler


def make_optimizer(layers=12):
    """AdamW whose rate falls by 0.7 from each block to the one before; positions do not decay."""
    optimizer = model_zoo.get_config("common/optim.py").AdamW
    optimizer.params.lr_factor_func = partial(get_vit_lr_decay_rate, num_layers=layers, lr_decay_rate=0.7)
    optimizer.params.overrides = {"pos_embed": {"weight_decay": 0.0}}
    return optimizer


def make_lr_multiplier(iterations, warmup=250):
    """Two steps down, at 8/9 and 26/27 of the way."""
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=[1.0, 0.1, 0.01],
            milestones=[round(iterations * 8 / 9), round(iterations * 26 / 27)],
            num_updates=iterations,
        ),
        warmup_length=min(1.0, warmup / iterations),
        warmup_factor=0.001,
    )
