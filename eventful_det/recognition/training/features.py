"""The paper's second stage of training: temporal model and heads learn from cached outputs of the spatial model.

The spatial model runs once over all clips, gated as it will be when it is used (`cache_features`, `cache_views`); the
rest learns from what it gave (`FeatureClips`). Budgets are drawn anew for each clip, so that it learns them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.files import written_whole
from eventful_det.gating.dense import Dense
from eventful_det.gating.rules import DEFAULT_RULE
from eventful_det.recognition.clips import recognise, spatial_outputs
from eventful_det.recognition.data.clip_reader import read_clips
from eventful_det.recognition.data.segments import Segments
from eventful_det.recognition.evaluation import Way
from eventful_det.recognition.recogniser import Recogniser
from eventful_det.recognition.session import DEFAULT
from eventful_det.recognition.training.samples import Labels, Sample, Samples

_TOGETHER = 16  # clips that run as streams of one step


def gated_ways(budgets: Sequence[float]) -> list[Way]:
    """Ways of running the spatial model with a share of the tokens; 1 = dense."""
    return [
        Way(f"{budget:g}", Dense() if budget == 1 else DEFAULT_RULE, DEFAULT.within(float(budget)))
        for budget in budgets
    ]


class FeatureClips:
    """Cached spatial outputs; in an order drawn anew for each round.

    Args:
        folder: of the files.
        seed: of the order and the noise.
        noise: standard deviation of what is added to them.
    """

    def __init__(self, folder: Path, seed: int = 0, noise: float = 0.0) -> None:
        self.files = sorted(folder.glob("*.npz"))
        self.seed, self.noise = seed, noise
        if not self.files:
            raise UserError(f"no cached features in {folder}; write them first")

    def sample(self, n: int) -> Sample:
        """See `Samples`."""
        count = len(self.files)
        order = np.random.default_rng([self.seed, n // count]).permutation(count)
        features, labels = read_features(self.files[order[n % count]])
        noise = np.random.default_rng([self.seed, n, 13]).standard_normal(features.shape, np.float32)
        return features + self.noise * torch.from_numpy(noise), labels, None


def cache_features(
    recogniser: Recogniser,
    segments: Segments,
    folder: Path,
    ways: Sequence[Way],
    seed: int = 0,
    on_clip: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """Run the spatial model over all views of all clips and write what it gives, a file for each clip.

    Files that are there already are kept, so that an interrupted run goes on. Each holds `spatial (V, T', D)` in half
    precision and a label for each head.

    Args:
        recogniser: in evaluation mode.
        segments: labelled clips.
        folder: of the files.
        ways: of running the spatial model, of which each clip gets one; those that will be used.
        seed: of their choice.
        on_clip: told how many clips are done.

    Returns:
        Segments that could not be read, and why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failed = {}
    for done, i in enumerate(_missing(folder, len(segments)), 1):
        way = ways[_drawn(seed, i, len(ways))]
        ((segment, clip),) = read_clips(segments.items[i : i + 1], recogniser.config, way.shared)
        if isinstance(clip, UserError):
            failed[segment.name] = str(clip)
        else:
            result = recognise(recogniser, clip, rule=way.rule, selector=way.selector, shared=way.shared, hold=way.hold)
            _write(folder, i, result.features, segment.labels)
        if on_clip is not None:
            on_clip(done)
    return failed


def cache_views(
    recogniser: Recogniser,
    samples: Samples,
    count: int,
    folder: Path,
    ways: Sequence[Way],
    seed: int = 0,
    on_clip: Callable[[int], None] | None = None,
) -> None:
    """The same for the first `count` views of samples, as many streams side by side: `spatial (1, T', D)` each."""
    folder.mkdir(parents=True, exist_ok=True)
    done = 0
    for group in _groups(_missing(folder, count), _TOGETHER):
        way = ways[_drawn(seed, group[0], len(ways))]
        views, labels, _ = zip(*(samples.sample(i) for i in group), strict=True)
        frames = recogniser.tubelets(torch.stack(views).to(recogniser.device))  # (B, T', c * tt, h, w)
        with torch.no_grad():
            outputs, _ = spatial_outputs(recogniser, frames, way.rule, way.selector, way.hold)
        for i, features, own in zip(group, outputs, labels, strict=True):
            _write(folder, i, features[None], own)
        done += len(group)
        if on_clip is not None:
            on_clip(done)


def _missing(folder: Path, count: int) -> list[int]:
    return [i for i in range(count) if not (folder / f"{i:06d}.npz").is_file()]


def _groups(numbers: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    return (numbers[i : i + size] for i in range(0, len(numbers), size))


def _drawn(seed: int, i: int, count: int) -> int:
    return int(np.random.default_rng([seed, i, 17]).integers(count))


def _write(folder: Path, i: int, features: Tensor, labels: Mapping[str, int]) -> None:
    named = {f"label_{head}": np.array(label) for head, label in labels.items()}
    with written_whole(folder / f"{i:06d}.npz") as part, part.open("wb") as file:
        np.savez(file, allow_pickle=False, spatial=features.to(torch.float16).cpu().numpy(), **named)


def read_features(path: Path) -> tuple[Tensor, Labels]:
    """A file of `cache_features`, or of the official code's `spatial` scripts: `(V, T', D)`, and labels."""
    try:
        with np.load(path, allow_pickle=False) as data:
            features = torch.from_numpy(data["spatial"]).float()
            labels = {key.removeprefix("label_"): int(data[key]) for key in data.files if key.startswith("label_")}
            if "label" in data.files:
                labels[""] = int(data["label"])  # of the first head
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} holds no cached features ({error})") from None
    return features, labels
