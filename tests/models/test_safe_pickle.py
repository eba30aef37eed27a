"""Pickles of arrays are read; pickles that ask for more are refused before anything runs."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import shutil
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eventful_det.errors import UserError
from eventful_det.models.safe_pickle import load_pickle

CONTENT = {
    "model": OrderedDict(
        a=np.arange(6, dtype=np.float32).reshape(2, 3),
        fortran=np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        half=np.array([1.5, -2.0], np.float16),
        whole=np.array(7),
        flags=np.array([True, False]),
        foreign=np.array([1, 2, 3], dtype=">i4"),
        empty=np.zeros((0, 4), np.float32),
    ),
    "__author__": "someone",
    "numbers": [1, 2.5, None, True, (3, b"bytes")],
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_every_protocol(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(CONTENT, protocol))
    found = load_pickle(path)
    assert found["__author__"] == "someone" and found["numbers"] == CONTENT["numbers"]
    assert list(found["model"]) == list(CONTENT["model"])
    for name, array in CONTENT["model"].items():
        expected = torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))
        assert torch.equal(found["model"][name], expected) and found["model"][name].dtype == expected.dtype


def test_names_of_an_older_numpy_and_strings_of_python_2(tmp_path: Path) -> None:
    old = pickle.dumps({"a": np.arange(200, 204, dtype=np.uint8)}, 2).replace(b"cnumpy._core.", b"cnumpy.core.")
    assert b"numpy.core.multiarray" in old
    (tmp_path / "old.pkl").write_bytes(old)
    assert load_pickle(tmp_path / "old.pkl")["a"].tolist() == [200, 201, 202, 203]
    raw = b"(dp0\nS'a'\np1\nS'\\xe9'\np2\ns."
    (tmp_path / "older.pkl").write_bytes(raw)
    assert load_pickle(tmp_path / "older.pkl") == {"a": "é"}


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


EVIL: dict[str, Any] = {
    "system": Call(os.system, "touch pwned"),
    "subprocess": Call(subprocess.call, ["touch", "pwned"]),
    "eval": Call(eval, "open('pwned', 'w')"),
    "getattr": Call(getattr, Call(__import__, "os"), "system"),
    "open": Call(builtins.open, "pwned", "w"),
    "remove": Call(shutil.rmtree, "precious"),
    "a class": Path("pwned"),
    "objects in an array": np.array([Call(os.system, "touch pwned")], dtype=object),
    "an array of objects": np.array([None], dtype=object),
    "records": np.zeros(2, dtype=[("a", "f4"), ("b", "O")]),
    "a scalar": np.float32(1.0),
    "a tensor": torch.zeros(1),
    "an encoding": pickle.PicklingError,
}


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_anything_else_is_refused_before_it_runs(
    name: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious").mkdir()
    content = {"model": {"a": np.zeros(3), "b": [EVIL[name]]}, "__author__": "someone"}
    Path("evil.pkl").write_bytes(pickle.dumps(content, protocol))
    before = sorted(os.listdir())
    with pytest.raises(UserError, match=r"evil.pkl is refused: it asks for ") as error:
        load_pickle("evil.pkl")
    assert "\n" not in str(error.value)
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(S'touch pwned'\ntR.",
        b"(S'touch pwned'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch pwned'\no.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch pwned\x85R.",
        b"Preference\n.",
        b"c_codecs\nencode\n(S'x'\nS'zip'\ntR.",
        b"cnumpy\nndarray\n.",
        b"cnumpy\ndtype\n(S'V8'\ntR.",
        b"ccollections\nOrderedDict\n.",
    ],
)
def test_opcodes_by_hand(code: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.pkl").write_bytes(code)
    with pytest.raises(UserError, match="is refused: it asks for"):
        load_pickle("evil.pkl")
    assert os.listdir() == ["evil.pkl"]


def test_truncated_and_foreign_files_are_one_line(tmp_path: Path) -> None:
    whole = pickle.dumps(CONTENT, 4)
    picture = io.BytesIO(b"\xff\xd8\xff\xe0\x00\x10JFIF")
    foreign = [b"", b"hello\n", picture.getvalue(), b"{}", b"\x80\x09.", b"N", b"0.", b"\x80\x04\x8e" + b"\xff" * 8]
    for data in [*(whole[:end] for end in range(0, len(whole) - 1, 13)), *foreign]:
        path = tmp_path / "cut.pkl"
        path.write_bytes(data)
        with pytest.raises(UserError, match="not a whole pickle of arrays|is refused") as error:
            load_pickle(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot read .*nowhere.pkl: No such file"):
        load_pickle(tmp_path / "nowhere.pkl")


def test_arrays_that_lie_about_their_size(tmp_path: Path) -> None:
    data = pickle.dumps({"a": np.arange(6, dtype=np.int8)}, 2)
    shape = b"K\x06\x85"  # (6,)
    assert shape in data
    (tmp_path / "lie.pkl").write_bytes(data.replace(shape, b"K\x7f\x85"))
    with pytest.raises(UserError, match="not a whole pickle of arrays"):
        load_pickle(tmp_path / "lie.pkl")
