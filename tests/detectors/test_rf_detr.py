"""RF-DETR of both packages: equal to their own predictions, counted, streamed and pooled through the protocol."""

from __future__ import annotations

import argparse
import json
import shutil
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


def test_fewer_tokens_than_queries(model: Any) -> None:
    detector, frame = EventfulRFDETR(model, min_score=0), torch.rand(3, 32, 32)
    (dense,) = detector(frame[None])
    (result,) = detector.step([frame], detector.init_state())
    assert len(dense.boxes) == detector.parts.decoder.queries
    torch.testing.assert_close(result.detections.scores, dense.scores)


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
    results = list(detector.stream(images(), budget=0.25, hold=1))
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


def test_labels_rename_and_drop_classes(saved: Path) -> None:
    everything, some = load_detector(saved), load_detector(saved, {"person": "human", "dog": None})
    assert isinstance(everything, EventfulRFDETR) and isinstance(some, EventfulRFDETR)
    assert (some.names[1], everything.names[1]) == ("human", "person")
    everything.min_score = some.min_score = 0
    everything.relabel({name: None for name in everything.names if name != "person"})
    frame = torch.rand(1, 3, 64, 64)
    (kept,), (others,) = everything(frame), some(frame)
    assert set(kept.labels.tolist()) == {1} and 18 not in others.labels
    with pytest.raises(UserError, match="label map: no class unicorn"):
        some.relabel({"unicorn": None})
    with pytest.raises(UserError, match="two classes named car"):
        some.relabel({"bus": "car"})


def test_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot make torch.nn.modules.linear.Linear an eventful RF-DETR; supported"):
        EventfulRFDETR(nn.Linear(2, 2))
    model = small("transformers")
    detector = EventfulRFDETR(model)
    with pytest.raises(UserError, match="multiple of 16 pixels, got 70"):
        detector.stream(images(), short_side=70)
    with pytest.raises(UserError, match=r"got a Tensor of shape \(64, 64\); expected float tensors"):
        detector(torch.rand(3, 64, 64))
    with pytest.raises(UserError, match="no weights 'rf-detr-tiny': .* nor of rf-detr-nano, rf-detr-small"):
        load_detector("rf-detr-tiny")
    model.train()
    with pytest.raises(UserError, match=r"call .eval\(\)"):
        detector.step([detector.input_transform(images(1)[0])], detector.init_state())


def test_without_network_one_line_says_what_to_fetch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="^no weights rf-detr-large: huggingface.co/Roboflow/rf-detr-large .*; fetch"):
        load_detector("rf-detr-large")
    assert capfd.readouterr() == ("", "")


def test_the_cache_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    folder = tmp_path / "models--Roboflow--rf-detr-nano" / "snapshots" / ("0" * 40)
    small("transformers").save_pretrained(folder)
    (folder.parent.parent / "refs").mkdir()
    (folder.parent.parent / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert load_detector("rf-detr-nano").input_transform.short_side == 64


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a small model."""
    folder = tmp_path_factory.mktemp("saved")
    small("transformers").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("config.json", None, "has no config.json; a folder of RF-DETR has config.json, preprocessor_config.json and"),
        ("model.safetensors", None, "has no model.safetensors; a folder of RF-DETR has"),
        ("config.json", "{", r"config.json cannot be read \(Expecting .*\); get it again"),
        ("config.json", "[]", "config.json holds a list, no settings"),
        ("config.json", '{"model_type": "detr"}', "is no RF-DETR: its config.json is of the model type detr"),
        ("config.json", {"id2label": {"0": "cat"}}, r"class_embed.bias is of shape \(91,\), but \(1,\) by config.json"),
        ("config.json", {"id2label": None}, r"class_embed.bias is of shape \(91,\), but \(2,\) by config.json"),
        (
            "config.json",
            {"decoder_layers": 9},
            "is no RF-DETR: .* of its parameters are not there, first model.decoder",
        ),
        ("model.safetensors", 4000, r"is no whole RF-DETR \(.*\); get its files again"),
        ("model.safetensors", "garbage", r"is no whole RF-DETR \(.*\); get its files again"),
        ("preprocessor_config.json", "{", "preprocessor_config.json cannot be read"),
        ("preprocessor_config.json", '{"size": {"shortest_edge": 8}}', "expected size with height and width"),
        ("preprocessor_config.json", '{"size": {"height": 64, "width": 80}}', "takes squares of RGB, but this has"),
        ("preprocessor_config.json", '{"image_mean": [0.5]}', "takes squares of RGB"),
    ],
)
def test_damaged_folders_say_in_one_line_what_is_wrong(
    saved: Path,
    tmp_path: Path,
    file: str,
    content: str | int | dict[str, Any] | None,
    expected: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    path = tmp_path / file
    if content is None:
        path.unlink()
    elif isinstance(content, int):
        path.write_bytes(path.read_bytes()[:content])
    elif isinstance(content, str):
        path.write_text(content)
    else:
        settings = {**json.loads(path.read_text()), **content, "label2id": None}
        path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    with pytest.raises(UserError, match=expected) as error:
        load_detector(tmp_path)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    model = small("transformers")
    model.class_embed.bias.data[3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds NaN or infinite numbers, first in class_embed.bias"):
        load_detector(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_low_precision(model: Any, dtype: torch.dtype) -> None:
    """PyTorch's own sampling gives NaN there, on CPUs, and so do both packages."""
    detector = EventfulRFDETR(model, min_score=0)
    frame = detector.input_transform(images(1)[0])
    (exact,) = detector(frame[None])
    (rounded,) = detector.to(dtype)(frame[None].to(dtype))
    assert len(rounded.scores) == len(exact.scores)
    torch.testing.assert_close(rounded.scores, exact.scores, atol=0.05, rtol=0)


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
    with pytest.raises(UserError, match="is no RF-DETR: its config.json is of the model type vit"):
        load_detector(tmp_path / "vit")


def test_the_side_is_that_of_the_image_processor(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    narrow("rf-detr-nano", num_hidden_layers=4, patch_size=8, image_size=60, out_indices=[2, 4]).save_pretrained(
        tmp_path
    )
    assert load_detector(tmp_path).input_transform.short_side == 64  # whole windows
    processor = transformers.RfDetrImageProcessor(size={"height": 96, "width": 96}, image_mean=(0.5, 0.4, 0.3))
    processor.save_pretrained(tmp_path)
    loaded, (image,) = load_detector(tmp_path), images(1)
    assert loaded.input_transform.short_side == 96
    ours = (loaded.input_transform(image) - loaded.pixel_mean) / loaded.pixel_std
    assert torch.equal(ours, processor(images=image, return_tensors="pt")["pixel_values"][0])


def test_a_folder_of_weights(tmp_path: Path) -> None:
    model = small("transformers")
    model.save_pretrained(tmp_path)
    loaded, (image,) = load_detector(tmp_path), images(1)
    assert isinstance(loaded, EventfulRFDETR) and isinstance(
        load_detector(tmp_path / "model.safetensors"), EventfulRFDETR
    )
    assert load_detector(tmp_path, precision="bfloat16").spec.dtype == torch.bfloat16
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


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harm"),)


def test_a_file_that_rfdetr_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its name is, with its resolution and classes; what asks for more than data is refused."""
    pytest.importorskip("rfdetr")
    monkeypatch.chdir(tmp_path)
    network = random_rfdetr("rf-detr-nano", {"num_classes": 2, "resolution": 320}).model.model
    path = tmp_path / "checkpoint_best_total.pth"
    options: list[Any] = [argparse.Namespace(class_names=["cat", "dog"]), {"class_names": ["cat", "dog"]}]
    for args in options:
        torch.save({"model": network.state_dict(), "args": args}, path)
        loaded = load_detector(path)
        assert loaded.names == ("cat", "dog", "unused 2") and loaded.input_transform.short_side == 320
    torch.save({"model": network.state_dict(), "args": Harmful()}, path)
    with pytest.raises(UserError, match="asks for more than tensors"):
        load_detector(path)
    assert not Path("harm").exists()
    assert EventfulRFDETR(network).names == ("class 0", "class 1", "class 2")  # alone it does not know them
