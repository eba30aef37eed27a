"""The LazyConfigs build their models, and detectron2's own tool trains and evaluates with them."""

from __future__ import annotations

import json
import operator
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
pytest.importorskip("detectron2.config", reason="needs detectron2, which is not installed", exc_type=ImportError)

import detectron2  # noqa: E402
from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.config import LazyConfig, get_cfg, instantiate  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from running import make_tree, run  # noqa: E402
from vid_tree import make_set  # noqa: E402
from zoo_models import randomise  # noqa: E402

from eventful_det.detectors.checkpoints.files import load_detector  # noqa: E402
from eventful_det.detectors.checkpoints.saving import save_detectron2  # noqa: E402
from eventful_det.gating.rows import Rows  # noqa: E402
from eventful_det.gating.selector import Latency  # noqa: E402
from eventful_det.integrations.detectron2 import EventfulRCNN, VIDMapper, add_eventful_config  # noqa: E402

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
    assert isinstance(model, EventfulRCNN) and model.budget.budget == 0.5
    assert model.roi_heads.num_classes == 30 and not model.roi_heads.mask_on
    model = instantiate(tiny("vitdet_b_vid_eventful.py", "model.rule.renew_every=9", "model.budget=50ms").model)
    assert model.rule == Rows(renew_every=9) and model.budget.budget == Latency(0.05)


def test_the_yacs_config_is_the_same_detector() -> None:
    cfg = get_cfg()
    add_eventful_config(cfg)
    cfg.merge_from_file(str(CONFIGS / "vitdet_b_vid_eventful.yaml"))
    sizes = {"EMBED_DIM": 48, "DEPTH": 4, "NUM_HEADS": 3, "WINDOW_SIZE": 4, "GLOBAL_BLOCKS": (1, 3), "OUT_CHANNELS": 16}
    cfg.merge_from_list([item for key, value in sizes.items() for item in (f"MODEL.VITDET.{key}", value)])
    cfg.merge_from_list(["MODEL.ROI_BOX_HEAD.NUM_CONV", 1, "MODEL.ROI_BOX_HEAD.CONV_DIM", 16])
    cfg.merge_from_list(["MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.DEVICE", "cpu"])
    yacs = randomise(build_model(cfg)).eval()
    lazy = instantiate(tiny("vitdet_b_vid_eventful.py").model).eval()
    lazy.load_state_dict(yacs.state_dict())
    mapper = VIDMapper(cfg, False)
    rng = np.random.default_rng(0)
    for i in range(3):
        frame = {"file_name": "", "frame": rng.integers(0, 255, (360, 640, 3), np.uint8), "video_id": 1, "frame_id": i}
        with torch.no_grad():
            ours, theirs = (model([mapper(frame)])[0] for model in (yacs, lazy))
        assert len(ours["instances"]) > 5 and ours["cost"] == theirs["cost"]
        assert torch.equal(ours["instances"].pred_boxes.tensor, theirs["instances"].pred_boxes.tensor)
    weights = [model.roi_heads.box_predictor.loss_weight["loss_box_reg"] for model in (yacs, lazy)]
    assert weights == [2.0, 2.0]


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
        assert "AP,AP50,AP75,AP50_vid,AP50_slow,AP50_medium,AP50_fast,AP_ilsvrc,GMACs,GMACs_dense" in output
    assert metrics[-1]["video/GMACs"] < metrics[-1]["video/GMACs_dense"]
    scores = [output.rpartition("copypaste: ")[2].split("\n")[0] for output in (trained, evaluated)]
    assert scores[0] == scores[1], "the checkpoint holds all there is"


LAZY = """
from detectron2.config import LazyCall as L
from eventful_det.integrations.detectron2 import (
    EventfulRCNN, VIDEvaluator, VIDMapper, build_vid_test_loader, register_imagenet_vid
)
from eventful_det.detectors.checkpoints.files import load_detector
from zoo_models import zoo_config

sizes = load_detector("vitdet_tiny_synthetic").config
register_imagenet_vid({tree!r})
model = zoo_config(sizes)
model.update(_target_=EventfulRCNN, budget=0.25)
sides = dict(short_side=sizes.short_side, long_side=sizes.long_side)
test = L(build_vid_test_loader)(names="imagenet_vid_val", mapper=L(VIDMapper)(**sides), streams=2, num_workers=0)
dataloader = dict(test=test, evaluator=L(VIDEvaluator)(dataset_name="imagenet_vid_val", output_dir={output!r}))
train = dict(device="cpu", init_checkpoint={weights!r}, output_dir={output!r})
"""


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set of two videos with scene cuts, and a LazyConfig of the shipped weights for them."""
    folder = tmp_path_factory.mktemp("shipped")
    sizes = ["--width", "192", "--height", "128", "--val-videos", "2", "--val-frames", "12", "--cut-fraction", "1"]
    tree = make_tree(folder / "tree", *sizes, "--train-videos", "1", "--train-frames", "1")
    weights = folder / "weights.pth"
    save_detectron2(load_detector("vitdet_tiny_synthetic"), weights)
    files = {"tree": str(tree), "weights": str(weights), "output": str(folder / "theirs")}
    (folder / "config.py").write_text(LAZY.format(**files))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not TOOL.is_file(), reason="needs detectron2's source: set DETECTRON2_SOURCE to its checkout")
def test_stock_evaluation_equals_ours(shipped: Path) -> None:
    """Scene cuts, the tokens that are recomputed, all detections, and so the scores."""
    options = ["gate.policy.cap=0.25", "device=cpu", f"output={shipped / 'ours'}"]
    run("tools/eval_net.py", f"data.root={shipped / 'tree'}", "weights=vitdet_tiny_synthetic", *options)
    printed = stock_tool(shipped, "--eval-only", config=shipped / "config.py").split("copypaste: ")[2:4]
    scores = dict(zip(*(line.splitlines()[0].split(",") for line in printed), strict=True))
    (row,) = json.loads((shipped / "ours" / "results.json").read_text())["rows"]
    ours, theirs = (json.loads((shipped / x / "coco_results.json").read_text()) for x in ("ours", "theirs"))
    key = operator.itemgetter("image_id", "score", "category_id")
    assert len(ours) == len(theirs) > 20 and row["flushes"] > 2
    for name, value in (("AP", row["ap"]), ("AP50", row["ap50"]), ("recomputed", row["recomputed"])):
        assert float(scores[name]) == pytest.approx(100 * value, abs=1e-3)
    assert float(scores["GMACs_backbone"]) == pytest.approx(row["gmacs_backbone"], abs=1e-4)
    for own, other in zip(sorted(ours, key=key), sorted(theirs, key=key), strict=True):
        assert own["image_id"] == other["image_id"] and own["category_id"] == other["category_id"]
        assert own["score"] == pytest.approx(other["score"], abs=1e-3)
        assert own["bbox"] == pytest.approx(other["bbox"], abs=0.02)


@pytest.mark.slow
@pytest.mark.skipif(not TOOL.is_file(), reason="needs detectron2's source: set DETECTRON2_SOURCE to its checkout")
def test_analyze_model_counts(shipped: Path) -> None:
    tasks = ["--tasks", "flop", "activation", "parameter", "structure", "-n", "2", "dataloader.test.streams=1"]
    printed = stock_tool(shipped, *tasks, config=shipped / "config.py", tool="analyze_model.py")
    assert "Total GFlops:" in printed and "Parameter Count" in printed


def stock_tool(
    data: Path, *options: str, config: Path = CONFIGS / "vitdet_b_vid_eventful.py", tool: str = TOOL.name
) -> str:
    """Run a tool of detectron2 as it is; returns what it printed."""
    command = [sys.executable, str(TOOL.with_name(tool)), "--config-file", str(config), *options]
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent), *sys.path])  # detectron2 may lie anywhere
    environment = {**os.environ, "DETECTRON2_DATASETS": str(data), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=data, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr
