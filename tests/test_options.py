"""Options are held to the types and ranges of their annotations."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from eventful_det.errors import UserError
from eventful_det.files import written_whole
from eventful_det.options import Count, NonNegative, Positive, Share, convert, convert_fields, from_values


@dataclass(frozen=True)
class Inner:
    size: tuple[Count, Count] = (1, 1)


@dataclass(frozen=True)
class Options:
    steps: Count = 3
    rate: Positive = 0.1
    weight: NonNegative = 0.0
    share: Share = 0.5
    flag: bool = False
    name: str | None = None
    kind: Literal["cosine", "step"] = "cosine"
    marks: tuple[Share, ...] = ()
    pair: tuple[Share, Share] = (0.0, 1.0)
    factors: Mapping[str, Positive] = field(default_factory=dict)
    inner: Inner = Inner()  # noqa: RUF009

    def __post_init__(self) -> None:
        convert_fields(self, "train")


def test_values_become_what_their_type_says() -> None:
    plain = {"steps": 1e3, "rate": np.float32(0.5), "flag": "no", "marks": [0, 1], "inner": {"size": [2, 3]}}
    made = from_values(Options, plain, "train")
    assert made == Options(steps=1000, rate=0.5, marks=(0.0, 1.0), inner=Inner((2, 3)))
    assert type(made.steps) is int and type(made.marks[0]) is float and made.flag is False
    words = ("off", "0", "FALSE", "yes", "on", "1", True)
    assert type(convert(1.0, int | float, "x")) is float and type(convert(1, float | int, "x")) is int
    assert [convert(word, bool, "x") for word in words] == [False] * 3 + [True] * 4


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("steps", "abc", "a whole number of at least 1, got 'abc'"),
        ("steps", 0, "a whole number of at least 1, got 0"),
        ("steps", 1.5, "a whole number"),
        ("steps", True, "a whole number"),
        ("steps", math.nan, "a whole number"),
        ("steps", None, "a whole number"),
        ("rate", -1, "a number above 0, got -1"),
        ("rate", math.nan, "a number above 0"),
        ("rate", math.inf, "a number above 0"),
        ("rate", 10**400, "a number above 0"),
        pytest.param("rate", 10**5000, "a number above 0", id="huge"),
        ("weight", -1e-9, "a number of at least 0"),
        ("share", 1.01, "a number from 0 to 1"),
        ("flag", "maybe", "true or false"),
        ("flag", 1, "true or false, got 1"),
        ("name", 5, "text or null"),
        ("kind", "linear", "'cosine' or 'step', got 'linear'"),
        ("kind", ["cosine"], "'cosine' or 'step'"),
        ("marks", "abc", "a list, each a number from 0 to 1"),
        ("pair", [0.1], "a list of 2"),
        ("factors", [1], "a group of options"),
        ("inner", 3, "a group of options"),
    ],
)
def test_one_line_names_the_option(key: str, value: Any, wanted: str) -> None:
    for make in (lambda: from_values(Options, {key: value}, "train"), lambda: Options(**{key: value})):
        with pytest.raises(UserError) as error:
            make()
        assert str(error.value).startswith(f"train.{key} must be ") and wanted in str(error.value)
        assert len(str(error.value)) < 200 and "\n" not in str(error.value)


def test_the_place_inside_of_lists_and_mappings_is_named() -> None:
    for values, place in (
        ({"marks": [0.5, 2]}, r"train.marks\[1\] must be"),
        ({"factors": {"car": "many"}}, "train.factors.car must be"),
        ({"inner": {"size": [1, 0]}}, r"train.inner.size\[1\] must be"),
        ({"stepz": 1}, "train: unknown option 'stepz'; did you mean steps?"),
        ({"qqq": 1}, "train: unknown option 'qqq'; known: factors, flag"),
    ):
        with pytest.raises(UserError, match=place):
            from_values(Options, values, "train")


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    with written_whole(path) as part:
        part.write_text("first")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), written_whole(path) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "first" and os.listdir(path.parent) == ["a.json"]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="cannot write .*a.json: No space left"),
        written_whole(tmp_path / "a.json") as part,
    ):
        part.write_text("half")
        raise OSError(28, os.strerror(28))
    with pytest.raises(UserError, match="cannot write .*/a.txt/b.json: "):
        (tmp_path / "a.txt").touch()
        with written_whole(tmp_path / "a.txt" / "b.json"):
            pass
    assert os.listdir(tmp_path) == ["a.txt"]
