"""Compiled detectors: the same detections as PyTorch, streams and pools as any detector has them."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from eventful_det.detectors.checkpoints.files import load_detector
from eventful_det.detectors.protocol import AnyRule, VideoDetector
from eventful_det.detectors.vitdet.config import ModelConfig
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.engine.backends import Torch, quickest_precision
from eventful_det.engine.export import default_size, export_engine, graphs_of
from eventful_det.engine.folder import MANIFEST, Manifest, _digest, load_engine
from eventful_det.engine.vitdet.detector import CompiledViTDet, ViTDetStream
from eventful_det.engine.vitdet.tiles import Geometry
from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.gating.selector import EVERYTHING, Gmacs, RandomK, Selector, Threshold, TopFraction, TopK
from eventful_det.gating.whole_windows.rule import Windows
from eventful_det.outputs import LOCK
from eventful_det.runtime.pool import StreamPool

SIZE = (96, 160)
RULE = Windows((1, 3, 5))


def make_detector(**changes: object) -> Detector:
    """A small detector with random weights, whose boxes are many; 3 x 5 windows at `SIZE` of 2 x 2 tokens."""
    torch.manual_seed(0)
    small = {"dim": 24, "depth": 4, "heads": 2, "window": 2, "global_blocks": (1, 3), "channels": 8, "box_fc": (16,)}
    config = ModelConfig.from_dict(
        {"classes": ("a", "b"), **small, "proposals": 20, "score_threshold": 0.0, "short_side": 96, **changes}
    )
    detector = Detector(config)
    for parameter in detector.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return detector.eval().requires_grad_(False)


def clip(count: int, size: tuple[int, int] = SIZE) -> list[Tensor]:
    """Frames in which a square moves over noise."""
    frame = torch.rand(3, *size, generator=torch.Generator().manual_seed(1))
    frames = []
    for t in range(count):
        frames.append(frame.clone())
        frames[-1][:, 20:50, 12 * t : 12 * t + 30] = 0.9
    return frames


def assert_same(detector: Detector, engine: CompiledViTDet, rule: AnyRule, selector: Selector) -> None:
    states = detector.init_state(), engine.init_state()
    for frame in clip(5):
        (ours,) = detector.step([frame], states[0], rule=rule, selector=selector)
        (theirs,) = engine.step([frame], states[1], rule=rule, selector=selector)
        a, b = ours.detections, theirs.detections
        assert len(a) == len(b) > 5
        assert (a.boxes - b.boxes).abs().max() < 1e-3 and (a.scores - b.scores).abs().max() < 1e-3
        assert torch.equal(a.labels, b.labels) and torch.equal(ours.work, theirs.work)
        assert ours.cost.recomputed == theirs.cost.recomputed and ours.cost.flush == theirs.cost.flush
        assert ours.cost.macs["backbone"] == theirs.cost.macs["backbone"] and ours.cost.dense == theirs.cost.dense


def in_torch(detector: Detector, rule: Windows = RULE) -> CompiledViTDet:
    return CompiledViTDet(detector.config, SIZE, rule, Torch(graphs_of(detector, SIZE)))


@pytest.mark.parametrize("changes", [{}, {"rpn_convs": 2}, {"window": 4, "box_convs": 0}])
def test_the_graphs_compute_what_the_detector_does(changes: dict[str, object]) -> None:
    detector = make_detector(**changes)
    engine = in_torch(detector)
    for selector in (TopK(8), TopFraction(0.3), RandomK(20), EVERYTHING, Threshold(1e9)):
        assert_same(detector, engine, RULE, selector)
    assert_same(detector, engine, Dense(), EVERYTHING)


@pytest.fixture(scope="module", params=["openvino", "onnx"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an engine."""
    for package in {"openvino": ["openvino"], "onnx": ["onnx", "onnxruntime"]}[request.param]:
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("whole") / "engine"
    export_engine(make_detector(), folder, format=request.param, size=SIZE, buckets=RULE.buckets)
    assert [path.name for path in folder.parent.iterdir()] == ["engine"], "nothing is left beside it"
    return folder


def test_a_folder_is_a_detector(whole: Path) -> None:
    detector, engine = make_detector(), load_detector(whole)
    assert isinstance(engine, CompiledViTDet) and engine.rule == RULE and engine.names == ("a", "b")
    for selector in (TopK(8), EVERYTHING):
        assert_same(detector, engine, RULE, selector)
    assert_same(detector, engine, Dense(), EVERYTHING)
    with pytest.raises(UserError, match="PyTorch alone"):
        load_detector(whole, proposals=5)
    with pytest.raises(UserError, match="an engine stays there"):
        load_detector(whole, device="cuda")
    with pytest.raises(UserError, match="threads must be a whole number"):
        load_engine(whole, threads=-1)
    assert_same(detector, copy.deepcopy(engine), RULE, TopK(8))
    by_manifest = load_detector(whole / MANIFEST)
    assert isinstance(by_manifest, CompiledViTDet)
    assert_same(detector, pickle.loads(pickle.dumps(by_manifest)), RULE, TopK(8))


def test_streams_pools_and_budgets() -> None:
    engine: CompiledViTDet = in_torch(make_detector())
    detector: VideoDetector[ViTDetStream] = engine
    film = [(255 * frame.permute(1, 2, 0)).byte().numpy() for frame in clip(6)]
    results = list(engine.stream(film, budget=0.2, scene_cuts=False, timing=True, hold=1))
    assert [r.cost.recomputed for r in results] == [60] + [12] * 5, "a fifth of 15 windows of four tokens"
    assert all(r.cost.latency > 0 for r in results)
    costs = engine.cost_model(RULE)
    prices = costs.macs(engine.grid, torch.arange(60))
    assert prices[0] < prices[1] == prices[7] < prices[8] == prices[15] < prices[16] == prices[23] < prices[24]
    budget = Gmacs(float(prices[13]) / 1e9)
    for result in list(engine.stream(film, budget=budget, scene_cuts=False, hold=1))[1:]:
        assert result.cost.total <= prices[13] and result.cost.recomputed == 12
    pool = StreamPool(detector, budget=0.2, scene_cuts=False, hold=1)
    pool.add(film, name="one")
    pool.add(film[:4], name="two")
    rounds = list(pool)
    exact = engine.step([clip(1)[0]], engine.init_state(), rule=Rows(exact=True))
    assert exact[0].cost.recomputed == 60, "as sweeps run it"
    assert len(rounds) == 6 and all(r.cost.recomputed in (4, 12, 20, 60) for round in rounds for r in round)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_budgets_below_the_smallest_bucket_are_kept_on_average(share: float) -> None:
    """Of the smallest bucket's: saved up for, by streams in turn, where `hold=1` shows every frame to the network."""
    engine = in_torch(make_detector())
    film = [(255 * frame.permute(1, 2, 0)).byte().numpy() for frame in clip(10)]
    film = (film + film[::-1]) * 5
    prices = engine.cost_model(RULE).macs(engine.grid, torch.arange(60))
    idle, least = (int(price) / 1e9 for price in prices[:2])
    for budget in (Gmacs(idle + share * (least - idle)), share * 4 / 60):
        results = list(engine.stream(film, budget=budget, scene_cuts=False, hold=1))[1:]
        spent = [r.cost.total / 1e9 if isinstance(budget, Gmacs) else r.cost.recomputed / 60 for r in results]
        allowance = budget.value if isinstance(budget, Gmacs) else budget
        most = least if isinstance(budget, Gmacs) else 4 / 60
        assert sum(spent) <= allowance * len(spent) + most + 1e-9
        assert sum(spent) > 0.9 * allowance * len(spent) - 1.5 * most, "and it is used"
        assert 0 < sum(r.cost.recomputed > 0 for r in results) < len(results)
    pool = StreamPool(engine, budget=Gmacs(3 * idle + share * least), scene_cuts=False, hold=1)
    for name in "abc":
        pool.add(film, name=name)
    runs = dict.fromkeys("abc", 0)
    for result in (result for results in list(pool)[1:] for result in results):
        runs[result.stream] += result.cost.recomputed > 0
    assert max(runs.values()) - min(runs.values()) <= 1 and max(runs.values()) > 0, "in turn"


def test_state_is_the_callers() -> None:
    engine = in_torch(make_detector())
    one, both = engine.init_state(), engine.init_state(2)
    for frame in clip(3):
        (alone,) = engine.step([frame], one, selector=Threshold(0.1).within(8))
        first, second = engine.step([frame, torch.zeros_like(frame)], both, selector=Threshold(0.1).within(8))
        assert torch.equal(alone.detections.boxes, first.detections.boxes)
    assert both.nbytes == pytest.approx(2 * one.nbytes, rel=0.1) and second.cost.macs["rpn"] == 0
    other = one.clone()
    frame = clip(4)[-1]
    (before,), (after,) = (engine.step([frame], state, selector=TopK(8)) for state in (other, one))
    assert torch.equal(before.detections.boxes, after.detections.boxes)
    (small,) = engine.step([frame[:, :60, :100]], one)
    assert small.cost.flush and float(small.detections.boxes[:, 2].max()) <= 100


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda engine: engine.step([torch.zeros(3, 97, 160)], engine.init_state()), "does not fit an engine for 96"),
        (lambda engine: engine.step([torch.zeros(3, *SIZE)], engine.init_state(), rule=Paper()), "cannot follow Paper"),
        (lambda engine: engine.cost_model(Dense()), "own rule only"),
        (lambda engine: engine.to("cpu").to("cuda"), "runs on CPUs"),
        (lambda engine: engine.to(torch.bfloat16), "runs on CPUs, in the precision it was loaded with"),
        (lambda engine: export_engine(engine, "x"), "in PyTorch, not a CompiledViTDet"),  # type: ignore[arg-type]
        (lambda _: export_engine(make_detector(), "x", format="trt"), "format must be"),  # type: ignore[arg-type]
        (lambda _: export_engine(make_detector(), "x", buckets=0.5), "buckets must be a list"),  # type: ignore[arg-type]
        (lambda _: export_engine(make_detector(), __file__), "or is a file; give a new folder"),
        (lambda _: export_engine(make_detector(), Path("x"), size=(90, 160)), "multiples of 32"),
        (lambda _: export_engine(make_detector(), Path("x"), size=(320, 32 * 10**6)), "from 1 to 8192"),
        (lambda _: list(graphs_of(make_detector(window=0, global_blocks=()), SIZE)), "even number of tokens"),
        (lambda _: list(graphs_of(make_detector(box_stages=3), SIZE)), "cascade"),
    ],
)
def test_what_cannot_be_is_one_line(call: Callable[[CompiledViTDet], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(in_torch(make_detector()))


def test_every_cell_is_written_by_the_windows_together() -> None:
    for grid, window in [((6, 10), 2), ((10, 14), 4), ((18, 32), 4)]:
        geometry = Geometry(grid, window, 1)
        own = torch.cat([level.own.flatten() for level in geometry.levels])
        own = own[own < geometry.nowhere]
        cells = geometry.layout.inside.nonzero().squeeze(1)
        assert torch.equal(own.sort().values, cells[cells < geometry.layout.starts[4]])
        for level, tiles in enumerate(geometry.levels):
            assert set(tiles.own.flatten().tolist()) <= set(tiles.write.flatten().tolist())
            inside = int((tiles.read[0] > 0).sum(dim=(1, 2)).max())
            assert inside <= (geometry.side(level) + 4) ** 2


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.float32: 2.0, torch.bfloat16: 1.0}
    monkeypatch.setattr("eventful_det.engine.backends._seconds", lambda x, _: seconds[x.dtype])
    for bfloat16, precision in ((1.0, "bfloat16"), (1.9, "float32")):
        seconds[torch.bfloat16] = bfloat16
        quickest_precision.cache_clear()
        assert quickest_precision() == precision
        assert load_detector("vitdet_tiny_synthetic", precision="auto").spec.dtype == getattr(torch, precision)
    quickest_precision.cache_clear()


def test_sizes_of_frames_of_16_to_9() -> None:
    config = dataclasses.asdict(make_detector().config)
    for short, long, size in [(320, 640, (320, 576)), (576, 1024, (576, 1024)), (256, 300, (192, 320))]:
        detector = make_detector(short_side=short, long_side=long)
        assert default_size(detector) == size, config
    film = [np.zeros((360, 640, 3), np.uint8)]
    engine = CompiledViTDet(make_detector().config, (320, 576), RULE, Torch(graphs_of(make_detector(), (320, 576))))
    (result,) = engine.stream(film)
    assert result.cost.tokens == 720
    (portrait,) = engine.stream([np.zeros((640, 360, 3), np.uint8)])
    assert portrait.token_size == (32, 32), "320 of its 640 pixels"


def test_what_is_padded_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Frames of another shape: once, with the size to export; none where PyTorch pads as much."""
    engine = in_torch(make_detector())
    for height, width, wanted in [
        (96, 160, None),
        (288, 480, None),
        (90, 150, None),
        (120, 160, "96,128"),
        (160, 96, "160,96"),
        (160, 80, "160,96"),
        (80, 320, "64,160"),
    ]:
        caplog.clear()
        for _ in range(2):
            list(engine.stream([np.zeros((height, width, 3), np.uint8)] * 3, scene_cuts=False))
        assert [f"size=[{wanted}]" in record.getMessage() for record in caplog.records] == [True] * (wanted is not None)
    caplog.clear()
    list(engine.stream([np.zeros((*SIZE, 3), np.uint8)], short_side=64))
    assert "size=[64,128]" in caplog.text, "smaller on purpose"
    for sides in ({"short_side": 128}, {"long_side": 192}, {"short_side": 8192}):
        with pytest.raises(UserError, match="96 x 160 pixels at most"):
            engine.stream([], **sides)
    own = make_detector(long_side=256)
    engine_of_own_size = CompiledViTDet(own.config, (96, 192), RULE, Torch(graphs_of(own, (96, 192))))
    for size, wanted in (((2, 3000), "32,256"), ((3000, 2), "256,32"), ((80, 320), "64,256"), ((120, 160), "96,128")):
        caplog.clear()
        list(engine_of_own_size.stream([np.zeros((*size, 3), np.uint8)]))
        assert f"size=[{wanted}]" in caplog.text, "as in PyTorch"
    square = CompiledViTDet(make_detector(square_pad=160).config, SIZE, RULE, engine.backend)
    caplog.clear()
    list(square.stream([np.zeros((*SIZE, 3), np.uint8)]))
    assert "size=[160,160]" in caplog.text and default_size(make_detector(square_pad=192)) == (192, 192)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "engine"))


def refused(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        load_engine(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_every_file_of_a_folder_is_checked(folder: Path) -> None:
    files = [path for path in folder.iterdir() if path.name != MANIFEST]
    assert len(files) in (5, 10)
    for path in files:
        good = path.read_bytes()
        for bad in (good[:-1], good[:100], b"", good[:-9] + bytes([good[-9] ^ 1]) + good[-8:]):
            path.write_bytes(bad)
            refused(folder, f"{path.name} is damaged or missing")
        path.unlink()
        refused(folder, f"{path.name} is damaged or missing")
        path.write_bytes(good)
    load_engine(folder, warm_up=False)


def test_every_field_of_a_manifest_is_checked(folder: Path) -> None:
    manifest = folder / MANIFEST
    about = json.loads(manifest.read_text())
    assert set(about) == {field.name for field in dataclasses.fields(Manifest)}
    values: list[object] = [
        None,
        True,
        -1,
        0,
        7,
        0.5,
        1e400,
        "",
        "other",
        [],
        [1],
        [64, 1e9],
        [[]],
        {},
        {"a": 1},
        {"a": {"b": []}},
    ]
    for key, good in about.items():
        manifest.write_text(json.dumps({name: value for name, value in about.items() if name != key}))
        refused(folder, "engine.json")
        for value in values:
            manifest.write_text(json.dumps(about | {key: value}))
            refused(folder, "engine.json") if value != good else load_engine(folder, warm_up=False)
    for key, good in about["config"].items():
        others: list[object] = [None, -1, 7, "other", [1], good * 2 if isinstance(good, list) else {}]
        for value in others:
            manifest.write_text(json.dumps(about | {"config": about["config"] | {key: value}}))
            refused(folder, "engine.json was changed") if value != good else load_engine(folder, warm_up=False)
    for files in ({}, dict(list(about["files"].items())[1:])):
        changed = about | {"files": files}
        manifest.write_text(json.dumps(changed | {"digest": _digest(changed)}))
        refused(folder, "names other files than those of its model")
    for text in ("", "{", "[]", "null", "1", '"x"', "[" * 100_000, "\ud800", json.dumps(about | {"more": 1})):
        manifest.write_bytes(text.encode(errors="surrogatepass"))
        refused(folder, "holds no whole engine")


@pytest.mark.parametrize("whole", ["onnx"], indirect=True)  # the quicker one to export
def test_an_export_leaves_alone_what_is_not_its_own(folder: Path) -> None:
    def export() -> None:
        export_engine(make_detector(), folder, format="onnx", size=SIZE, buckets=RULE.buckets)

    part = folder.with_name("engine.part")
    (folder / "notes.json").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        export()
    (folder / "notes.json").unlink()
    part.mkdir()
    (part / "notes.json").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        export()
    assert [path.name for path in part.iterdir()] == ["notes.json"]
    (part / "notes.json").unlink()
    for name in ("dense.xml", "dense.new.bin", "regions.onnx", LOCK, ".engine.12.part.json"):  # of one that was killed
        (part / name).touch()
    export()
    assert [path.name for path in folder.parent.iterdir()] == ["engine"]
    load_engine(folder, warm_up=False)
    place = folder.stat().st_ino
    export()
    assert folder.stat().st_ino == place, "the same folder, which may be a mount point"
    shutil.copytree(folder, part)
    with pytest.raises(UserError, match="engine.part is a whole engine"):
        export()
    load_engine(part, warm_up=False)


def test_nothing_is_sent_home() -> None:
    pytest.importorskip("openvino")
    code = """
import sys
from eventful_det.engine.backends import import_package
import_package("openvino").convert_model
assert not [name for name in sys.modules if name.startswith("openvino_telemetry.")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_signals_are_handled_when_engines_are_gone(whole: Path) -> None:
    code = """
import gc, signal, sys
from eventful_det import load_detector
signal.signal(signal.SIGURG, lambda *_: print("handled"))
engines = [load_detector(sys.argv[1]) for _ in range(2)]
while engines:
    del engines[0]
    gc.collect()
    signal.raise_signal(signal.SIGURG)
"""
    done = subprocess.run([sys.executable, "-c", code, whole], check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout == "handled\n" * 2


def test_a_step_has_one_thread_of_pytorch_and_no_other_thread_has_fewer(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, inside = load_engine(whole, threads=2), []
    assert isinstance(engine, CompiledViTDet)

    def run(*_: object) -> None:
        inside.append(torch.get_num_threads())
        raise ZeroDivisionError

    def ask() -> int:
        torch.rand(3)
        return torch.get_num_threads()

    monkeypatch.setattr(engine.backend, "run", run)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError):
            engine.step(clip(1), engine.init_state())
        assert inside == [1] and torch.get_num_threads() == 2
        with engine.backend.around(), ThreadPoolExecutor() as others:
            assert others.submit(ask).result() == 2
    finally:
        torch.set_num_threads(before)
