"""Accuracy of action recognition: top-1 and top-5, per class, unseen participants, tail classes; submissions."""

from __future__ import annotations

import heapq
import itertools
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.files import written_whole
from eventful_det.recognition.data.segments import Segment

Among = Callable[[Segment, str], bool]  # whether a segment counts, for a head
ACTION = "action"  # verb and noun together
_PAIRS = 100  # actions of a submission


@dataclass(frozen=True)
class Scored:
    """A segment and what it is taken for.

    Attributes:
        segment: with its labels.
        scores: of each head `(classes,)`, larger = likelier; logits.
    """

    segment: Segment
    scores: Mapping[str, Tensor]


@dataclass(frozen=True)
class Accuracy:
    """Shares in percent.

    Attributes:
        top1, top5: the label is the first, or among the first five.
        count: segments that were looked at.
    """

    top1: float
    top5: float
    count: int


def best_actions(verbs: Tensor, nouns: Tensor, count: int) -> list[tuple[int, int, float]]:
    """The likeliest pairs of verb and noun, by the product of their probabilities.

    Args:
        verbs, nouns: logits `(classes,)`.
        count: of pairs.
    """
    verb, noun = (scores.float().log_softmax(-1).sort(descending=True, stable=True) for scores in (verbs, nouns))
    firsts = zip(verb.values[:count].tolist(), verb.indices[:count].tolist(), strict=True)
    seconds = list(zip(noun.values[:count].tolist(), noun.indices[:count].tolist(), strict=True))
    pairs = ((p + q, -v, -n) for (p, v), (q, n) in itertools.product(firsts, seconds))
    return [(-v, -n, p) for p, v, n in heapq.nlargest(count, pairs)]


def ranks(scored: Scored) -> dict[str, int]:
    """How many classes are likelier than the label, for each head with a label, and for verb and noun together."""
    found = {}
    for head, label in scored.segment.labels.items():
        if head in scored.scores:
            scores = scored.scores[head]
            if label >= len(scores):
                raise UserError(f"{scored.segment.name}: {head} {label} is no class of the recogniser ({len(scores)})")
            better = scores > scores[label]
            found[head] = int(better.sum()) + int((scores[:label] == scores[label]).sum())
    if {"verb", "noun"} <= found.keys():
        action = scored.segment.labels["verb"], scored.segment.labels["noun"]
        pairs = [(v, n) for v, n, _ in best_actions(scored.scores["verb"], scored.scores["noun"], 5)]
        found[ACTION] = pairs.index(action) if action in pairs else len(pairs)
    return found


def accuracy(scored: Sequence[Scored], among: Among | None = None) -> dict[str, Accuracy]:
    """Top-1 and top-5 of each head, and of verb and noun together.

    Args:
        scored: segments without a label of a head do not count for it.
        among: only segments of which this is true, given the head.
    """
    found: dict[str, list[int]] = {}
    for item in scored:
        for head, rank in ranks(item).items():
            if among is None or among(item.segment, head):
                found.setdefault(head, []).append(rank)
    return {head: _shares(values) for head, values in found.items()}


def _shares(values: Sequence[int]) -> Accuracy:
    top1, top5 = (100 * sum(rank < k for rank in values) / len(values) for k in (1, 5))
    return Accuracy(top1, top5, len(values))


def per_class(scored: Sequence[Scored]) -> dict[str, dict[int, Accuracy]]:
    """Accuracy for each class of each head that has a segment."""
    found: dict[str, dict[int, list[int]]] = {}
    for item in scored:
        for head, rank in ranks(item).items():
            if head != ACTION or head in item.segment.labels:
                found.setdefault(head, {}).setdefault(item.segment.labels[head], []).append(rank)
    return {head: {label: _shares(r) for label, r in sorted(of.items())} for head, of in found.items()}


def unseen(participants: Collection[str]) -> Among:
    """For `accuracy`: segments of some participants, such as those that the training set does not show."""
    return lambda segment, head: segment.participant in participants


def tail(verbs: Collection[int], nouns: Collection[int]) -> Among:
    """For `accuracy`: segments of rare classes; an action is rare if its verb or its noun is."""

    def among(segment: Segment, head: str) -> bool:
        rare = {"verb": segment.labels.get("verb") in verbs, "noun": segment.labels.get("noun") in nouns}
        return rare.get(head, any(rare.values()))

    return among


def write_submission(
    path: str | os.PathLike[str],
    scored: Sequence[Scored],
    *,
    pretraining: int = 0,
    labels: int = 0,
    data: int = 0,
) -> None:
    """Write scores as the EPIC-Kitchens 100 action recognition challenge takes them.

    Args:
        path: of the JSON file, to be zipped as `test.json`.
        scored: segments of the test set with scores of verbs and nouns.
        pretraining, labels, data: levels of supervision, 0 to 5 (`sls_pt`, `sls_tl`, `sls_td`).

    Raises:
        UserError: a segment has no scores of verbs and nouns, or the file cannot be written.
    """
    results = {}
    for item in scored:
        if not {"verb", "noun"} <= item.scores.keys():
            raise UserError(
                f"{item.segment.name} has scores of {', '.join(item.scores)}; the challenge takes verb and noun"
            )
        verbs, nouns = item.scores["verb"], item.scores["noun"]
        results[item.segment.name] = {
            "verb": {str(i): value for i, value in enumerate(verbs.tolist())},
            "noun": {str(i): value for i, value in enumerate(nouns.tolist())},
            "action": {f"{v},{n}": value for v, n, value in best_actions(verbs, nouns, _PAIRS)},
        }
    content = {
        "version": "0.2",
        "challenge": "action_recognition",
        "sls_pt": pretraining,
        "sls_tl": labels,
        "sls_td": data,
        "results": results,
    }
    with written_whole(Path(path)) as part:
        part.write_text(json.dumps(content), encoding="utf-8")
