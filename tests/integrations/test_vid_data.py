"""ImageNet VID in detectron2's catalogs, loaders and evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from vid_tree import make_set

from eventful_det.data.coco_video import load_coco_video
from eventful_det.data.video.writer import VideoWriter
from eventful_det.detectors.results import FrameCost
from eventful_det.errors import UserError
from eventful_det.evaluation.detection import evaluate
from eventful_det.evaluation.ilsvrc import vid_scores

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
pytest.importorskip("detectron2.data", reason="needs detectron2, which is not installed", exc_type=ImportError)

from detectron2.config import get_cfg  # noqa: E402
from detectron2.data import (  # noqa: E402
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T  # noqa: E402
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from detectron2.utils import comm  # noqa: E402

from eventful_det.integrations.detectron2 import (  # noqa: E402
    VideoSampler,
    VIDEvaluator,
    VIDMapper,
    build_vid_test_loader,
    register_coco_video,
    register_imagenet_vid,
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three validation videos of four frames, two training stills; ten classes, two objects a frame."""
    root = tmp_path_factory.mktemp("vid") / "ILSVRC2015"
    make_set(root, "imagenet_vid_val", videos=3, frames=4)
    make_set(root, "imagenet_vid_train", videos=2, frames=1)
    return root


def test_registered_dicts_hold_what_the_file_holds(tree: Path) -> None:
    register_imagenet_vid(tree.parent)
    dicts = DatasetCatalog.get("imagenet_vid_val")
    data = load_coco_video(tree / "annotations/imagenet_vid_val.json")
    assert [x["image_id"] for x in dicts] == [frame.image_id for frame in data.frames]
    assert [x["frame_id"] for x in dicts] == 3 * [0, 1, 2, 3]
    assert [x["is_last_frame"] for x in dicts] == 3 * [False, False, False, True]
    assert all(Path(x["file_name"]).is_file() for x in dicts)
    names = MetadataCatalog.get("imagenet_vid_val").thing_classes
    assert names == [name for _, name in data.categories]
    boxes = [(names[a["category_id"]], tuple(a["bbox"])) for x in dicts for a in x["annotations"]]
    of = dict(data.categories)
    assert boxes == [(of[a.category_id], a.box) for frame in data.frames for a in frame.annotations] != []
    assert len(get_detection_dataset_dicts("imagenet_vid_train")) == 2


def test_registering_again_replaces_ours_and_missing_files_are_told(tree: Path, tmp_path: Path) -> None:
    register_imagenet_vid(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no ILSVRC tree"):
        DatasetCatalog.get("imagenet_vid_val")
    register_imagenet_vid(tree)
    assert len(DatasetCatalog.get("imagenet_vid_val")) == 12
    with pytest.raises(UserError, match="datasets/README.md"):
        DatasetCatalog.get("imagenet_det_train")
    register_coco_video("own", tree / "annotations/imagenet_vid_train.json")
    assert len(DatasetCatalog.get("own")) == 2


def test_a_users_own_registration_is_never_replaced(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DatasetCatalog, "data", {})
    monkeypatch.setattr(MetadataCatalog, "data", {})
    own = [{"file_name": "mine.png", "image_id": 1}]
    DatasetCatalog.register("imagenet_vid_val", lambda: own)
    MetadataCatalog.get("imagenet_vid_val").set(thing_classes=["mine"])
    register_imagenet_vid(tree)
    assert DatasetCatalog.get("imagenet_vid_val") == own
    assert MetadataCatalog.get("imagenet_vid_val").thing_classes == ["mine"]
    assert len(DatasetCatalog.get("imagenet_vid_train")) == 2, "the other names are registered"
    with pytest.raises(UserError, match="'imagenet_vid_val' of your own is registered already, and stays"):
        register_coco_video("imagenet_vid_val", tree / "annotations/imagenet_vid_train.json")
    DatasetCatalog.remove("imagenet_vid_train")
    DatasetCatalog.register("imagenet_vid_train", lambda: own)  # in place of ours
    register_imagenet_vid(tree)
    assert DatasetCatalog.get("imagenet_vid_train") == own
    with pytest.raises(UserError, match="'imagenet_vid_val' was not registered by register_coco_video"):
        VIDEvaluator("imagenet_vid_val")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO-video file with a video of ten frames, of which every second is listed, and one of two pictures."""
    root = tmp_path_factory.mktemp("film")
    rng = np.random.default_rng(0)
    with VideoWriter(root / "a.mp4") as writer:
        for i in range(10):
            writer.write(np.full((48, 64, 3), 25 * i, np.uint8), i / 25)
    for i in range(2):
        cv2.imwrite(str(root / f"{i}.png"), rng.integers(0, 255, (48, 64, 3), np.uint8))
    size = {"width": 64, "height": 48}
    images = [{"id": i, "video_id": 1, "frame_id": i, **size} for i in range(0, 10, 2)]
    images += [{"id": 20 + i, "video_id": 2, "frame_id": i, "file_name": f"{i}.png", **size} for i in range(2)]
    videos = [{"id": 1, "name": "a", "file_name": "a.mp4"}, {"id": 2, "name": "b"}]
    boxes = [{"id": 1, "image_id": 2, "category_id": 1, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}]
    data = {"categories": [{"id": 1, "name": "thing"}], "videos": videos, "images": images, "annotations": boxes}
    (root / "film.json").write_text(json.dumps(data))
    return root / "film.json"


@pytest.mark.parametrize("workers", [0, 2])
def test_frames_in_video_files_are_read(film: Path, workers: int) -> None:
    register_coco_video("film", film)
    dicts = DatasetCatalog.get("film")
    loader = build_vid_test_loader("film", VIDMapper(short_side=48, long_side=64), num_workers=workers)
    frames = [frame for batch in loader for frame in batch]
    assert [(x["image_id"], x["frame_id"]) for x in frames] == [
        (0, 0),
        (2, 1),
        (4, 2),
        (6, 3),
        (8, 4),
        (20, 0),
        (21, 1),
    ]
    levels = [float(x["image"].float().mean()) for x in frames[:5]]
    assert levels == pytest.approx([25 * i for i in range(0, 10, 2)], abs=3), "the listed frames, not the first ones"
    mapper = VIDMapper(is_train=True, augmentations=[])
    for i in (3, 1, 4, 1):  # in any order, as training asks
        assert float(mapper(dicts[i])["image"].float().mean()) == pytest.approx(50 * i, abs=3)
    assert mapper(dicts[1])["instances"].gt_boxes.tensor.tolist() == [[5, 5, 25, 25]]


def test_frames_that_cannot_be_read_are_left_out(film: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    data = json.loads(film.read_text())
    data["info"] = {"image_root": str(film.parent)}
    data["images"][-1]["file_name"] = "lost.png"
    data["images"][-2]["width"] = 63
    data["images"][4]["frame_id"] = 30
    (tmp_path / "damaged.json").write_text(json.dumps(data))
    register_coco_video("damaged", tmp_path / "damaged.json")
    loader = build_vid_test_loader("damaged", VIDMapper(short_side=48, long_side=64), streams=2, num_workers=0)
    evaluator = VIDEvaluator("damaged")
    for batch in loader:
        evaluator.process(batch, [{"instances": empty(entry)} for entry in batch])
    assert set(evaluator._frames) == {0, 2, 4, 6}
    for reason in ("lost.png: No such file", "0.png is 64x48, but the data set says 63x48", "has only 10 frames"):
        assert f"{reason}" in caplog.text
    assert evaluator.evaluate()["video"]["AP50"] == 0
    assert "damaged: 3 frames were not processed; they are in no number" in caplog.text
    assert VIDMapper(is_train=True)(DatasetCatalog.get("damaged")[-1]) is None, "detectron2 then takes another sample"


def empty(entry: dict[str, Any]) -> Instances:
    return Instances(
        (entry["height"], entry["width"]),
        pred_boxes=Boxes(torch.zeros(0, 4)),
        scores=torch.zeros(0),
        pred_classes=torch.zeros(0, dtype=torch.long),
    )


def test_the_mapper_reads_yacs_configs_as_detectron2s(tree: Path) -> None:
    register_imagenet_vid(tree)
    entry = DatasetCatalog.get("imagenet_vid_val")[1]
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 48, 100
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (72,), "none"
    expected = VIDMapper(short_side=48, long_side=100)(entry)
    for mapper in (VIDMapper(cfg, False), VIDMapper(cfg, is_train=False)):
        found = mapper(entry)
        assert torch.equal(found["image"], expected["image"].flip(0)), "INPUT.FORMAT is BGR"
        assert "annotations" not in found and found["frame_id"] == 1
    cfg.INPUT.FORMAT = "RGB"
    ours, theirs = VIDMapper(cfg, True)(entry), DatasetMapper(cfg, True)(entry)
    assert ours["image"].shape == theirs["image"].shape == (3, 72, 96)
    assert torch.equal(ours["instances"].gt_boxes.tensor, theirs["instances"].gt_boxes.tensor)
    assert float((ours["image"].float() - theirs["image"].float()).abs().max()) <= 1  # decoders round differently


def test_batches_hold_the_next_frame_of_each_video(tree: Path) -> None:
    register_imagenet_vid(tree)
    loader = build_vid_test_loader(
        "imagenet_vid_val", VIDMapper(short_side=48, long_side=100), streams=2, num_workers=0
    )
    batches = [[(x["video_id"], x["frame_id"]) for x in batch] for batch in loader]
    a, b, c = dict.fromkeys(x["video_id"] for x in DatasetCatalog.get("imagenet_vid_val"))
    assert batches[:4] == [[(a, i), (b, i)] for i in range(4)]
    assert [x for batch in batches[4:] for x in batch] == [(c, i) for i in range(4)] and len(batches) == len(loader)
    frame = next(iter(loader))[0]
    assert frame["image"].shape == (3, 48, 64) and (frame["height"], frame["width"]) == (96, 128)


def test_frames_are_resized_as_by_our_tools(tree: Path) -> None:
    from eventful_det.data.video.pictures import read_image
    from eventful_det.data.video.transforms import resize

    register_imagenet_vid(tree)
    entry = DatasetCatalog.get("imagenet_vid_val")[5]
    image = VIDMapper(short_side=60, long_side=1000)(entry)["image"]
    assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(resize(read_image(entry["file_name"]), 60, 80)))
    sample = VIDMapper(is_train=True, augmentations=[T.RandomFlip(1.0)])(entry)
    assert torch.allclose(
        sample["instances"].gt_boxes.tensor[0, 2], torch.tensor(128 - entry["annotations"][0]["bbox"][0])
    )
    with pytest.raises(UserError, match="lacks video_id and frame_id; register"):
        VIDMapper()({"file_name": entry["file_name"]})


def test_processes_take_whole_videos_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = {"a": 9, "b": 2, "c": 5, "d": 4, "e": 1}
    dataset = [{"video_id": video} for video, length in lengths.items() for _ in range(length)]
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        sampler = VideoSampler(dataset)
        parts.append([dataset[i]["video_id"] for i in sampler])
        assert len(sampler) == len(parts[-1])
    assert ["".join(part) for part in parts] == ["aaaaaaaaabb", "cccccdddde"]


@pytest.mark.parametrize("streams", [1, 2, 3, 9])
def test_videos_take_turns_without_losing_frames(streams: int) -> None:
    lengths = {"a": 3, "b": 1, "c": 4, "d": 2}
    dataset = [{"video_id": video, "frame_id": i} for video, length in lengths.items() for i in range(length)]
    order = [dataset[i] for i in VideoSampler(dataset, streams)]
    assert sorted(order, key=dataset.index) == dataset
    for video, length in lengths.items():
        assert [x["frame_id"] for x in order if x["video_id"] == video] == list(range(length))
    assert len({x["video_id"] for x in order[:streams]}) == min(streams, 4)
    with pytest.raises(UserError, match="streams must be at least 1"):
        VideoSampler(dataset, 0)


def outputs(dicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The labels as detections, some shifted, some of the wrong class, and a false one on each frame."""
    found = []
    for n, entry in enumerate(dicts):
        instances = Instances((entry["height"], entry["width"]))
        rows = [(a["bbox"], a["category_id"]) for a in entry["annotations"]] + [([1.0, 1.0, 30.0, 30.0], 0)]
        boxes = torch.tensor([box for box, _ in rows]) + (n % 3) * 2.0
        instances.pred_boxes = Boxes(boxes)
        instances.scores = torch.linspace(0.9, 0.3, len(rows))
        instances.pred_classes = torch.tensor([(label + (n % 5 == 0)) % 10 for _, label in rows])
        cost = FrameCost({"backbone": 10**9 * n}, {"backbone": 12 * 10**9}, n, 48, n == 0)
        found.append({"instances": instances, "cost": cost})
    return found


def test_evaluator_gives_our_metrics(tree: Path, tmp_path: Path) -> None:
    register_imagenet_vid(tree)
    dicts = DatasetCatalog.get("imagenet_vid_val")
    evaluator = VIDEvaluator("imagenet_vid_val", str(tmp_path))
    evaluator.process([{"image_id": -5}], outputs(dicts[:1]))
    evaluator.reset()
    for i in range(0, 12, 5):
        evaluator.process(dicts[i : i + 5], outputs(dicts)[i : i + 5])
    scores = evaluator.evaluate()["video"]
    written = json.loads((tmp_path / "coco_results.json").read_text())
    data = load_coco_video(tree / "annotations/imagenet_vid_val.json")
    ours, vid = evaluate(data, written), vid_scores(data, written)
    expected = {"AP": ours.ap, "AP50": ours.ap50, "AP75": ours.ap75, "AP50_vid": vid.ap50_vid}
    expected |= {"AP50_slow": vid.ap50_slow, "AP50_medium": vid.ap50_medium, "AP50_fast": vid.ap50_fast}
    expected |= {"AP_ilsvrc": vid.ap_ilsvrc} | {f"AP50-{name}": ap for name, ap in ours.ap50_by_class.items()}
    for name, value in expected.items():
        assert scores[name] == pytest.approx(100 * value, nan_ok=True)
    assert 5 < scores["AP50"] < 95
    assert scores["GMACs_backbone"] == pytest.approx(5.5) and scores["GMACs_backbone_dense"] == pytest.approx(12)
    assert scores["recomputed"] == pytest.approx(100 * 5.5 / 48)


def test_evaluator_stands_beside_detectron2s(tree: Path, tmp_path: Path) -> None:
    register_imagenet_vid(tree)
    dicts = DatasetCatalog.get("imagenet_vid_val")
    both = DatasetEvaluators(
        [COCOEvaluator("imagenet_vid_val", ("bbox",), False, str(tmp_path)), VIDEvaluator("imagenet_vid_val")]
    )
    both.reset()
    both.process(dicts, outputs(dicts))
    scores = both.evaluate()
    assert scores["video"]["AP50"] == pytest.approx(scores["bbox"]["AP50"], abs=1e-6)
    assert 5 < scores["bbox"]["AP50"] < 95


@pytest.mark.parametrize(
    ("label", "count", "told"),
    [(10, None, "at least 11"), (0, 80, "80"), (0, 3, "3"), (9, 12, "12")],
    ids=["a label too many", "more", "fewer", "more, label known"],
)
def test_evaluator_names_both_counts_of_classes(tree: Path, label: int, count: int | None, told: str) -> None:
    register_imagenet_vid(tree)
    dicts = DatasetCatalog.get("imagenet_vid_val")[:1]
    found = outputs(dicts)
    found[0]["instances"].pred_classes[:] = label
    if count is not None:
        found[0]["num_classes"] = count
    with pytest.raises(UserError, match=f"detects {told} classes, but the data set 'imagenet_vid_val' has 10; set"):
        VIDEvaluator("imagenet_vid_val").process(dicts, found)


def test_evaluator_gathers_from_all_processes(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_imagenet_vid(tree)
    dicts = DatasetCatalog.get("imagenet_vid_val")
    whole = VIDEvaluator("imagenet_vid_val")
    found = outputs(dicts)
    whole.process(dicts, found)
    expected = whole.evaluate()["video"]
    first, second = VIDEvaluator("imagenet_vid_val"), VIDEvaluator("imagenet_vid_val")
    first.process(dicts[:4], found[:4])
    second.process(dicts[4:], found[4:])
    other = iter([second._results, second._frames, second._costs])
    monkeypatch.setattr(comm, "gather", lambda rows, dst: [rows, next(other)])
    assert first.evaluate()["video"] == pytest.approx(expected, nan_ok=True)
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    monkeypatch.setattr(comm, "gather", lambda rows, dst: [])
    assert second.evaluate() == {}


SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
from detectron2.evaluation import inference_on_dataset
from eventful_det.integrations.detectron2 import EventfulRCNN, VIDEvaluator, VIDMapper
from eventful_det.integrations.detectron2 import build_vid_test_loader, register_imagenet_vid
from eventful_det.detectors.vitdet.config import vitdet_tiny
from zoo_models import zoo_model

if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo")
names = tuple(str(i) for i in range(10))
sizes = {"dim": 48, "depth": 4, "global_blocks": (1, 3), "channels": 16, "box_fc": (32,), "proposals": 20}
model = zoo_model(vitdet_tiny(names, **sizes), EventfulRCNN, {"budget": 0.3})
register_imagenet_vid(sys.argv[1])
if dist.is_initialized():
    model = torch.nn.parallel.DistributedDataParallel(model)  # as detectron2's tools wrap it
loader = build_vid_test_loader("imagenet_vid_val", VIDMapper(short_side=96, long_side=128), num_workers=0)
scores = inference_on_dataset(model, loader, VIDEvaluator("imagenet_vid_val"))
print(json.dumps({"frames": len(loader.sampler), "scores": scores}), flush=True)
if dist.is_initialized():
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("videos", [3, 1])
def test_two_processes_give_the_scores_of_one(videos: int, tmp_path: Path) -> None:
    """Also where one has no video; DDP's exchange of buffers would wait for it for ever."""
    tree = tmp_path / "ILSVRC2015"
    make_set(tree, "imagenet_vid_val", videos, frames=4)
    (tmp_path / "evaluate.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "tests" / "integrations"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    parts = []
    for command in ([], launcher):
        command = [sys.executable, *command, str(tmp_path / "evaluate.py"), str(tree)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        parts.append([json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"frames"')])
    (one,), both = parts
    assert one["frames"] == 4 * videos
    assert sorted(part["frames"] for part in both) == {3: [4, 8], 1: [0, 4]}[videos]
    (scores,) = (part["scores"] for part in both if part["scores"])
    assert scores["video"] == pytest.approx(one["scores"]["video"], nan_ok=True)
    assert scores["video"]["recomputed"] < 60
