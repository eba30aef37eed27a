"""RF-DETR of both packages: equal to their own predictions, counted, streamed and pooled through the protocol."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eventful_det import StreamPool, load_detector
from eventful_det.detectors.rf_detr.model import EventfulRFDETR, RFDETRStream
from eventful_det.detectors.rf_detr.sizes import NAMES, SIZES, Name, random_model, random_rfdetr
from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.rows import Rows
from eventful_det.gating.selector import EVERYTHING, Gmacs, TopK
from eventful_det.gating.state import State

PACKAGES = ("transformers", "rfdetr")


def small(package: str) -> Any:
    """A small random network; the test is skipped where its package is missing."""
    pytest.importorskip(package)
    torch.manual_seed(0)
    if package == "transformers":
        return judging(narrow("rf-detr-nano", num_hidden_layers=4, patch_size=8, image_size=64, out_indices=[2, 4]))
    return judging(random_rfdetr("rf-detr-nano"))


def narrow(name: Name, **backbone: Any) -> Any:
    """A network of a size of `transformers`, but for its widths, and for what is given."""
    return random_model(
        name,
        backbone={"hidden_size": 24, "num_attention_heads": 2, **backbone},
        config={
            "d_model": 32,
            "decoder_ffn_dim": 48,
            "decoder_self_attention_heads": 2,
            "decoder_cross_attention_heads": 4,
            "num_queries": 20,
        },
    )


def judging(model: Any) -> Any:
    """The model with heads that tell boxes and scores apart."""
    network: nn.Module = model if isinstance(model, nn.Module) else model.model.model.eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(False)
        if "bbox_embed" in name or "class_embed" in name:
            parameter.normal_(std=0.1, generator=generator)  # so that boxes and scores differ
    return model


def images(count: int = 4) -> list[Any]:
    """A picture in which a patch moves over noise."""
    generator = np.random.default_rng(0)
    background = generator.integers(0, 255, (90, 120, 3), dtype=np.uint8)
    clip = []
    for t in range(count):
        image = background.copy()
        image[20:50, 10 + 9 * t : 40 + 9 * t] = 255 - background[20:50, :30]
        clip.append(image)
    return clip


def own(model: Any, image: Any, side: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and labels as the package gives them."""
    if hasattr(model, "predict"):
        found = model.predict(image, threshold=0.0)
        return torch.tensor(found.xyxy), torch.tensor(found.confidence), torch.tensor(found.class_id)
    from transformers import RfDetrImageProcessor

    processor = RfDetrImageProcessor(size={"height": side, "width": side})
    with torch.no_grad():
        outputs = model(**processor(images=image, return_tensors="pt"))
    (found,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[image.shape[:2]])
    return found["boxes"], found["scores"], found["labels"]


@pytest.fixture(params=PACKAGES)
def model(request: pytest.FixtureRequest) -> Any:
    return small(request.param)


def test_the_package_own_predictions(model: Any) -> None:
    same_predictions(model, 2)


@pytest.mark.parametrize("name", NAMES)
def test_every_size_of_transformers(name: Name) -> None:
    """Its grid, regions, output blocks and decoder layers; narrow, for time's sake."""
    pytest.importorskip("transformers")
    side = SIZES[name].side
    detector = same_predictions(judging(narrow(name)), 1, side)
    assert detector.input_transform.short_side == side


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[1:])
def test_every_size_of_the_package_rfdetr(name: Name) -> None:
    """On fewer pixels than its own, for time's sake, but "base", whose position encodings are resized."""
    pytest.importorskip("rfdetr")
    size = SIZES[name]
    model = random_rfdetr(name, {} if size.positions else {"resolution": 4 * size.patch * size.regions})
    same_predictions(judging(model), 1)


def same_predictions(model: Any, frames: int, side: int = 64) -> EventfulRFDETR:
    """Dense, and with everything selected, the detector predicts what its package does."""
    detector = EventfulRFDETR(model, min_score=0)
    transform, state, gated = detector.input_transform, detector.init_state(), detector.init_state()
    for image in images(frames):
        boxes, scores, labels = own(model, image, side)
        frame = transform(image)
        for result in (
            detector.step([frame], state, rule=Dense())[0],
            detector.step([frame], gated, selector=EVERYTHING)[0],
        ):
            found = transform.restore(result.detections, image)
            torch.testing.assert_close(found.scores, scores, atol=1e-4, rtol=0)
            torch.testing.assert_close(found.boxes, boxes.float(), atol=1e-2, rtol=1e-4)
            assert (found.labels == labels).float().mean() > 0.99
    return detector


def test_input_to_the_bit() -> None:
    detector = EventfulRFDETR(small("transformers"))
    from transformers import RfDetrImageProcessor

    (image,) = images(1)
    expected = RfDetrImageProcessor(size={"height": 64, "width": 64})(images=image, return_tensors="pt")
    ours = (detector.input_transform(image) - detector.pixel_mean) / detector.pixel_std
    assert torch.equal(ours, expected["pixel_values"][0])


def test_counts_and_costs_before_the_step(model: Any) -> None:
    detector = EventfulRFDETR(model)
    state, costs = detector.init_state(), detector.cost_model(Rows())
    for t, image in enumerate(images(3)):
        frame = detector.input_transform(image)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            (result,) = detector.step([frame], state, selector=TopK(9))
        gate = frame.numel() if t else 0
        assert counter.get_total_flops() // 2 + gate == result.cost.total
        if t:
            chosen = result.work.flatten().nonzero().squeeze(1)
            assert int(costs.macs((result.work.shape[0], result.work.shape[1]), chosen)[-1]) == result.cost.total
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        (result,) = detector.step([frame], detector.init_state(), rule=Dense())
    assert counter.get_total_flops() // 2 == result.cost.total == result.cost.dense_total


def test_the_projector_follows_the_feature_maps(model: Any) -> None:
    """What is gated in the backbone only: heads equal those computed anew from the same maps."""
    detector = EventfulRFDETR(model, min_score=0)
    state = detector.init_state()
    for image in images():
        (result,) = detector.step([detector.input_transform(image)], state, selector=TopK(9))
    stream = state.streams[0]
    assert stream is not None and stream.projector is not None
    kept = stream.projector.feature.clone()
    from eventful_det.detectors.rf_detr.projector import init_projector, refresh_projector

    backbone = stream.backbone.streams[0]
    tokens = backbone.output.unflatten(0, backbone.grid)  # type: ignore[union-attr]
    fresh = init_projector(detector.parts.projector, tuple(tokens.shape[:2]), tokens)
    refresh_projector(detector.parts.projector, tokens, torch.arange(len(kept)), fresh)
    torch.testing.assert_close(kept, fresh.feature, atol=1e-4, rtol=1e-4)


def test_a_still_frame_and_a_saved_state(tmp_path: Path) -> None:
    detector = EventfulRFDETR(small("transformers"), min_score=0)
    first, second, *_ = (detector.input_transform(image) for image in images())
    state = detector.init_state()
    (before,) = detector.step([first], state)
    (again,) = detector.step([first], state)
    assert torch.equal(before.detections.boxes, again.detections.boxes)
    assert again.cost.total == first.numel() and again.cost.recomputed == 0
    state.save(tmp_path / "state.pt")
    restored: State[RFDETRStream] = State.load(tmp_path / "state.pt")
    ours, theirs = (detector.step([second], one, selector=TopK(9))[0] for one in (state, restored))
    assert torch.equal(ours.detections.scores, theirs.detections.scores)


def test_streams_pools_and_budgets() -> None:
    detector = EventfulRFDETR(small("transformers"))
    results = list(detector.stream(images(), budget=0.25))
    assert [result.frame_index for result in results] == [0, 1, 2, 3]
    assert all(0 < result.cost.recomputed <= 16 for result in results[1:])
    dense = results[0].cost.dense_total
    limited = list(detector.stream(images(), budget=Gmacs(0.6 * dense / 1e9)))
    assert all(result.cost.total < dense for result in limited[1:])
    with StreamPool(detector, budget=0.25) as pool:
        for name in ("a", "b"):
            pool.add(images(), name=name, live=False)
        rounds = list(pool)
    assert len(rounds) == 4 and {result.stream for result in rounds[0]} == {"a", "b"}


def test_names() -> None:
    names = EventfulRFDETR(small("transformers")).names
    assert len(names) == 91 and (names[1], names[18], names[90]) == ("person", "dog", "toothbrush")


def test_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot make torch.nn.modules.linear.Linear an eventful RF-DETR; supported"):
        EventfulRFDETR(nn.Linear(2, 2))
    model = small("transformers")
    detector = EventfulRFDETR(model)
    with pytest.raises(UserError, match="multiple of 16 pixels, got 70"):
        detector.stream(images(), short_side=70)
    with pytest.raises(UserError, match="no weights .*: fetch config.json, .* and model.safetensors"):
        load_detector(tmp_path)
    model.train()
    with pytest.raises(UserError, match=r"call .eval\(\)"):
        detector.step([detector.input_transform(images(1)[0])], detector.init_state())


def test_without_network_one_line_says_what_to_fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("transformers").utils.hub
    monkeypatch.setattr(hub, "is_offline_mode", lambda: True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match="^no weights rf-detr-large: fetch .* huggingface.co/Roboflow/rf-detr-large into"
    ):
        load_detector("rf-detr-large")


def test_what_finds_no_boxes_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = small("transformers").config
    segments = transformers.RfDetrForInstanceSegmentation(config)
    with pytest.raises(UserError, match="segmentation is not supported"):
        EventfulRFDETR(segments)
    segments.save_pretrained(tmp_path / "segments")
    with pytest.raises(UserError, match="is RF-DETR for segmentation"):
        load_detector(tmp_path / "segments")
    transformers.ViTModel(
        transformers.ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="is no RF-DETR|no weights"):
        load_detector(tmp_path / "vit")


def test_the_side_is_that_of_the_image_processor(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    narrow("rf-detr-nano", num_hidden_layers=4, patch_size=8, image_size=60, out_indices=[2, 4]).save_pretrained(
        tmp_path
    )
    assert load_detector(tmp_path).input_transform.short_side == 64  # whole windows
    transformers.RfDetrImageProcessor(size={"height": 96, "width": 96}).save_pretrained(tmp_path)
    assert load_detector(tmp_path).input_transform.short_side == 96


def test_a_folder_of_weights(tmp_path: Path) -> None:
    model = small("transformers")
    model.save_pretrained(tmp_path)
    loaded, (image,) = load_detector(tmp_path), images(1)
    assert isinstance(loaded, EventfulRFDETR)
    frame = loaded.input_transform(image)
    (ours,), (theirs,) = loaded(frame[None]), EventfulRFDETR(model)(frame[None])
    assert torch.equal(ours.boxes, theirs.boxes)


@pytest.mark.parametrize("name", ["rf-detr-nano", "rf-detr-base"])
def test_a_file_of_the_package_rfdetr(name: Name, tmp_path: Path) -> None:
    pytest.importorskip("rfdetr")
    network = random_rfdetr(name).model.model
    path = tmp_path / f"{name}.pth"
    torch.save({"model": network.state_dict(), "args": argparse.Namespace(lr=1e-4)}, path)
    loaded = load_detector(path)
    assert isinstance(loaded, EventfulRFDETR) and loaded.names[1] == "person"
    assert loaded.input_transform.short_side == SIZES[name].side
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), network.parameters(), strict=True))
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="is no weights file of RF-DETR"):
        load_detector(path)
