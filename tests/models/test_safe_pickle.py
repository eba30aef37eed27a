"""Pickles of arrays are read; pickles that ask for more are refused before anything runs."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import shutil
import subprocess
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eventful_det.detectors.checkpoints.safe_pickle import read_pickle, stored
from eventful_det.detectors.checkpoints.weight_files import read_tensors
from eventful_det.errors import UserError

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
    "numbers": [1, 2.5, None, True, (3, 2**40)],
}


def load(data: bytes) -> Any:
    """What a pickle holds, tensors in place of their records."""

    def plain(node: Any) -> Any:
        if (record := stored(node)) is not None:
            return record.tensor(lambda storage: b"")
        return {key: plain(value) for key, value in node.items()} if isinstance(node, dict) else node

    return plain(read_pickle(io.BytesIO(data)))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_every_protocol(protocol: int) -> None:
    found = load(pickle.dumps(CONTENT, protocol))
    assert found["__author__"] == "someone" and found["numbers"] == CONTENT["numbers"]
    assert list(found["model"]) == list(CONTENT["model"])
    for name, array in CONTENT["model"].items():
        expected = torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))
        assert torch.equal(found["model"][name], expected) and found["model"][name].dtype == expected.dtype


def test_names_of_an_older_numpy_and_strings_of_python_2() -> None:
    old = pickle.dumps({"a": np.arange(200, 204, dtype=np.uint8)}, 2).replace(b"cnumpy._core.", b"cnumpy.core.")
    assert b"numpy.core.multiarray" in old
    assert load(old)["a"].tolist() == [200, 201, 202, 203]
    assert load(b"\x80\x02}U\x01aU\x01\xe9s.") == {"a": "é"}


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
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_anything_else_is_refused_before_it_runs(
    name: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious").mkdir()
    content = {"model": {"a": np.zeros(3), "b": [EVIL[name]]}, "__author__": "someone"}
    Path("evil.pkl").write_bytes(pickle.dumps(content, protocol))
    before = sorted(os.listdir())
    with pytest.raises(UserError, match=r"evil.pkl is refused: it asks for ") as error:
        read_tensors("evil.pkl")
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
        b"cnumpy\ndtype\n(S'V8'\ntR.",
        b"}(]Nu.",  # a list as a key
        b"}((NtNu.",  # a tuple
        b"}(G\x7f\xf0\x00\x00\x00\x00\x00\x00Nu.",  # a float
        b"\x80\x02}\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x1fNs.",  # a number whose hash that of others may be
        b"\x82\x01.",  # a name of the reader's
        b"]]\x81.",  # a call of a list
    ],
)
def test_opcodes_by_hand(code: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.pkl").write_bytes(code)
    with pytest.raises(UserError, match="is refused: it asks for"):
        read_tensors("evil.pkl")
    assert os.listdir() == ["evil.pkl"]


def test_truncated_and_foreign_files_are_one_line(tmp_path: Path) -> None:
    whole = pickle.dumps(CONTENT, 4)
    picture = io.BytesIO(b"\xff\xd8\xff\xe0\x00\x10JFIF")
    foreign = [
        b"",
        b"hello\n",
        picture.getvalue(),
        b"{}",
        b"\x80\x09.",
        b"N",
        b"N.",
        b"0.",
        b"\x80\x04\x8e" + b"\xff" * 8,
    ]
    for data in [*(whole[:end] for end in range(0, len(whole) - 1, 13)), *foreign]:
        path = tmp_path / "cut.pkl"
        path.write_bytes(data)
        with pytest.raises(UserError, match="not a whole file of weights|is refused|no named tensors") as error:
            read_tensors(path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    with pytest.raises(UserError, match=r"no weights file .*nowhere.pkl"):
        read_tensors(tmp_path / "nowhere.pkl")


def test_arrays_that_lie_about_their_size(tmp_path: Path) -> None:
    data = pickle.dumps({"a": np.arange(6, dtype=np.int8)}, 2)
    shape = b"K\x06\x85"  # (6,)
    assert shape in data
    (tmp_path / "lie.pkl").write_bytes(data.replace(shape, b"K\x7f\x85"))
    with pytest.raises(UserError, match="not a whole file of weights"):
        read_tensors(tmp_path / "lie.pkl")


def nested(leaf: bytes, wide: bytes, levels: int) -> bytes:
    """A small pickle of a container in which each level holds the one below many times: `wide ** levels` leaves."""
    code = leaf + b"\x94"
    for level in range(levels):
        code += wide.replace(b"@", b"h" + bytes([level])) + b"\x94"
    return code


# A tuple of two tuples of two tuples ...: whoever prints, hashes or compares it never ends.
LAUGHS = b")q\x00" + b"".join(b"0h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
LEGACY = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}, {}))
BOMBS = {
    "lists": b"\x80\x04}\x8c\x05model" + nested(b"]", b"](@@@@@@@@@@e", 60) + b"s.",
    "tuples": b"\x80\x04}\x8c\x05model" + nested(b")", b"(@@@@@@@@@@t", 60) + b"s.",
    "dictionaries": b"\x80\x04}\x8c\x05model" + nested(b"}", b"}(K\x01@K\x02@K\x03@u", 60) + b"s.",
    "a key": b"\x80\x04}" + nested(b")", b"(@@@@@@@@@@t", 60) + b"Ns.",
    "a set": b"\x80\x04\x8f(" + nested(b")", b"(@@@@@@@@@@t", 60) + b"\x90.",
    "depth": b"\x80\x04}" + b"(" * 100_000 + b"N" + b"t" * 100_000 + b"Ns.",
    "depth of a value": b"\x80\x04}\x8c\x05model" + b"]" * 100_000 + b"a" * 99_999 + b"s.",
    "itself": b"\x80\x04}\x94\x8c\x05modelh\x00s.",
    "steps": b"\x80\x04" + b"N0" * 510_000 + b"N.",
    "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "bytes": b"\x80\x04}\x8c\x01aB\xff\xff\xff\x7fs.",
    "a type": b"\x80\x02cnumpy\ndtype\n" + LAUGHS + b"\x85R.",
    "an encoding": b"\x80\x02c_codecs\nencode\nX\x01\0\0\0a" + LAUGHS + b"\x86R.",
    "keys": LEGACY + b"\x80\x02]" + LAUGHS + b"a.",
    "digits": b"I" + b"9" * 1_000_000 + b"\n.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_stay_small(name: str, tmp_path: Path) -> None:
    (tmp_path / "bomb.pkl").write_bytes(BOMBS[name])
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(UserError, match=r"bomb\.pkl") as error:
        read_tensors(tmp_path / "bomb.pkl")
    assert time.process_time() - began < 20, "about 1 second where tracemalloc watches"
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_an_array_held_many_times_is_not_made_many_times(tmp_path: Path) -> None:
    data = np.zeros(100_000, np.float32)
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps({f"a{i}": data for i in range(2000)}, 4))  # 800 MB in all
    with pytest.raises(UserError, match="its tensors claim more than it holds"):
        read_tensors(tmp_path / "bomb.pkl")
    (tmp_path / "tied.pkl").write_bytes(pickle.dumps({"a": data, "b": data}, 4))
    assert list(read_tensors(tmp_path / "tied.pkl").tensors) == ["a", "b"]


def test_a_flipped_bit_anywhere_is_one_line_or_no_change_of_kind(tmp_path: Path) -> None:
    """Whatever a damaged pickle says, it is read in no time, to float tensors or one line."""
    whole = pickle.dumps({"model": {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2))}, "epoch": 3}, 2)
    path = tmp_path / "flipped.pkl"
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            tensors = read_tensors(path).tensors
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert all(value.dtype == torch.float32 for value in tensors.values())
