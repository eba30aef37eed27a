"""The paper rule against recordings of the official code, and the checker of such recordings against a naive one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from running import run
from torch import Tensor

from eventful_det.gating.macs import ViTShape, paper_sizes
from eventful_det.gating.selector import GateInput, Selector, Threshold, TopK
from eventful_det.testing.check_goldens import main
from eventful_det.testing.goldens import Recorded
from eventful_det.testing.official import official_counts, official_dense

SHARED = Path(__file__).parents[2] / ".." / "shared" / "goldens"
Golden = dict[str, Any]

ROWS, COLS, DIM, HEADS, WINDOW, STEPS = 5, 6, 8, 2, 4, 4
LINEAR = 4 * DIM**2 + 2 * DIM * 16  # weights of a block
SHAPE = ViTShape(2, DIM, HEADS, LINEAR, window=WINDOW, global_blocks=(1,), rel_pos=True)


def network(generator: torch.Generator) -> dict[str, Tensor]:
    """Parameters under their official names: a windowed and a global block."""
    sizes = {"position_encoding.encoding": (1, 12, DIM)}
    for i, size in enumerate([(WINDOW, WINDOW), (ROWS, COLS)]):
        layers = {"input_layer_norm": (DIM,), "mlp_layer_norm": (DIM,), "projection": (DIM, DIM)}
        layers |= {"qkv": (3 * DIM, DIM), "mlp_1": (16, DIM), "mlp_2": (DIM, 16)}
        for name, shape in layers.items():
            sizes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for axis, n in zip("yx", size, strict=True):
            sizes[f"blocks.{i}.relative_position.{axis}_embedding"] = (2 * n - 1, DIM // HEADS)
    return {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in sizes.items()}


class Naive:
    """The official semantics written token by token for one stream; A.V as the product of its references."""

    def __init__(self, weights: dict[str, Tensor], kinds: tuple[str, str], k: int) -> None:
        self.weights, self.kinds, self.k = weights, kinds, k
        self.memory: dict[str, Tensor] = {}
        self.indices: dict[str, list[Tensor]] = {}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (DIM,), self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps=1e-6)

    def gated(self, gate: str, x: Tensor, operation: Callable[[Tensor], Tensor], dense: bool) -> tuple[Tensor, Tensor]:
        reference = self.memory.get(gate)
        if dense or reference is None:
            index = torch.arange(len(x))
            self.memory[gate], self.memory[f"{gate}.buffer"] = x.clone(), operation(x)
        else:
            index = (x - reference).norm(dim=1).topk(self.k, sorted=False).indices
            self.indices.setdefault(gate, []).append(index.to(torch.int32)[None])
            self.memory[gate][index] = x[index]
            self.memory[f"{gate}.buffer"][index] = operation(x[index])
        return self.memory[f"{gate}.buffer"], index

    def attention(self, i: int, q: Tensor, k: Tensor, places: list[tuple[int, int]]) -> Tensor:
        """Weights `(heads, L, L)` of tokens at some places of a window or frame."""
        y, x = (self.weights[f"blocks.{i}.relative_position.{axis}_embedding"] for axis in "yx")
        scores = q @ k.mT / (DIM // HEADS) ** 0.5
        for a, (ya, xa) in enumerate(places):
            for b, (yb, xb) in enumerate(places):
                embedding = y[ya - yb + len(y) // 2] + x[xa - xb + len(x) // 2]
                scores[:, a, b] += q[:, a] @ embedding
        return scores.softmax(-1)

    def windows(self, i: int, qkv: Tensor) -> Tensor:
        places = [(y, x) for y in range(WINDOW) for x in range(WINDOW)]
        out = torch.zeros(ROWS, COLS, DIM)
        padded = self.weights[f"blocks.{i}.qkv.bias"].repeat(8, 8, 1)
        padded[:ROWS, :COLS] = qkv.view(ROWS, COLS, -1)
        for top in (0, 4):
            for left in (0, 4):
                window = padded[top : top + WINDOW, left : left + WINDOW].reshape(-1, 3, HEADS, DIM // HEADS)
                q, k, v = window.permute(1, 2, 0, 3)
                result = (self.attention(i, q, k, places) @ v).transpose(0, 1).reshape(WINDOW, WINDOW, DIM)
                part = out[top : top + WINDOW, left : left + WINDOW]
                part.copy_(result[: part.shape[0], : part.shape[1]])
        return out.flatten(0, 1)

    def frame(self, i: int, qkv: Tensor, index: Tensor, kind: str) -> Tensor:
        q, k, v = qkv.view(-1, 3, HEADS, DIM // HEADS).permute(1, 2, 0, 3)
        a = self.attention(i, q, k, [(y, x) for y in range(ROWS) for x in range(COLS)])
        if kind == "EventfulBlock":
            reference_a, reference_v = (self.memory.setdefault(n, t.clone()) for n, t in (("a", a), ("v", v)))
            reference_a[:, :, index], reference_v[:, index] = a[:, :, index], v[:, index]
            a, v = reference_a, reference_v
        return (a @ v).transpose(0, 1).flatten(1)

    def step(self, x: Tensor) -> Tensor:
        positions = self.weights["position_encoding.encoding"].view(1, 3, 4, DIM).permute(0, 3, 1, 2)
        x = x + F.interpolate(positions, (ROWS, COLS), mode="bicubic")[0].flatten(1).T
        for i, kind in enumerate(self.kinds):
            name, dense = f"blocks.{i}", kind == "Block"
            y = self.norm(f"{name}.input_layer_norm", x)
            qkv, index = self.gated(f"{name}.qkv_gate", y, lambda t, n=name: self.linear(f"{n}.qkv", t), dense)
            y = self.windows(i, qkv) if i == 0 else self.frame(i, qkv, index, kind)
            y, _ = self.gated(f"{name}.projection_gate", y, lambda t, n=name: self.linear(f"{n}.projection", t), dense)
            x = x + y
            y = self.norm(f"{name}.mlp_layer_norm", x)
            y, _ = self.gated(f"{name}.mlp_gate", y, lambda t, n=name: self.mlp(n, t), dense)
            x = x + y
        return x

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.mlp_2", F.gelu(self.linear(f"{name}.mlp_1", x)))


def record(weights: dict[str, Tensor], inputs: Tensor, kind: str, k: int) -> Golden:
    windowed = None if kind == "Block" else "EventfulTokenwiseBlock"
    naive = Naive(weights, (windowed or kind, kind), k)
    outputs = torch.stack([naive.step(x[0])[None] for x in inputs])
    ablation = {"EventfulMatmul1Block": "qk", "EventfulBlock": "full"}.get(kind, "tokenwise")
    flush, grid = official_dense(SHAPE, (ROWS, COLS)), (ROWS, COLS)
    steady = flush if kind == "Block" else official_counts(SHAPE, grid, paper_sizes(SHAPE, grid, k), ablation)
    counts = [{f"{n}_flops": v for n, v in asdict(c).items() if v} for c in [flush] + [steady] * (STEPS - 1)]
    policy = None if kind == "Block" else {"name": "topk", "value": k}
    run = {"block_class": kind, "windowed_class": windowed, "pool_size": None, "policy": policy, "options": {}}
    return run | {"outputs": outputs, "counts": counts, "indices": naive.indices}


@pytest.fixture(scope="module")
def recorded() -> Golden:
    generator = torch.Generator().manual_seed(0)
    weights = network(generator)
    inputs = torch.randn(STEPS, 1, ROWS * COLS, DIM, generator=generator)
    config = {"depth": 2, "dim": DIM, "heads": HEADS, "mlp_ratio": 2, "input_size": [ROWS, COLS]}
    config |= {"position_encoding_size": [3, 4], "window_indices": [0], "window_size": [WINDOW] * 2}
    config |= {"relative_embedding_size": [ROWS, COLS]}
    kinds = ("Block", "EventfulTokenwiseBlock", "EventfulMatmul1Block", "EventfulBlock")
    runs = [record(weights, inputs, kind, 7) for kind in kinds]
    return {"format": "eventful-golden/1", "config": config, "state_dict": weights, "inputs": inputs, "runs": runs}


@pytest.fixture
def golden(recorded: Golden) -> Golden:
    """A copy that a test may change."""
    copy = {**recorded, "config": dict(recorded["config"]), "state_dict": dict(recorded["state_dict"])}
    return copy | {"runs": [dict(run) for run in recorded["runs"]]}


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[object], tuple[int, str, str]]:
    """Write a file, check it; returns the exit status and what was printed."""

    def run(data: object) -> tuple[int, str, str]:
        path = tmp_path / "golden.pt"
        torch.save(data, path)
        status = main([str(path)])
        out, err = capsys.readouterr()
        return status, out, err

    return run


Check = Callable[[object], tuple[int, str, str]]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared recordings of the official code are not here")
def test_official_recordings(capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(map(str, SHARED.glob("square*.pt")))
    assert files
    assert main(files) == 0, capsys.readouterr().out


def test_naive_recording_agrees(golden: Golden, check: Check) -> None:
    status, out, err = check(golden)
    assert (status, err) == (0, ""), out
    assert "4 of 4 runs agree" in out
    assert len([line for line in out.splitlines() if line.endswith("agrees")]) == 4


def test_runs_as_a_module(golden: Golden, tmp_path: Path) -> None:
    torch.save(golden | {"runs": golden["runs"][:1]}, tmp_path / "golden.pt")
    done = run("-m", "eventful_det.testing.check_goldens", str(tmp_path / "golden.pt"))
    assert "1 of 1 runs agree" in done.stdout


def test_wrong_outputs_are_found(golden: Golden, check: Check) -> None:
    outputs = golden["runs"][3]["outputs"].clone()
    outputs[2] *= 1.001
    golden["runs"][3]["outputs"] = outputs
    status, out, _ = check(golden)
    assert status == 1 and "DIFFERS" in out and "3 of 4 runs agree" in out
    golden["runs"][3]["outputs"] = outputs * torch.nan
    assert check(golden)[0] == 1


def test_wrong_class_is_found(golden: Golden, check: Check) -> None:
    """The classes compute different things: A.V accumulation is not plain attention."""
    golden["runs"][3]["block_class"] = "EventfulMatmul1Block"
    status, out, _ = check(golden)
    assert status == 1 and "differ: accumulator,gate,matmul" in out


def test_wrong_counts_are_found(golden: Golden, check: Check) -> None:
    golden["runs"][1]["counts"] = [counts | {"bias_flops": 1} for counts in golden["runs"][1]["counts"]]
    status, out, _ = check(golden)
    assert status == 1 and "differ: bias " in out


def test_several_streams_share_the_bias_of_their_padding(golden: Golden, check: Check) -> None:
    golden["inputs"] = golden["inputs"].repeat(1, 3, 1, 1)
    for entry in golden["runs"]:
        entry["outputs"] = entry["outputs"].repeat(1, 3, 1, 1)
        entry["indices"] = {gate: [i.repeat(3, 1) for i in steps] for gate, steps in entry["indices"].items()}
        entry["counts"] = [{kind: 3 * n for kind, n in counts.items()} for counts in entry["counts"]]
        for counts in entry["counts"]:
            counts["bias_flops"] -= 2 * 3 * DIM
    status, out, _ = check(golden)
    assert status == 0 and "counted once per batch" in out


def test_bicubic_relative_tables_are_named(golden: Golden, check: Check) -> None:
    weights = golden["state_dict"]
    for axis, n in (("y", ROWS), ("x", COLS)):
        weights[f"blocks.1.relative_position.{axis}_embedding"] = torch.zeros(2 * (n + 2) - 1, DIM // HEADS)
    golden["config"]["relative_embedding_size"] = [ROWS + 2, COLS + 2]
    status, out, _ = check(golden)
    assert status == 1 and "resized bicubically" in out  # other tables than the recorded ones, so outputs differ


BROKEN: list[tuple[str, Callable[[Golden], object]]] = [
    ("not of the format", lambda g: g | {"format": "eventful-golden/9"}),
    ("not of the format", lambda g: [1, 2]),
    ("is malformed (KeyError", lambda g: {k: v for k, v in g.items() if k != "inputs"}),
    ("no runs", lambda g: g | {"runs": []}),
    ("inputs of shape", lambda g: g | {"inputs": g["inputs"][:, :, 1:]}),
    (
        "is malformed (KeyError: 'blocks.1.qkv.weight",
        lambda g: g | {"state_dict": {k: v for k, v in g["state_dict"].items() if k != "blocks.1.qkv.weight"}},
    ),
    ("run 1 is malformed", lambda g: g | {"runs": [{}]}),
    ("run 1 is malformed", lambda g: g | {"runs": [3]}),
    ("unknown block class 'FancyBlock'", lambda g: g | {"runs": [g["runs"][0] | {"block_class": "FancyBlock"}]}),
    ("windowed blocks cannot be", lambda g: g | {"runs": [g["runs"][3] | {"windowed_class": None}]}),
    ("unknown policy 'best'", lambda g: g | {"runs": [g["runs"][1] | {"policy": {"name": "best", "value": 1}}]}),
    ("unknown options", lambda g: g | {"runs": [g["runs"][1] | {"options": {"ats_fraction": 0.5}}]}),
    ("not divisible by pool=2", lambda g: g | {"runs": [g["runs"][0] | {"pool_size": 2}]}),
    ("pool_size must", lambda g: g | {"runs": [g["runs"][0] | {"pool_size": [1, 2]}]}),
    ("unknown kinds of operations", lambda g: g | {"runs": [g["runs"][0] | {"counts": [{"conv2d_flops": 1}] * STEPS}]}),
    ("do not fit inputs", lambda g: g | {"runs": [g["runs"][0] | {"outputs": g["inputs"][1:]}]}),
]


@pytest.mark.parametrize(("message", "broken"), BROKEN)
def test_unusable_files_give_one_line_and_status_2(
    message: str, broken: Callable[[Golden], object], golden: Golden, check: Check
) -> None:
    status, _, err = check(broken(golden))
    assert status == 2
    assert err.count("\n") == 1 and message in err


def test_unreadable_files_give_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "junk.pt").write_bytes(b"no tensors here")
    assert main([str(tmp_path / "junk.pt"), str(tmp_path / "missing.pt")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_ties_are_broken_as_recorded() -> None:
    def choose(selector: Selector, error: list[float], theirs: list[int]) -> tuple[list[int], str]:
        recorder = Recorded(selector, [torch.tensor(theirs, dtype=torch.long)])
        errors = torch.tensor(error)
        (index,) = recorder([GateInput(errors, torch.ones_like(errors), 1)])
        return sorted(index.tolist()), Recorded.summary([recorder])

    assert choose(TopK(2), [3.0, 1.0, 1.000001, 0.0], [0, 1]) == ([0, 1], "1 tied of 1")
    assert choose(TopK(2), [3.0, 1.0, 2.0, 0.0], [0, 1]) == ([0, 2], "1 different of 1")
    assert choose(Threshold(1.0), [1.0, 2.0, 3.0], [1, 2]) == ([1, 2], "equal")  # strict
    assert choose(Threshold(1.0), [1.0, 2.0, 3.0], [0, 1, 2]) == ([0, 1, 2], "1 tied of 1")
    assert choose(Threshold(9.0), [1.0, 2.0, 3.0], []) == ([], "equal")


def test_order_of_a_selection_does_not_matter() -> None:
    gate = GateInput(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3), 1)
    recorder = Recorded(TopK(2), [torch.tensor([1, 2])])
    assert recorder([gate])[0].tolist() == [2, 1]
    assert Recorded.summary([recorder]) == "equal"
