"""Streaming in detectron2: a loader over sources, a predictor, weights that run nothing."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eventful_det.data.video.writer import VideoWriter
from eventful_det.detectors.vitdet.config import vitdet_tiny
from eventful_det.errors import UserError
from eventful_det.gating.selector import Gmacs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
pytest.importorskip("detectron2.modeling", reason="needs detectron2, which is not installed", exc_type=ImportError)

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from zoo_models import zoo_model  # noqa: E402

from eventful_det.integrations.detectron2 import (  # noqa: E402
    EventfulRCNN,
    SourceLoader,
    VideoPredictor,
    VIDMapper,
    load_weights,
)

SMALL = vitdet_tiny(
    ("a", "b", "c"), dim=48, depth=4, global_blocks=(1, 3), channels=16, box_convs=2, box_fc=(32,), proposals=30
)


def model(**options: Any) -> EventfulRCNN:
    return zoo_model(SMALL, EventfulRCNN, {"short_side": 96, "long_side": 160, **options})


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six frames in which a square moves, 320x192."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    still = np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with VideoWriter(path) as writer:
        for i in range(6):
            image = still.copy()
            image[40:80, 16 * i : 16 * i + 40] = 255
            writer.write(image, i / 25)
    return path


def test_a_video_file_is_detected_in(clip: Path) -> None:
    predictor = VideoPredictor(model(), budget=0.25)
    outputs = list(predictor(str(clip)))
    assert [x["cost"].flush for x in outputs] == [True] + 5 * [False]
    assert all(0 < x["cost"].total < x["cost"].dense_total for x in outputs[1:])
    assert all(x["frame"].shape == (192, 320, 3) and x["instances"].image_size == (192, 320) for x in outputs)
    assert [x["timestamp"] for x in outputs] == pytest.approx([i / 25 for i in range(6)])
    assert len(predictor.model.states) == 0, "a video that ended is forgotten"
    assert len(list(predictor(str(clip), max_frames=2))) == 2
    both = list(zip(predictor(str(clip)), predictor(str(clip)), strict=True))
    for pair in both:  # side by side, neither disturbs the other
        assert [x["cost"].flush for x in pair] == 2 * [pair is both[0]]


def test_a_budget_in_gmacs_holds_for_the_whole_detector(clip: Path) -> None:
    predictor = VideoPredictor(model())
    dense = next(predictor(str(clip)))["cost"].dense_total
    predictor.model.budget = Gmacs(0.7 * dense / 1e9)
    assert all(x["cost"].total <= 0.7 * dense for x in list(predictor(str(clip)))[1:])


def test_sources_take_turns_until_they_end(clip: Path) -> None:
    images = [np.full((96, 160, 3), i, np.uint8) for i in range(2)]
    loader = SourceLoader([str(clip), images], VIDMapper(short_side=96, long_side=160))
    batches = list(loader)
    assert [[x["frame_id"] for x in batch] for batch in batches] == [[0, 0], [1, 1], [2], [3], [4], [5]]
    first, second = (entry["video_id"] for entry in batches[0])
    assert {batch[0]["video_id"] for batch in batches} == {first} and second != first
    assert next(iter(loader))[0]["video_id"] not in (first, second), "each iteration is another video"
    eventful = model(budget=0.2)
    with torch.no_grad():
        outputs = [eventful(batch) for batch in batches]
    assert [[x["cost"].flush for x in batch] for batch in outputs] == [[True, True]] + [
        [False] * n for n in (2, 1, 1, 1, 1)
    ]


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_weights_are_loaded_without_running_anything(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = model()
    trained.backbone.net.pos_embed.data += 1
    if suffix == ".pth":
        DetectionCheckpointer(trained, str(tmp_path)).save("model")
    else:
        arrays = {key: value.numpy() for key, value in trained.state_dict().items()}
        (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "zoo"}))
    fresh = model()
    load_weights(fresh, f"model{suffix}")
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in trained.state_dict().items())
    (tmp_path / f"bomb{suffix}").write_bytes(pickle.dumps({"model": Bomb()}))
    with pytest.raises(UserError):
        load_weights(fresh, f"bomb{suffix}")
    assert not Path("exploded").exists()
    with pytest.raises(UserError, match="does not fit the model"):
        load_weights(zoo_model(SMALL, masks=True), f"model{suffix}")
