"""Label maps: other names for a detector's classes, and classes that it shall not report."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from eventful_det.detectors.vitdet.config import ModelConfig
from eventful_det.errors import UserError

LabelMap = Mapping[str, str | None]
_EXAMPLE = '{"domestic_cat": "cat", "person": null}: a new name, or null to drop the class'


def read_labels(path: str | os.PathLike[str]) -> LabelMap:
    """Read a label map: a JSON object like `{"domestic_cat": "cat", "person": null}`.

    Raises:
        UserError: the file is missing or no such object.
    """
    try:
        labels = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read the label map {path}: {error.strerror}; expected {_EXAMPLE}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"the label map {path} is not valid JSON ({error}); expected {_EXAMPLE}") from None
    if not isinstance(labels, dict) or not all(
        name is None or (isinstance(name, str) and name) for name in labels.values()
    ):
        raise UserError(f"{path} is not a label map; expected a JSON object like {_EXAMPLE}")
    return labels


def relabel(config: ModelConfig, labels: LabelMap) -> ModelConfig:
    """A config whose classes have other names, or are dropped from the results.

    Args:
        config: of a detector.
        labels: new name, or None to drop, by present name; classes that are not in it stay as they are.

    Raises:
        UserError: the detector has no such class, or two classes would have one name.
    """
    names, dropped = renamed(config.classes, labels)
    return dataclasses.replace(config, classes=names, dropped=(*config.dropped, *dropped))


def renamed(classes: Sequence[str], labels: LabelMap) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The new names of classes, and those of them that are dropped; see `relabel`."""
    unknown = sorted(set(labels) - set(classes))
    if unknown:
        raise UserError(f"label map: no class {', '.join(unknown)}; the weights know {', '.join(classes)}")
    names = tuple(labels.get(name, name) or name for name in classes)
    return names, tuple(new for old, new in zip(classes, names, strict=True) if labels.get(old, old) is None)
