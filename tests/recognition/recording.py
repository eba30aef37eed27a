"""Recordings as the official code would make them: its semantics written out once more, one stream at a time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def make_config(**changes: Any) -> dict[str, Any]:
    """3 frames a tubelet, 2 x 3 tokens of 4 x 4 pixels, resized positions, normalisation per channel."""
    return {
        "classes": 5,
        "dim": 12,
        "input_shape": [9, 3, 8, 12],
        "tubelet_shape": [3, 4, 4],
        "normalize_mean": [0.4, 0.5, 0.6],
        "normalize_std": [0.2, 0.3, 0.25],
        "spatial_views": 2,
        "temporal_views": 2,
        "temporal_stride": 2,
        "spatial": {"depth": 2, "heads": 3, "mlp_ratio": 2, "position_encoding_size": [3, 3]},
        "temporal": {"depth": 1, "heads": 2, "mlp_ratio": 3, "position_encoding_size": [3]},
    } | changes


def make_weights(config: dict[str, Any], generator: torch.Generator) -> Weights:
    dim, (tt, th, tw) = config["dim"], config["tubelet_shape"]
    sizes: dict[str, tuple[int, ...]] = {
        "embedding.conv.weight": (dim, config["input_shape"][1], tt, th, tw),
        "embedding.conv.bias": (dim,),
        "classifier.weight": (config["classes"], dim),
        "classifier.bias": (config["classes"],),
    }
    for name in ("spatial", "temporal"):
        model, positions = f"{name}_model", torch.Size(config[name]["position_encoding_size"]).numel()
        hidden = config[name]["mlp_ratio"] * dim
        sizes |= {f"{model}.class_token": (1, 1, dim), f"{model}.layer_norm.weight": (dim,)}
        sizes |= {f"{model}.layer_norm.bias": (dim,)}
        sizes[f"{model}.backbone.position_encoding.encoding"] = (1, 1 + positions, dim)
        layers = {"input_layer_norm": (dim,), "mlp_layer_norm": (dim,), "qkv": (3 * dim, dim)}
        layers |= {"projection": (dim, dim), "mlp_1": (hidden, dim), "mlp_2": (dim, hidden)}
        for i in range(config[name]["depth"]):
            for layer, shape in layers.items():
                sizes |= {f"{model}.backbone.blocks.{i}.{layer}.weight": shape}
                sizes |= {f"{model}.backbone.blocks.{i}.{layer}.bias": shape[:1]}
    return {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in sizes.items()}


class Stream:
    """A sub-model on one stream. A.V is the product of what the gates of A and v let through, computed anew."""

    def __init__(self, weights: Weights, model: str, heads: int, kind: str, policy: Any, options: Any) -> None:
        self.weights, self.model, self.heads, self.kind, self.policy = weights, model, heads, kind, policy
        self.stgt, self.before = options.get("stgt", False), options.get("gate_before_ln", False)
        self.depth = sum(key.startswith(f"{model}.backbone.blocks.") for key in weights) // 12
        self.memory: dict[str, Tensor] = {}
        self.counts: list[Counter[str]] = []
        self.indices: list[dict[str, Tensor]] = []

    def step(self, tokens: Tensor, grid: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
        """Tokens (N, D); all tokens after the last block, and the class token after the layer norm."""
        flush = self.kind == "Block" or not self.memory
        self.counts.append(Counter())
        self.indices.append({})
        encoding = self.weights[f"{self.model}.backbone.position_encoding.encoding"][0]
        positions = encoding[1:]
        if grid is not None and len(positions) != len(tokens):
            side = int(len(positions) ** 0.5)
            image = positions.T.reshape(1, -1, side, side)
            positions = F.interpolate(image, grid, mode="bicubic", align_corners=False)[0].flatten(1).T
        x = torch.cat([self.weights[f"{self.model}.class_token"][0], tokens])
        x = x + torch.cat([encoding[:1], positions])
        self.counts[-1]["add"] += x.numel()
        for i in range(self.depth):
            x = self.block(i, x, flush)
        return x, self.norm(f"{self.model}.layer_norm", x[:1])[0]

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps=1e-6)

    def linear(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        self.counts[-1]["linear"] += len(x) * weight.numel()
        self.counts[-1]["bias"] += len(x) * len(weight)
        return x @ weight.T + self.weights[f"{name}.bias"]

    def select(self, error: Tensor) -> Tensor:
        size, value = error.norm(dim=1), self.policy["value"]
        if self.policy["name"] == "threshold":
            return (size > value).nonzero()[:, 0]
        k = int(value * len(size)) if self.policy["name"] == "fraction" else value
        return size.topk(k, sorted=False).indices

    def gated(self, key: str, x: Tensor, norm: str | None, operation: Any, flush: bool) -> tuple[Tensor, Tensor]:
        before = x if norm is None or self.before else self.norm(norm, x)
        index = torch.arange(len(x))
        if not flush:
            self.counts[-1]["gate"] += x.numel()
            index = self.select(before - self.memory[key])
            self.indices[-1][key] = index
        else:
            self.memory[key] = before.clone()
        self.memory[key][index if not self.stgt else slice(None)] = before[index] if not self.stgt else before
        rows = before[index]
        result = operation(rows if norm is None or not self.before else self.norm(norm, rows))
        if flush:
            self.memory[f"{key}.buffer"] = result.clone()
        else:
            self.memory[f"{key}.buffer"][index] = result
        return self.memory[f"{key}.buffer"], index

    def block(self, i: int, x: Tensor, flush: bool) -> Tensor:
        name, (length, dim) = f"{self.model}.backbone.blocks.{i}", x.shape
        qkv, index = self.gated(
            f"blocks.{i}.qkv_gate",
            x,
            f"{name}.input_layer_norm",
            lambda rows: self.linear(f"{name}.qkv", rows),
            flush,
        )
        q, k, v = qkv.view(length, 3, self.heads, -1).permute(1, 2, 0, 3)
        weights = (q @ k.mT / (dim // self.heads) ** 0.5).softmax(-1)
        count, n = self.counts[-1], len(index)
        incremental = not flush and self.kind == "EventfulBlock"
        if flush or self.kind == "EventfulTokenwiseBlock":
            count["matmul"] += 2 * length**2 * dim
        elif self.kind == "EventfulMatmul1Block":
            count["matmul"] += (2 * n * length + length**2) * dim
        else:
            count["matmul"] += 4 * n * length * dim
            count["gate"] += length * dim + self.heads * length**2
            count["accumulator"] += n * dim + 2 * length * dim
        if self.kind == "EventfulBlock":  # columns of A and rows of v are let through by the first gate
            seen = self.memory.setdefault(f"{name}.A", weights.clone())
            values = self.memory.setdefault(f"{name}.v", v.clone())
            if incremental:
                seen[:, :, index], values[:, index] = weights[:, :, index], v[:, index]
            weights, v = seen, values
        attended = (weights @ v).transpose(0, 1).flatten(1)
        out, _ = self.gated(
            f"blocks.{i}.projection_gate", attended, None, lambda rows: self.linear(f"{name}.projection", rows), flush
        )
        x = x + out
        out, _ = self.gated(
            f"blocks.{i}.mlp_gate",
            x,
            f"{name}.mlp_layer_norm",
            lambda rows: self.linear(f"{name}.mlp_2", F.gelu(self.linear(f"{name}.mlp_1", rows))),
            flush,
        )
        count["add"] += 2 * length * dim
        return x + out


def views_of(clip: Tensor, config: dict[str, Any]) -> Tensor:
    """(V, t, c, h, w) of a clip (T, c, H, W)."""
    (t, c, h, w), stride = config["input_shape"], config["temporal_stride"]
    span = t * stride
    clip = torch.cat([clip, clip[-1:].expand(max(0, span - len(clip)), -1, -1, -1)])

    def spread(left: int, count: int) -> list[int]:
        return [left // 2] if count == 1 else [int(i * (left / (count - 1))) for i in range(count)]

    excerpts = [clip[s : s + span : stride] for s in spread(len(clip) - span, config["temporal_views"])]
    mean, std = (
        torch.tensor(v if isinstance(v, list) else [v] * c).view(-1, 1, 1)
        for v in (config["normalize_mean"], config["normalize_std"])
    )
    scale = max(h / clip.shape[2], w / clip.shape[3])
    size = round(scale * clip.shape[2]), round(scale * clip.shape[3])
    resized = [
        F.interpolate((e / 255 - mean) / std, size, mode="bilinear", antialias=True)
        if scale != 1
        else (e / 255 - mean) / std
        for e in excerpts
    ]
    count = config["spatial_views"]
    corners = zip(spread(size[0] - h, count), spread(size[1] - w, count), strict=True)
    return torch.stack([e[:, :, y : y + h, x : x + w] for y, x in corners for e in resized])


def record_run(data: dict[str, Any], **given: Any) -> dict[str, Any]:
    config, weights = data["config"], data["state_dict"]
    run: dict[str, Any] = {
        "clips": [0],
        "spatial_views": config["spatial_views"],
        "temporal_views": config["temporal_views"],
        "spatial_class": "EventfulBlock",
        "temporal_class": "Block",
        "batch_views": True,
        "policy": {"name": "topk", "value": 3},
        "options": {},
    } | given
    used = {**config, "spatial_views": run["spatial_views"], "temporal_views": run["temporal_views"]}
    views = torch.cat([views_of(data["clips"][i][0], used) for i in run["clips"]])
    count = len(views) // len(run["clips"])
    embedded = F.conv3d(
        views.transpose(1, 2),
        weights["embedding.conv.weight"],
        weights["embedding.conv.bias"],
        stride=tuple(config["tubelet_shape"]),
    )  # (B V, D, T', H, W)
    grid = tuple(embedded.shape[3:])
    make = lambda: Stream(  # noqa: E731
        weights, "spatial_model", config["spatial"]["heads"], run["spatial_class"], run["policy"], run["options"]
    )
    streams = [make() for _ in views]
    outputs = [[s.step(e, grid) for e in x.flatten(2).permute(1, 2, 0)] for s, x in zip(streams, embedded, strict=True)]
    run["spatial"] = torch.stack([torch.stack([o for _, o in steps]) for steps in outputs], 1)
    run["tokens"] = torch.stack([x for x, _ in outputs[0]])[:, None]
    order = range(len(views))
    groups = [list(order)] if run["batch_views"] else [list(order[v::count]) for v in range(count)]
    run["counts"] = [
        [official(sum((streams[s].counts[t] for s in group), Counter())) for t in range(len(outputs[0]))]
        for group in groups
    ]
    names = streams[0].indices[-1] if len(streams[0].indices) > 1 else {}
    run["indices"] = {
        name: [
            [torch.stack([streams[s].indices[t][name] for s in group]).short() for t in range(1, len(outputs[0]))]
            for group in groups
        ]
        for name in names
    }
    temporal = [Stream(weights, "temporal_model", config["temporal"]["heads"], "Block", None, {}) for _ in views]
    run["temporal"] = torch.stack([s.step(x, None)[1] for s, x in zip(temporal, run["spatial"].unbind(1), strict=True)])
    run["temporal_counts"] = official(sum((s.counts[0] for s in temporal), Counter()))
    run["logits"] = run["temporal"] @ weights["classifier.weight"].T + weights["classifier.bias"]
    run["head_counts"] = {
        "bias_flops": run["logits"].numel(),
        "linear_flops": len(views) * weights["classifier.weight"].numel(),
    }
    run["output"] = run["logits"].unflatten(0, (-1, count)).mean(1).softmax(-1)
    return run


def record_windows(data: dict[str, Any], kind: str, policy: dict[str, Any] | None) -> dict[str, Any]:
    weights, windows = data["state_dict"], data["temporal_windows"]
    stream = Stream(weights, "temporal_model", data["config"]["temporal"]["heads"], kind, policy, {})
    temporal = torch.stack([stream.step(window, None)[1] for window in windows])[:, None]
    return {
        "temporal_class": kind,
        "policy": policy,
        "temporal": temporal,
        "logits": temporal @ weights["classifier.weight"].T + weights["classifier.bias"],
        "counts": [official(counts) for counts in stream.counts],
        "indices": {name: [i[name][None].short() for i in stream.indices[1:]] for name in stream.indices[-1]},
    }


def official(counts: Counter[str]) -> dict[str, int]:
    return {f"{kind}_flops": value for kind, value in counts.items() if value}


def make_recording(seed: int, **changes: Any) -> dict[str, Any]:
    """All but runs."""
    generator = torch.Generator().manual_seed(seed)
    config = make_config(**changes)
    clips = []
    for length, height, width in ((25, 12, 12), (25, 12, 12), (7, 9, 15)):
        still = torch.randint(0, 256, (1, 1, 3, height, width), generator=generator)
        noise = torch.randint(-60, 61, (1, length, 3, height, width), generator=generator)
        moving = torch.rand(1, length, 1, height, width, generator=generator) < 0.3
        clips.append((still + noise * moving).clamp(0, 255).to(torch.uint8))
    steps = config["input_shape"][0] // config["tubelet_shape"][0]
    data: dict[str, Any] = {
        "format": "eventful-vivit-golden/1",
        "official": "written anew in a test",
        "config": config,
        "state_dict": make_weights(config, generator),
        "clips": clips,
        "temporal_windows": torch.randn(4, steps, config["dim"], generator=generator),
        "runs": [],
        "temporal_runs": [],
    }
    views = [views_of(clip[0], config)[None] for clip in clips]
    data["preprocessing"] = [
        {
            "clip": i,
            "changes": {},
            "shape": list(v.shape),
            "first": v[:, :, 0],
            "last": v[:, :, -1],
            "means": v.flatten(3).mean(3),
        }
        for i, v in enumerate(views)
    ]
    return data
