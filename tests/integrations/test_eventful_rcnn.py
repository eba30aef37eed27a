"""`EventfulRCNN`: equal to detectron2 with all tokens selected, and what it remembers of which video."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from eventful_det.detectors.saliency import token_saliency
from eventful_det.detectors.vitdet.config import vitdet_tiny
from eventful_det.errors import UserError
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.gating.selector import (
    EVERYTHING,
    GateInput,
    Gmacs,
    LargestError,
    Latency,
    Ranking,
    Selector,
    Threshold,
    TopFraction,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
pytest.importorskip("detectron2.modeling", reason="needs detectron2, which is not installed", exc_type=ImportError)

from detectron2.config import get_cfg  # noqa: E402
from detectron2.layers import get_norm  # noqa: E402
from detectron2.modeling import META_ARCH_REGISTRY, build_model  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from detectron2.utils.analysis import FlopCountAnalysis  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402
from zoo_models import randomise, zoo_model  # noqa: E402

from eventful_det.integrations.detectron2 import EventfulRCNN, add_eventful_config  # noqa: E402

SMALL = vitdet_tiny(
    ("a", "b", "c"),
    dim=48,
    depth=4,
    global_blocks=(1, 3),
    channels=16,
    box_convs=2,
    box_fc=(32,),
    rpn_convs=2,
    proposals=30,
    max_detections=20,
)


def eventful(
    rule: Any = "rows", masks: bool = False, cascade: bool = False, square_pad: int = 0, **options: Any
) -> EventfulRCNN:
    kind = {"masks": masks, "cascade": cascade, "square_pad": square_pad}
    return zoo_model(SMALL, EventfulRCNN, {"rule": rule, **options}, **kind)


def video(frames: int = 5, height: int = 96, width: int = 160, video_id: int = 1) -> list[dict[str, Any]]:
    """Noise of which a square moves from frame to frame."""
    generator = torch.Generator().manual_seed(video_id)
    still = 255 * torch.rand(3, height, width, generator=generator)
    square = 255 * torch.rand(3, 20, 20, generator=generator)
    inputs = []
    for i in range(frames):
        image = still.clone()
        image[:, 20:40, 8 * i : 8 * i + 20] = square
        inputs.append({"image": image, "video_id": video_id, "frame_id": i, "height": 2 * height, "width": 2 * width})
    return inputs


def run(model: Any, inputs: list[dict[str, Any]], batch: int = 1) -> list[dict[str, Any]]:
    batches = [inputs[i : i + batch] for i in range(0, len(inputs), batch)]
    with torch.no_grad():
        return [output for batch in batches for output in model(batch)]


def fields(output: dict[str, Any]) -> dict[str, Tensor]:
    values = output["instances"].get_fields()
    return {name: getattr(value, "tensor", value) for name, value in values.items()}


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float = 1e-4) -> None:
    """The same objects in the same order, boxes to a tolerance of the longer side of the picture."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        size = theirs["instances"].image_size
        assert ours["instances"].image_size == size
        ours, theirs = fields(ours), fields(theirs)
        assert len(theirs["scores"]) > 5 and ours.keys() == theirs.keys()
        for name, value in theirs.items():
            unit = max(size) if name == "pred_boxes" else 1
            torch.testing.assert_close(ours[name], value, rtol=0, atol=tolerance * unit)


@pytest.mark.parametrize("rule", ["rows", "paper"])
@pytest.mark.parametrize("kind", [{}, {"masks": True}, {"cascade": True, "masks": True}, {"incremental_heads": False}])
def test_all_selected_equals_detectron2(kind: dict[str, bool], rule: str) -> None:
    stock = zoo_model(SMALL, **{key: value for key, value in kind.items() if key != "incremental_heads"})
    model = eventful(rule, budget=EVERYTHING, **kind)
    assert list(model.state_dict()) == list(stock.state_dict())
    for size in ((96, 96), (96, 160), (160, 64)):
        frames = video(3, *size)
        assert_same(run(model, frames), run(stock, frames))


@pytest.mark.parametrize(
    ("rule", "selector"), [("rows", TopFraction(0.2)), ("rows", Threshold(0.5)), ("paper", TopFraction(0.2))]
)
def test_incremental_heads_equal_detectron2s(rule: str, selector: Selector) -> None:
    frames = video(6)
    dense = run(eventful(rule, budget=selector, incremental_heads=False), frames)
    incremental = run(eventful(rule, budget=selector), frames)
    assert_same(incremental, dense)
    assert [x["cost"].recomputed for x in dense] == [x["cost"].recomputed for x in incremental]
    assert dense[0]["cost"].flush and not any(x["cost"].flush for x in dense[1:])
    assert all(0 < x["cost"].macs["backbone"] < x["cost"].dense["backbone"] for x in dense[1:])


def test_videos_do_not_disturb_each_other() -> None:
    """Interleaved, several frames of a video in a batch, sizes that differ: by not a single bit."""
    videos = [video(6, 96, 160, 1), video(6, 64, 64, 2), video(6, 96, 160, 3)]
    exact = Rows(exact=True)
    alone = {x["video_id"]: run(eventful(exact, budget=0.3), x_frames) for x_frames in videos for x in x_frames[:1]}
    order = [1, 2, 1, 3, 1, 3, 2, 2, 3, 1, 1, 2, 2, 3, 3, 1, 2, 3]
    iterators = {i: iter(frames) for i, frames in enumerate(videos, start=1)}
    mixed = [next(iterators[i]) for i in order]
    found = run(eventful(exact, budget=0.3), mixed, batch=4)
    for frame, output in zip(mixed, found, strict=True):
        expected = fields(alone[frame["video_id"]][frame["frame_id"]])
        assert all(torch.equal(value, expected[name]) for name, value in fields(output).items())


def test_the_gate_is_told_what_was_found_on_the_last_frame() -> None:
    told: list[Tensor] = []

    def policy(gate: GateInput) -> Ranking:
        assert gate.saliency is not None
        told.append(gate.saliency.clone())
        return LargestError()(gate)

    model, frames = eventful(budget=Selector(policy)), video(3)
    with torch.no_grad():
        found = [model.inference([frame], do_postprocess=False)[0] for frame in frames]
    assert len(told) == 2 and len(found[0]) > 0  # the first frame is a flush
    for saliency, instances in zip(told, found, strict=False):
        assert torch.equal(saliency, token_saliency(instances.pred_boxes.tensor, instances.scores, (6, 10), 16))


def test_frames_are_padded_where_detectron2_does_not() -> None:
    """It cuts what is no whole patch, unless it pads to squares; a frame loses nothing at its borders."""
    frame = video(1, 90, 150)[0]
    whole = torch.nn.functional.pad(frame["image"], (0, 10, 0, 6), value=127.5)  # the mean
    model = eventful(budget=EVERYTHING)
    ours, padded = (run(model, [frame | {"image": image}])[0] for image in (frame["image"], whole))
    assert ours["cost"].tokens == padded["cost"].tokens == 60
    square = eventful(budget=EVERYTHING, square_pad=192)
    assert run(square, [frame])[0]["cost"].tokens == 144
    assert_same(run(square, [frame]), run(zoo_model(SMALL, square_pad=192), [frame]))


def flushes(model: EventfulRCNN, inputs: list[dict[str, Any]]) -> list[bool]:
    return [output["cost"].flush for output in run(model, inputs)]


def test_when_a_video_begins_anew() -> None:
    frames, other = video(4), video(4, 64, 96)
    model = eventful(budget=0.2)
    assert flushes(model, frames) == [True, False, False, False]
    assert flushes(model, [frames[0], frames[1], frames[3], frames[3]]) == [True, False, True, True], "gap, repetition"
    assert flushes(model, [frames[0], other[1], other[2]]) == [True, True, False], "another size"
    assert flushes(model, [frames[2], frames[1]]) == [True, True], "backwards"
    assert flushes(eventful(budget=0.2, max_gap=2), [frames[0], frames[2], frames[3]]) == [True, False, False]


def test_scene_cuts_and_the_flush_key() -> None:
    """Another scene of the same size; noise is another scene than flat colour, and other noise than noise."""
    first, second = video(3), video(3, video_id=5)
    for x in second:
        x["image"] = x["image"] * torch.tensor([1.0, 0.1, 0.1]).view(3, 1, 1)
    frames = [x | {"video_id": 1, "frame_id": i} for i, x in enumerate(first + second)]
    assert flushes(eventful(), frames) == [True, False, False, True, False, False]
    assert flushes(eventful(scene_cuts=False), frames) == [True] + 5 * [False]
    frames[1] |= {"flush": True}
    assert flushes(eventful(scene_cuts=False), frames) == [True, True] + 4 * [False]
    inner = [x | {"image": x["image"].to(torch.uint8)} for x in frames]
    assert flushes(eventful(), inner) == [True, True, False, True, False, False]


def test_bgr_inputs() -> None:
    rgb, bgr = eventful(budget=0.3), eventful(budget=0.3)
    bgr.input_format = "BGR"
    bgr.pixel_mean, bgr.pixel_std = rgb.pixel_mean.flip(0), rgb.pixel_std.flip(0)
    bgr.backbone.net.patch_embed.proj.weight.data = rgb.backbone.net.patch_embed.proj.weight.data.flip(1)
    frames = video(3)
    assert_same(run(bgr, [x | {"image": x["image"].flip(0)} for x in frames]), run(rgb, frames))


@pytest.mark.parametrize("kind", [{}, {"masks": True}, {"cascade": True, "masks": True}])
def test_macs_of_the_whole_detector(kind: dict[str, bool]) -> None:
    """Counted by PyTorch on detectron2's own dense inference; whole windows, as it also computes their padding."""
    frame = video(1, 128, 128)[0]
    output = run(eventful(**kind), [frame])[0]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        zoo_model(SMALL, **kind)([{"image": frame["image"]}])
    cost = output["cost"]
    assert cost.macs.keys() == cost.dense.keys() == {"backbone", "pyramid", "rpn", "roi"}
    assert cost.total == pytest.approx(counter.get_total_flops() / 2, rel=1e-3)
    assert cost.total <= eventful(**kind).cost_model(Rows()).everything((8, 8))


def test_budgets_in_gmacs_and_seconds() -> None:
    frames = video(6)
    everything = run(eventful(budget=EVERYTHING), frames)[1]["cost"].total
    model = eventful(budget=Gmacs(0.6 * everything / 1e9))
    costs = [x["cost"] for x in run(model, frames)]
    assert costs[0].flush and all(0 < cost.total <= 0.6 * everything for cost in costs[1:])
    model.budget = "0.001ms"
    costs = [x["cost"] for x in run(model, [x | {"frame_id": 6 + x["frame_id"]} for x in frames])]
    assert model.budget.budget == Latency(1e-6) and all(cost.latency > 0 for cost in costs)
    assert all(cost.recomputed <= 2 for cost in costs[1:]), "as few as may be: the budget is out of reach"
    for options in ({"incremental_heads": False}, {"rule": "paper"}):
        with pytest.raises(UserError, match="known in advance"):
            eventful(budget=Gmacs(1), **options)


def test_it_is_a_video_detector() -> None:
    """Our own streams run on it, and find what its inference finds."""
    images = [x["image"].permute(1, 2, 0).to(torch.uint8).numpy() for x in video(4)]
    model = eventful(budget=0.3, short_side=96, long_side=160, names=SMALL.classes)
    streamed = list(model.stream(images, budget=0.3, hold=1))
    inputs = [{"image": torch.from_numpy(x).permute(2, 0, 1)} for x in images]
    found = run(model, [x | {"video_id": 0, "frame_id": i} for i, x in enumerate(inputs)])
    for ours, theirs in zip(streamed, found, strict=True):
        assert torch.equal(ours.detections.boxes, theirs["instances"].pred_boxes.tensor)
        assert torch.equal(ours.work, theirs["work"]) and ours.names == SMALL.classes


def test_tracing_runs_the_dense_network() -> None:
    """What detectron2's analyze_model.py does with --tasks flop."""
    frames, stock = video(2), zoo_model(SMALL)
    model = eventful(budget=0.1)
    run(model, frames[:1])
    counts = [FlopCountAnalysis(net, frames[1:]).by_operator() for net in (model, stock)]
    assert counts[0] == counts[1] and counts[0]["linear"] > 0
    assert flushes(model, frames[1:]) == [False], "the streams under way were left alone"


def test_weights_that_change_make_states_stale() -> None:
    model, frames = eventful(), video(3)
    run(model, frames[:2])
    assert len(model.states) == 1
    model.eval()
    assert len(model.states) == 1
    model.train()
    assert len(model.states) == 0
    run(model.eval(), frames[:2])
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert len(twin.states) == 0 and len(model.states) == 1
    model.load_state_dict(model.state_dict())
    assert len(model.states) == 0


def test_a_frame_that_failed_leaves_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model, frames = eventful(), video(3)
    run(model, frames[:1])
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(model.roi_heads, "forward", lambda *_: (_ for _ in ()).throw(MemoryError()))
        run(model, frames[1:2])
    assert flushes(model, frames[2:]) == [True]


def test_states_are_bounded_and_no_part_of_a_checkpoint() -> None:
    model = eventful(max_streams=2)
    keys = list(model.state_dict())
    for i in range(4):
        run(model, video(2, 64, 64, i))
    assert len(model.states) == 2 and list(model.state_dict()) == keys
    run(model, [x | {"is_last_frame": x["frame_id"] == 1} for x in video(2, 64, 64, 9)])
    assert 9 not in model.states and len(model.states) == 1


def test_still_pictures_are_left_to_detectron2() -> None:
    stills = [{"image": x["image"]} for x in video(2)]
    expected = run(zoo_model(SMALL), stills, batch=2)
    for model in (eventful(budget=0.1), eventful("dense")):
        for ours, theirs in zip(run(model, stills, batch=2), expected, strict=True):
            assert ours.keys() == theirs.keys() == {"instances"}
            assert all(torch.equal(value, fields(theirs)[name]) for name, value in fields(ours).items())
    mixed = run(eventful(budget=0.1), [video(1)[0], stills[1]], batch=2)
    assert_same(mixed[1:], run(zoo_model(SMALL), stills[1:]))


def test_an_unchanged_frame_keeps_its_detections() -> None:
    frame = video(1)[0]
    model = eventful(budget=Threshold(0.0), masks=True)
    first, second = run(model, [frame, frame | {"frame_id": 1}])
    assert second["cost"].recomputed == 0
    assert all(torch.equal(value, fields(first)[name]) for name, value in fields(second).items())


def test_training_is_detectron2s() -> None:
    boxes = torch.tensor([[10.0, 12.0, 60.0, 50.0], [70.0, 20.0, 150.0, 90.0]])
    targets = Instances((96, 160), gt_boxes=Boxes(boxes), gt_classes=torch.tensor([0, 2]))
    inputs = [x | {"instances": targets} for x in video(2)]
    losses = []
    for model in (zoo_model(SMALL), eventful()):
        torch.manual_seed(0)
        with EventStorage():
            losses.append(model.train()(inputs))
        sum(losses[-1].values()).backward()
        assert all(p.grad is not None for p in model.parameters())
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(value, losses[1][name]) for name, value in losses[0].items())


def test_the_budget_may_change_between_frames() -> None:
    model = eventful(budget=0.5)
    frames = video(3)
    run(model, frames[:1])
    shares = []
    for frame, budget in zip(frames[1:], (TopFraction(0.5), 6), strict=True):
        model.budget = budget
        shares.append(run(model, [frame])[0]["cost"].recomputed)
    assert shares == [30, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "columns"}, "unknown rule 'columns'"),
        ({"budget": 2.0}, "more than the frame"),
        ({"max_streams": 0}, "must be at least 1"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        eventful(**options)
    with pytest.raises(UserError, match='no "frame_id"'):
        run(eventful(), [{"image": video(1)[0]["image"], "video_id": 1}])
    with pytest.raises(UserError, match="there is no budget"):
        eventful("dense").budget = 0.5


def test_incremental_heads_refuse_other_parts() -> None:
    model = eventful()
    model.backbone.simfp_4[0].norm = get_norm("GN", 32)
    with pytest.raises(UserError, match='needs norm "LN" in the pyramid; leave incremental_heads off'):
        EventfulRCNN(
            backbone=model.backbone,
            proposal_generator=model.proposal_generator,
            roi_heads=model.roi_heads,
            pixel_mean=[0.0] * 3,
            pixel_std=[1.0] * 3,
            rule="dense",
            incremental_heads=True,
        )


def yacs(*options: Any) -> Any:
    cfg = get_cfg()
    add_eventful_config(cfg)
    sizes = {"EMBED_DIM": 48, "DEPTH": 4, "NUM_HEADS": 3, "WINDOW_SIZE": 4, "GLOBAL_BLOCKS": (1, 3), "OUT_CHANNELS": 16}
    cfg.merge_from_list([item for key, value in sizes.items() for item in (f"MODEL.VITDET.{key}", value)])
    levels = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.META_ARCHITECTURE = "EventfulRCNN"
    cfg.MODEL.BACKBONE.NAME = "build_eventful_vitdet_backbone"
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.RPN.IN_FEATURES = levels
    cfg.MODEL.RPN.CONV_DIMS = [-1, -1]
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = levels[:4]
    cfg.MODEL.ROI_BOX_HEAD.update(NAME="FastRCNNConvFCHead", NUM_CONV=1, CONV_DIM=16, NUM_FC=1, FC_DIM=32, NORM="LN")
    cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list(list(options))
    return cfg


def test_a_yacs_config_builds_the_model() -> None:
    assert META_ARCH_REGISTRY.get("EventfulRCNN") is EventfulRCNN
    cfg = yacs("MODEL.EVENTFUL.BUDGET", 0.25, "MODEL.EVENTFUL.INCREMENTAL_HEADS", True)
    model = randomise(build_model(cfg)).eval()
    outputs = run(model, video(3))
    first, *others = [x["cost"].recomputed for x in outputs]
    assert first == 60 and all(0 < some <= 15 for some in others)
    assert yacs("MODEL.EVENTFUL.BUDGET", 40).MODEL.EVENTFUL.BUDGET == 40
    model = build_model(yacs("MODEL.EVENTFUL.THRESHOLD", 1.5, "MODEL.EVENTFUL.RENEW_EVERY", 9))
    assert model.rule == Rows(renew_every=9) and model.budget == Selector(LargestError(1.5, age_power=0.5), 1.0)
    assert build_model(yacs("MODEL.EVENTFUL.BUDGET", "40 GMACs")).budget.budget == Gmacs(40)
    assert isinstance(build_model(yacs("MODEL.EVENTFUL.RULE", "paper")).rule, Paper)
    assert build_model(yacs("MODEL.EVENTFUL.RULE", "dense")).dense


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("MODEL.EVENTFUL.RULE", "columns"), "unknown rule 'columns'; expected rows, paper or dense"),
        (("MODEL.EVENTFUL.BUDGET", 0.5, "MODEL.EVENTFUL.THRESHOLD", 1.0), "not both"),
        (("MODEL.EVENTFUL.RULE", "paper", "MODEL.EVENTFUL.RENEW_EVERY", 3), "belongs to the rule 'rows'"),
    ],
)
def test_yacs_errors(options: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(yacs(*options))
