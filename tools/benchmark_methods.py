"""The frames that the cases of tools/benchmark.py show, and the methods that process them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from benchmark_cases import DENSE, GATED, PEERS, TIMM, USUAL, Case, Options
from common import AnyDetector
from torch import Tensor, nn

from eventful_det.benchmark.changes import BLOBS, blob_frames
from eventful_det.benchmark.official_code import OfficialBackbone, OfficialCode, dense_difference
from eventful_det.data.video import open_source
from eventful_det.data.video.transforms import resize, to_tensor
from eventful_det.detectors.checkpoints.files import load_detector
from eventful_det.detectors.rf_detr.model import EventfulRFDETR
from eventful_det.detectors.rf_detr.sizes import SIZES, random_model
from eventful_det.detectors.vitdet.config import MODELS, ModelConfig
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.gating.convert import eventify
from eventful_det.gating.dense import Dense
from eventful_det.gating.macs import dense_macs
from eventful_det.gating.rules import Rule
from eventful_det.gating.selector import DEFAULT, Selector, TopK
from eventful_det.gating.state import StreamState
from eventful_det.gating.vit_spec import spec_of
from eventful_det.gating.windows import Grid

PEER_TOLERANCE = 1e-4  # largest accepted difference of the dense token maps, relative to the largest value


@dataclass(frozen=True)
class Step:
    """What a frame cost, by part; parts without seconds took as long as the call."""

    macs: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A way to process the frames of one stream.

    Attributes:
        step: processes the next frame `(3, h, w)`.
        state_bytes: remembered of the stream so far.
        reset: forgets the stream.
    """

    step: Callable[[Tensor], Step]
    state_bytes: Callable[[], int] = lambda: 0
    reset: Callable[[], None] = lambda: None


def dense_backbone(net: Any, grid: Grid) -> Method:
    """The plain network."""
    step = Step({"backbone": dense_macs(spec_of(net).shape, grid, padded_linear=True).total})

    @torch.no_grad()
    def run(frame: Tensor) -> Step:
        net(frame[None])
        return step

    return Method(run)


def selector_of(k: int) -> Selector:
    """The `k` tokens that changed most; where nothing changes, those that changed enough."""
    return TopK(k) if k else DEFAULT


def gated_backbone(net: Any, rule: str, k: int) -> Method:
    """The network made eventful by one of our rules."""
    vit = eventify(net, cast(Rule[StreamState], GATED[rule]), selector_of(k))
    state = vit.init_state()

    def run(frame: Tensor) -> Step:
        (update,) = vit.step(frame[None], state)
        return Step({"backbone": update.macs.total})

    return Method(run, lambda: state.nbytes, state.reset)


def peer_backbone(peer: OfficialBackbone, frames: Sequence[Tensor]) -> Method:
    """The official backbone. It counts its operations beforehand, because counting takes its time."""
    peer.count(frames[0])
    step = Step({"backbone": peer.count(frames[1])})
    peer.reset()

    def run(frame: Tensor) -> Step:
        peer(frame)
        return step

    return Method(run, lambda: peer.state_bytes, peer.reset)


def whole_detector(detector: AnyDetector, rule: str, k: int) -> Method:
    """The detector, dense or by one of our rules."""
    state, how = detector.init_state(), GATED.get(rule, Dense())

    def run(frame: Tensor) -> Step:
        (step,) = detector.step([frame], state, rule=how, selector=selector_of(k), timing=True)
        cost = step.cost
        macs = {"backbone": cost.macs["backbone"], "heads": cost.total - cost.macs["backbone"], "total": cost.total}
        heads = sum(cost.seconds.get(part, 0.0) for part in cost.macs if part != "backbone")
        return Step(macs, {"backbone": cost.seconds["backbone"], "heads": heads})

    return Method(run, lambda: state.nbytes, state.reset)


def build_backbone(name: str, size: tuple[int, int], seed: int) -> nn.Module:
    """One of timm's ViTs with random weights.

    Raises:
        UserError: timm does not know it.
    """
    import timm

    torch.manual_seed(seed)
    try:
        return timm.create_model(name, num_classes=0, img_size=size).eval()
    except (RuntimeError, TypeError) as error:
        raise UserError(f"timm:{name} cannot be built ({str(error).splitlines()[0]})") from error


def build_detector(case: Case, classes: int, seed: int) -> Detector | EventfulRFDETR:
    """The case's model, with random weights unless they are named."""
    if case.model in SIZES:
        return EventfulRFDETR(random_model(case.model, seed, config=case.config))
    if case.model not in MODELS:
        return load_detector(None if case.model == "shipped" else case.model, **case.config)
    standard = MODELS[case.model](tuple(f"class{i}" for i in range(classes)))
    torch.manual_seed(seed)
    detector = Detector(ModelConfig.from_dict({**dataclasses.asdict(standard), **case.config}))
    for name, parameter in detector.named_parameters():
        if ".rel_pos_" in name:  # zero at first, which would hide mistakes in them
            torch.nn.init.trunc_normal_(parameter, std=0.02)
    return detector.eval()


@dataclass(frozen=True)
class Setting:
    """A case made ready.

    Attributes:
        frames: `(3, h, w)` as the methods take them.
        methods: by name.
        k: tokens that gated methods recompute, of `tokens`.
        notes: what a reader of its times should know.
    """

    frames: list[Tensor]
    methods: dict[str, Method]
    k: int
    tokens: int
    notes: list[str]


def prepare(case: Case, config: Options, count: int, device: torch.device, code: OfficialCode | None) -> Setting:
    """Build a case's model, methods and first `count` frames; checks that a peer computes what ours does."""
    detector: Detector | EventfulRFDETR | None = None
    if case.what == "backbone" and case.model.startswith(TIMM):
        net = build_backbone(case.model.removeprefix(TIMM), case.size, config.seed).to(device)
    else:
        detector = build_detector(case, config.classes, config.seed).to(device)
        net = detector.backbone.net if isinstance(detector, Detector) else detector.parts.backbone
    patch = spec_of(net).patch
    tokens = case.size[0] * case.size[1] // patch**2
    k = case.budget(tokens)
    frames = [frame.to(device) for frame in make_frames(case, patch, k, count, config.clip, config.seed)]
    changes = f"synthetic, exactly {k} tokens per frame in {BLOBS} moving blobs, seed {config.seed}"
    if case.changes == "still":
        changes = "none, the same frame comes again and again"
    elif case.changes == "clip":
        changes = f"those of the clip {Path(str(config.clip)).name}, resized"
    recomputed = f"{k} of {tokens} tokens" if k else f"what the default selects, {DEFAULT}"
    notes = [f"Token changes: {changes}. Gated methods recompute {recomputed}."]
    if case.what == "detector":
        assert detector is not None
        usual = USUAL if isinstance(detector, Detector) else USUAL[:2]  # the paper's rule does not know RF-DETR
        methods = {name: whole_detector(detector, name, k) for name in case.methods or usual}
        return Setting(frames, methods, k, tokens, notes)
    mean, std = (0.5, 0.5) if detector is None else (detector.pixel_mean, detector.pixel_std)
    frames = [(frame - mean) / std for frame in frames]
    methods = backbone_methods(case, net, frames, k, code)
    if code is not None and set(methods) & set(PEERS):
        notes.append(check_peer(code, net, frames[0]))
    return Setting(frames, methods, k, tokens, notes)


def make_frames(case: Case, patch: int, k: int, count: int, clip: Any, seed: int) -> list[Tensor]:
    """The frames of a case, `(3, h, w)` in [0, 1].

    Raises:
        UserError: the clip cannot be read or is too short.
    """
    if case.changes != "clip":
        return list(itertools.islice(blob_frames(case.size, patch, k, seed), count))
    with open_source(clip) as source:
        frames = [to_tensor(resize(frame.image, *case.size)) for frame in itertools.islice(source, count)]
    if len(frames) < count:
        raise UserError(f"{clip} has {len(frames)} frames; {count} are needed, give fewer repetitions")
    return frames


def backbone_methods(
    case: Case, net: Any, frames: Sequence[Tensor], k: int, code: OfficialCode | None
) -> dict[str, Method]:
    """The methods of a case of the backbone alone; `frames` are normalised."""
    grid = spec_of(net).grid(*case.size)
    methods = {}
    for name in case.methods or (USUAL[:2] if case.model.startswith(TIMM) else USUAL + (PEERS if code else ())):
        if name == DENSE:
            methods[name] = dense_backbone(net, grid)
        elif name in GATED:
            methods[name] = gated_backbone(net, name, k)
        elif code is not None:
            peer = OfficialBackbone(code, net, grid, k if name == "peer" else None)
            methods[name] = peer_backbone(peer, frames)
    return methods


def check_peer(code: OfficialCode, net: Any, frame: Tensor) -> str:
    """Whether the official dense backbone computes what ours does, in words; `frame` is normalised.

    Raises:
        UserError: it does not, so that its times would mean nothing.
    """
    difference = dense_difference(code, net, frame)
    words = f"the dense token maps of the official code and ours differ by {difference:.1e} of the largest value"
    if not difference <= PEER_TOLERANCE:
        raise UserError(f"{words}; at most {PEER_TOLERANCE:.0e} is accepted")
    return f"{words[0].upper()}{words[1:]} (accepted: {PEER_TOLERANCE:.0e})."
