"""yacs configs: the options of `EventfulRCNN`, and a ViTDet backbone, which detectron2 builds from LazyConfigs only."""

from __future__ import annotations

from functools import partial

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, SimpleFeaturePyramid, ViT
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import nn

from eventful_det.errors import UserError
from eventful_det.gating.rows import Rows
from eventful_det.gating.selector import LargestError, Selector


def add_eventful_config(cfg: CfgNode) -> None:
    """Add the nodes MODEL.EVENTFUL and MODEL.VITDET.

    Use them with `MODEL.META_ARCHITECTURE: EventfulRCNN` and, unless you have a ViTDet backbone of your own,
    `MODEL.BACKBONE.NAME: build_eventful_vitdet_backbone`.
    """
    cfg.MODEL.EVENTFUL = node = CfgNode()
    node.RULE = "rows"  # rows, paper or dense
    node.BUDGET = None  # share of the tokens (float), tokens (int), "40GMACs" or "50ms"; None = the default selector
    node.THRESHOLD = None  # instead of a budget: recompute tokens that changed by more than this ...
    node.CAP = 1.0  # ... at most this share of them
    node.AGE_POWER = 0.5  # change x age^AGE_POWER orders tokens where the cap has to choose
    node.RENEW_EVERY = 0  # rows: recompute everything on every n-th frame; 0 = never
    node.INCREMENTAL_HEADS = True  # recompute pyramid and proposals where tokens changed
    node.SCENE_CUTS = True  # recompute everything when another scene begins
    node.MAX_STREAMS = 8  # videos remembered at once
    node.MAX_GAP = 1  # largest step of frame_id with which a video goes on

    cfg.MODEL.VITDET = node = CfgNode()
    node.EMBED_DIM = 768
    node.DEPTH = 12
    node.NUM_HEADS = 12
    node.WINDOW_SIZE = 14
    node.GLOBAL_BLOCKS = (2, 5, 8, 11)  # the others attend within windows
    node.DROP_PATH = 0.1
    node.IMAGE_SIZE = 1024  # that the relative positions of the global blocks are stored for
    node.PRETRAIN_IMAGE_SIZE = 224  # that the position encoding is stored for
    node.OUT_CHANNELS = 256
    node.SQUARE_PAD = 0  # pad frames to squares of this side, as detectron2's zoo models do with 1024; 0 = do not


def eventful_options(cfg: CfgNode) -> dict[str, object]:
    """Arguments of `EventfulRCNN` from MODEL.EVENTFUL.

    Raises:
        UserError: options contradict each other.
    """
    node = cfg.MODEL.EVENTFUL
    if node.RENEW_EVERY and node.RULE != "rows":
        raise UserError("MODEL.EVENTFUL.RENEW_EVERY belongs to the rule 'rows'")
    if node.BUDGET is not None and node.THRESHOLD is not None:
        raise UserError("give MODEL.EVENTFUL.BUDGET or MODEL.EVENTFUL.THRESHOLD, not both")
    selector = None
    if node.THRESHOLD is not None:
        selector = Selector(LargestError(float(node.THRESHOLD), node.AGE_POWER), float(node.CAP))
    return {
        "rule": Rows(renew_every=node.RENEW_EVERY) if node.RENEW_EVERY else node.RULE,
        "budget": node.BUDGET if selector is None else selector,
        "incremental_heads": node.INCREMENTAL_HEADS,
        "scene_cuts": node.SCENE_CUTS,
        "max_streams": node.MAX_STREAMS,
        "max_gap": node.MAX_GAP,
        "short_side": cfg.INPUT.MIN_SIZE_TEST,
        "long_side": cfg.INPUT.MAX_SIZE_TEST,
    }


@BACKBONE_REGISTRY.register()
def build_eventful_vitdet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """ViTDet's backbone from MODEL.VITDET; a plain detectron2 model."""
    node = cfg.MODEL.VITDET
    net = ViT(
        img_size=node.IMAGE_SIZE,
        in_chans=input_shape.channels,
        embed_dim=node.EMBED_DIM,
        depth=node.DEPTH,
        num_heads=node.NUM_HEADS,
        drop_path_rate=node.DROP_PATH,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=node.WINDOW_SIZE,
        window_block_indexes=[i for i in range(node.DEPTH) if i not in node.GLOBAL_BLOCKS],
        pretrain_img_size=node.PRETRAIN_IMAGE_SIZE,
    )
    return SimpleFeaturePyramid(
        net,
        in_feature="last_feat",
        out_channels=node.OUT_CHANNELS,
        scale_factors=(4.0, 2.0, 1.0, 0.5),
        top_block=LastLevelMaxPool(),
        norm="LN",
        square_pad=node.SQUARE_PAD,
    )
