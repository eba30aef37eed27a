"""The LazyConfigs build their models, and detectron2's own tool trains and evaluates with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
pytest.importorskip("detectron2.config", reason="needs detectron2, which is not installed", exc_type=ImportError)

import detectron2  # noqa: E402
from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.config import LazyConfig, instantiate  # noqa: E402
from eventful_det.gating.selector import Focus, Selector  # noqa: E402
from vid_tree import make_set  # noqa: E402

from eventful_det.gating.rows import Rows  # noqa: E402
from eventful_det.integrations.detectron2 import EventfulRCNN  # noqa: E402

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "detectron2"
SOURCE = Path(os.environ.get("DETECTRON2_SOURCE", Path(detectron2.__file__).parents[1]))
TOOL = SOURCE / "tools" / "lazyconfig_train_net.py"

TINY = [
    "model.backbone.net.embed_dim=48",
    "model.backbone.net.depth=4",
    "model.backbone.net.num_heads=3",
    "model.backbone.net.window_size=4",
    "model.backbone.net.window_block_indexes=[0,2]",
    "model.backbone.out_channels=16",
    "model.proposal_generator.head.in_channels=16",
    "model.roi_heads.box_head.input_shape.channels=16",
    "model.roi_heads.box_head.conv_dims=[16]",
    "model.roi_heads.box_head.fc_dims=[32]",
    "model.roi_heads.box_predictor.input_shape.channels=32",
]


def tiny(name: str, *more: str) -> Any:
    return LazyConfig.apply_overrides(LazyConfig.load(str(CONFIGS / name)), [*TINY, *more])


def test_imagenet_vid_model() -> None:
    model = instantiate(tiny("vitdet_b_vid_eventful.py", "model.budget=0.5").model)
    assert isinstance(model, EventfulRCNN) and model.budget.fraction == 0.5
    assert model.roi_heads.num_classes == 30 and not model.roi_heads.mask_on
    model = instantiate(tiny("vitdet_b_vid_eventful.py", "model.rule.policy.threshold=3").model)
    assert model.backbone.net.rule == Rows(Focus(3, cap=0.35, floor=0.25))


def test_coco_model_differs_from_the_zoos_in_its_backbone_alone(tmp_path: Path) -> None:
    cfg = tiny("mask_rcnn_vitdet_b_eventful.py", "model.roi_heads.mask_head.input_shape.channels=16")
    model = instantiate(cfg.model).eval()
    stock = {key: value for key, value in cfg.model.items() if hasattr(value, "_target_") and key != "rule"}
    parts = {key: instantiate(value) for key, value in stock.items()}
    zoo = detectron2.modeling.GeneralizedRCNN(
        **parts, pixel_mean=cfg.model.pixel_mean, pixel_std=cfg.model.pixel_std, input_format="RGB"
    ).eval()
    DetectionCheckpointer(zoo, str(tmp_path)).save("zoo")
    DetectionCheckpointer(model).load(str(tmp_path / "zoo.pth"))
    assert all(torch.equal(value, zoo.state_dict()[key]) for key, value in model.state_dict().items())
    assert model.backbone.padding_constraints["square_size"] == 1024 and model.roi_heads.mask_on


@pytest.mark.slow
@pytest.mark.skipif(not TOOL.is_file(), reason="needs detectron2's source: set DETECTRON2_SOURCE to its checkout")
def test_detectron2s_tool_trains_and_evaluates(tmp_path: Path) -> None:
    make_set(tmp_path / "ILSVRC2015", "imagenet_vid_val", videos=2, frames=3)
    make_set(tmp_path / "ILSVRC2015", "imagenet_vid_train", videos=2, frames=1)
    options = [
        *TINY,
        "model.roi_heads.num_classes=10",
        "train.device=cpu",
        "train.amp.enabled=False",
        f"train.output_dir={tmp_path / 'out'}",
        "dataloader.train.dataset.names=imagenet_vid_train",
        "dataloader.train.mapper.augmentations=[]",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.num_workers=0",
        "dataloader.test.num_workers=0",
        "dataloader.test.mapper.short_side=96",
        "dataloader.test.streams=2",
    ]
    trained = stock_tool(tmp_path, *options, "train.init_checkpoint=''", "train.max_iter=2", "train.eval_period=2")
    assert "total_loss" in trained
    weights = tmp_path / "out" / "model_final.pth"
    assert "backbone.net.blocks.0.attn.qkv.weight" in torch.load(weights, weights_only=True)["model"]
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.json").read_text().splitlines()]
    evaluated = stock_tool(tmp_path, "--eval-only", *options, f"train.init_checkpoint={weights}")
    for output in (trained, evaluated):
        assert "AP,AP50,AP75,AP50_vid,AP50_slow,AP50_medium,AP50_fast,AP_ilsvrc,GMACs_backbone" in output
    assert metrics[-1]["bbox/GMACs_backbone"] < metrics[-1]["bbox/GMACs_backbone_dense"]
    scores = [output.rpartition("copypaste: ")[2].split("\n")[0] for output in (trained, evaluated)]
    assert scores[0] == scores[1], "the checkpoint holds all there is"


def stock_tool(data: Path, *options: str) -> str:
    """Run detectron2's tool as it is; returns what it printed."""
    command = [sys.executable, str(TOOL), "--config-file", str(CONFIGS / "vitdet_b_vid_eventful.py"), *options]
    paths = os.pathsep.join([str(ROOT), *sys.path])  # detectron2 may lie anywhere
    environment = {**os.environ, "DETECTRON2_DATASETS": str(data), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=data, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr
