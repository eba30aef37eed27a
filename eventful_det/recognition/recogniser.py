"""The recogniser: a factorised ViViT whose spatial model is eventful, for whole clips and for streams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from eventful_det.data.source import Source
from eventful_det.detectors.gated import priced_statically
from eventful_det.detectors.protocol import CostModel
from eventful_det.detectors.stopwatch import Stopwatch
from eventful_det.errors import UserError
from eventful_det.gating.macs import RowsCosts
from eventful_det.gating.rules import DEFAULT_RULE, AnyRule, step_streams
from eventful_det.gating.selector import Budget, Select, Selector
from eventful_det.gating.spec import ViTSpec
from eventful_det.gating.state import State, StreamState, Update
from eventful_det.gating.windows import Grid
from eventful_det.recognition.config import RecogniserConfig
from eventful_det.recognition.layers import SubModel, TubeletEmbedding
from eventful_det.recognition.results import RecogniserStream, RecognitionStep, StepCost
from eventful_det.recognition.session import DEFAULT, RecognitionSession
from eventful_det.recognition.stream import RecognitionStream
from eventful_det.runtime.budget import BudgetOptions
from eventful_det.runtime.session import StreamOptions


class Recogniser(nn.Module):
    """A factorised ViViT: tubelets, a spatial model for each of them, a temporal model over its outputs, and heads.

    Attributes:
        config: what it is made of.
        spec: the spatial model as the update rules see it; its frames are tubelets of `c * tt` channels.
        embedding, spatial_model, temporal_model, classifier: under the official names.
        other_classifiers: of the heads behind the first.
    """

    def __init__(self, config: RecogniserConfig) -> None:
        super().__init__()
        config.check_sizes()
        self.config = config
        self.embedding = TubeletEmbedding(config.channels, config.dim, config.tubelet)
        self.spatial_model = SubModel(config.position_grid, config.dim, config.depth, config.heads, config.mlp)
        sizes = config.dim, config.temporal_depth, config.temporal_heads, config.temporal_mlp
        self.temporal_model = SubModel((1, config.steps), *sizes)
        first, *others = config.classes
        self.classifier = nn.Linear(config.dim, len(config.classes[first]))
        self.other_classifiers = nn.ModuleDict(
            {head: nn.Linear(config.dim, len(config.classes[head])) for head in others}
        )
        self.dropout = nn.Dropout(config.dropout)
        self.apply(_initialise)
        # Spatial outputs vary by about 3: next to them small positions cannot be seen, and order is not learned.
        nn.init.normal_(self.temporal_model.backbone.position_encoding.encoding)
        self.spec = ViTSpec(
            projection=self.embedding,
            positions=self.spatial_model.positions,
            prefix=self.spatial_model.prefix,
            blocks=self.spatial_model.blocks(),
            norm=self.spatial_model.layer_norm,
            layout="sequence",
        )

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.classifier.weight.device

    def classifiers(self) -> Iterator[tuple[str, nn.Linear]]:
        """The heads by name, the main one first."""
        first, *others = self.config.classes
        yield first, self.classifier
        for head in others:
            yield head, cast(nn.Linear, self.other_classifiers[head])

    # Whole clips

    def tubelets(self, views: Tensor) -> Tensor:
        """Normalised views `(B, t, c, h, w)` as `(B, T', c * tt, h, w)`, the channel outside and time inside."""
        x = views.unflatten(1, (-1, self.config.tubelet[0]))  # (B, T', tt, c, h, w)
        return x.transpose(2, 3).flatten(2, 3)

    def spatial(self, views: Tensor) -> Tensor:
        """The dense spatial model on normalised views `(B, t, c, h, w)`: its outputs `(B, T', D)`."""
        x = self.embedding(self.tubelets(views).flatten(0, 1))  # (B * T', D, H, W)
        outputs = self.spatial_model(x.flatten(2).mT, (x.shape[2], x.shape[3]))
        return outputs.unflatten(0, (len(views), -1))

    def temporal(self, outputs: Tensor) -> dict[str, Tensor]:
        """Logits `(B, classes)` of each head from spatial outputs `(B, T', D)`.

        Raises:
            UserError: they are not as many as the temporal positions.
        """
        if outputs.shape[1] != self.config.steps:
            raise UserError(
                f"got {outputs.shape[1]} spatial outputs a view; the temporal model takes {self.config.steps}"
            )
        feature = self.dropout(self.temporal_model(outputs))
        return {head: classifier(feature) for head, classifier in self.classifiers()}

    def forward(self, views: Tensor) -> dict[str, Tensor]:
        """The dense recogniser on normalised views `(B, t, c, h, w)`: logits `(B, classes)` of each head."""
        return self.temporal(self.spatial(views))

    # Streams

    def init_state(self, batch: int = 1) -> State[RecogniserStream]:
        """An empty state for `batch` streams."""
        return State([None] * batch)

    def normalise(self, tubelet: Tensor) -> Tensor:
        """A tubelet `(tt, c, h, w)`, RGB in [0, 1], as a frame `(c * tt, h, w)` of the spatial model.

        Raises:
            UserError: it is of another shape or type.
        """
        frames, channels = self.config.tubelet[0], self.config.channels
        if tubelet.dim() != 4 or tubelet.shape[:2] != (frames, channels) or not tubelet.is_floating_point():
            raise UserError(
                f"got a tubelet of {tubelet.dtype} {tuple(tubelet.shape)}; "
                f"expected ({frames}, {channels}, height, width) of floating point, RGB in [0, 1]"
            )
        mean, std = (tubelet.new_tensor(values).view(-1, 1, 1) for values in (self.config.mean, self.config.std))
        return ((tubelet - mean) / std).transpose(0, 1).flatten(0, 1).to(self.classifier.weight.dtype)

    @torch.inference_mode(False)  # so that the state can go on in and outside of inference mode
    @torch.no_grad()
    def step(
        self,
        frames: Tensor | Sequence[Tensor],
        state: State[RecogniserStream],
        *,
        rule: AnyRule = DEFAULT_RULE,
        selector: Select = DEFAULT,
        flush: Sequence[bool] | bool = False,
        timing: bool = False,
    ) -> list[RecognitionStep]:
        """Process the next tubelet of every stream.

        The temporal model sees a sliding window of the last T' spatial outputs. Until that is full, the newest output
        is repeated, as a short clip is extended by its last frame. The spatial state goes on from window to window.

        Args:
            frames: tubelets `(tt, c, h, w)` of each stream, RGB in [0, 1]; sizes may differ, and the temporal model
                does not mind.
            state: of the streams, updated in place.
            rule: how tokens are recomputed.
            selector: which tokens are recomputed.
            flush: streams that begin anew: everything is recomputed, and their windows are empty.
            timing: measure the seconds of each part, for which a GPU is waited for once.

        Raises:
            UserError: the numbers of tubelets and streams differ, or a tubelet has another shape or type.
        """
        stopwatch = Stopwatch(self.device, timing)
        tubelets = [self.normalise(tubelet) for tubelet in frames]
        spatial: State[StreamState] = State([None if stream is None else stream.spatial for stream in state.streams])
        stopwatch.lap("other")
        updates = self.spatial_step(tubelets, spatial, rule=rule, selector=selector, flush=flush)
        stopwatch.lap("backbone")
        features = [cast(Tensor, update.prefix)[0].clone() for update in updates]  # (D,) each
        windows = []
        for i, (update, feature) in enumerate(zip(updates, features, strict=True)):
            stream = state.streams[i]
            if stream is None:
                stream = state.streams[i] = RecogniserStream(
                    None, feature.new_zeros(self.config.steps, len(feature)), 0
                )
            stream.spatial = spatial.streams[i]
            windows.append(_slide(stream, feature, update.flush))
        logits = self.temporal(torch.stack(windows))
        stopwatch.lap("temporal")
        seconds = {part: value / len(updates) for part, value in stopwatch.seconds().items()}
        return [
            RecognitionStep(
                logits={head: values[i] for head, values in logits.items()},
                feature=feature,
                cost=self.cost(update, seconds=seconds),
                work=update.work.view(update.tokens.shape[:2]),
            )
            for i, (update, feature) in enumerate(zip(updates, features, strict=True))
        ]

    @property
    def selector(self) -> Selector:
        """What is selected in streams unless they are told."""
        return DEFAULT

    def session(self, *, name: str, scene_cuts: bool, options: StreamOptions | None = None) -> RecognitionSession:
        """A session for one stream, see `RecognitionSession`."""
        state = self.init_state()
        return RecognitionSession(self.config, state, self.device, name=name, scene_cuts=scene_cuts, options=options)

    def stream(
        self,
        source: Source,
        *,
        budget: Budget | Selector = None,
        options: BudgetOptions | None = None,
        rule: AnyRule = DEFAULT_RULE,
        max_steps: int | None = None,
        scene_cuts: bool = True,
        timing: bool = False,
    ) -> RecognitionStream:
        """Recognise what happens in a video, tubelet by tubelet; see `RecognitionStream`."""
        return RecognitionStream(
            self,
            source,
            budget=budget,
            options=options,
            rule=rule,
            max_steps=max_steps,
            scene_cuts=scene_cuts,
            timing=timing,
        )

    def spatial_step(
        self,
        frames: Sequence[Tensor],
        state: State[StreamState],
        *,
        rule: AnyRule = DEFAULT_RULE,
        selector: Select = DEFAULT,
        flush: Sequence[bool] | bool = False,
    ) -> list[Update]:
        """The spatial model alone on normalised tubelets `(c * tt, h, w)`; its output is the one row of `prefix`.

        `state` is of the spatial model, empty ones are `State([None] * streams)`; the rest is as for `step`.
        """
        if self.embedding.kernel_size[0] != self.embedding.kernel_size[1]:
            raise UserError(f"steps need square tubelets, not {self.embedding.kernel_size} pixels; use `forward`")
        return step_streams(self.spec, frames, state, rule=rule, selector=selector, flush=flush)

    def window_macs(self) -> dict[str, int]:
        """Multiply-adds of the temporal model and of the heads on one window."""
        heads = sum(classifier.weight.numel() for _, classifier in self.classifiers())
        return {"temporal": self.temporal_model.macs(), "heads": heads}

    def cost_model(self, rule: AnyRule) -> RecogniserCosts:
        """What steps will cost under a rule, see `CostModel`.

        Raises:
            UserError: that is known under `Rows` only.
        """
        static = priced_statically(rule, self.device)
        return RecogniserCosts(RowsCosts(self.spec.shape, static), sum(self.window_macs().values()))

    def cost(self, update: Update, windows: int = 1, seconds: Mapping[str, float] | None = None) -> StepCost:
        """Of an update of the spatial model, and of so many windows that the temporal model looks at."""
        rows, cols = update.tokens.shape[:2]
        window = {part: windows * macs for part, macs in self.window_macs().items()}
        embedding = rows * cols * self.embedding.weight.numel()
        dense = {"backbone": embedding + self.spatial_model.macs((rows, cols)), **window}
        macs = {"backbone": update.macs.total, **window}
        return StepCost(macs, dense, len(update.changed), rows * cols, update.flush, dict(seconds or {}))


@dataclass(frozen=True)
class RecogniserCosts(CostModel):
    """A `CostModel`: all of it is known in advance.

    Attributes:
        rows: of the spatial model.
        window: MACs of the temporal model and the heads.
    """

    rows: RowsCosts
    window: int

    @property
    def variable(self) -> str:
        """The heads, which cost the same whatever they see."""
        return "heads"

    def macs(self, grid: Grid, order: Tensor, variable: int | None = None) -> Tensor:  # noqa: ARG002
        """See `CostModel.macs`."""
        return self.rows.macs(grid, order) + self.window


def _slide(stream: RecogniserStream, feature: Tensor, begins: bool) -> Tensor:
    """Put a spatial output `(D,)` into the window of its stream; returns the window `(T', D)` without gaps.

    Example: a window of four outputs holds a, b and c; with d it is a b c d, and with e it is b c d e. One that holds a
    alone is seen as a a a a.
    """
    stream.seen = 0 if begins else stream.seen
    if stream.seen == len(stream.window):
        stream.window = stream.window.roll(-1, 0)
        stream.seen -= 1
    stream.window[stream.seen] = feature
    stream.seen += 1
    window = stream.window.clone()
    window[stream.seen :] = feature
    return window


def _initialise(module: nn.Module) -> None:
    if isinstance(module, SubModel):
        nn.init.trunc_normal_(module.class_token, std=0.02)
        nn.init.trunc_normal_(module.backbone.position_encoding.encoding, std=0.02)
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
