"""What changed at each token, apart from light and noise."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_FITS = 6  # rounds of the robust fit of light
_BETTER = 0.5  # light has changed if it leaves less than this of the change of the median token
_MOST = 32 / 255  # standard deviation of pixels beyond which a camera's noise is none
_STILL = 4  # one token in so many is held to be still
_APART = 2  # pixels between those whose changes are compared: of resized frames, neighbours share noise
_FINE = 0.9  # what noise has of its change from pixel to pixel, and what moves seldom has


class Comparison(NamedTuple):
    """What changed at each token.

    Attributes:
        error: `(N,)` 2-norm of each token minus its reference (paper section 4.1).
        noise: `(N,)` how much of it may be noise; None = not known.
    """

    error: Tensor
    noise: Tensor | None = None


def compare(
    tokens: Tensor, reference: Tensor, channels: int = 0, unit: float = 1.0, static: bool = False
) -> Comparison:
    """Compare tokens with their reference, which takes on the light of the frame.

    Args:
        tokens: `(N, P)` of the frame.
        reference: `(N, P)` of the stream, updated in place.
        channels: colour channels of the tokens, P = channels * patch^2; 0 = they are no patches, and light and noise
            are not known.
        unit: of error and noise: multiplies them.
        static: the host does not wait for the device.
    """
    if not static and torch.equal(tokens, reference):  # a still frame
        return Comparison(tokens.new_zeros(len(tokens), dtype=torch.promote_types(tokens.dtype, torch.float32)))
    if not channels:
        return Comparison(token_errors(tokens, reference) * unit)
    adopt_light(tokens, reference, channels, static)
    most = _MOST / 0.5 * (2 * tokens.shape[1]) ** 0.5  # of the difference of two frames
    change = tokens - reference
    noise = (noise_levels(tokens, change, channels) * unit).clamp(max=most)
    return Comparison(_norms(change) * unit, noise)


def token_errors(tokens: Tensor, reference: Tensor) -> Tensor:
    """2-norm of each token `(N, P)` minus its reference, `(N,)`, in single precision or better."""
    return _norms(tokens - reference)


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))


def adopt_light(patches: Tensor, reference: Tensor, channels: int, static: bool = False) -> None:
    """Change the reference `(N, P)` in place by the gain and offset of each channel that lead to `patches`, if any do.

    They are those of most tokens' mean colours: moving objects are outliers of the fit. Where they do not explain more
    than half of the change, as when a camera moves, they are 1 and 0. Pixels that did not change stay as they are.
    """
    now, before = (
        x.unflatten(1, (channels, -1)).mean(2, dtype=torch.float32).T.contiguous() for x in (patches, reference)
    )  # (C, N) mean colours
    gain, offset = torch.ones_like(now[:, :1]), _median(now - before)  # (C, 1) each
    least = torch.finfo(torch.float32).eps
    for _ in range(_FITS):  # weighted least squares, with the weights of Cauchy
        left = now - gain * before - offset
        weight = 1 / (1 + (left / (2 * _median(left.abs()) + least)).square())
        weight = weight / weight.sum(1, keepdim=True)
        x, y = (weight * before).sum(1, keepdim=True), (weight * now).sum(1, keepdim=True)
        away = weight * (before - x)
        gain = ((away * (now - y)).sum(1, keepdim=True) + least) / ((away * (before - x)).sum(1, keepdim=True) + least)
        offset = y - gain * x
    adopt = _median((now - gain * before - offset).abs()) < _BETTER * _median((now - before).abs())
    if not static and not adopt.any():
        return
    size = patches.shape[1] // channels
    gain, offset = (
        torch.where(adopt, fit, none).to(reference.dtype).expand(-1, size).flatten()
        for fit, none in ((gain, 1.0), (offset, 0.0))
    )  # (P,) each
    reference.copy_(torch.where(reference == patches, reference, reference * gain + offset))


def _median(values: Tensor) -> Tensor:
    """`(C, N)` to `(C, 1)`."""
    return values.median(1, keepdim=True).values


def noise_levels(patches: Tensor, change: Tensor, channels: int) -> Tensor:
    """How much of each token's error may be noise, `(N,)`: noise differs from pixel to pixel, what moves does not.

    Differences of near pixels, in the direction in which they are smaller, give the level of each token. That of the
    stillest quarter holds for all; tokens without any structure, such as padding, have no say.
    """
    side = round((patches.shape[1] / channels) ** 0.5)
    if side <= _APART:
        return patches.new_zeros(len(patches), dtype=torch.float32)
    change = change.float().unflatten(1, (channels, side, side))  # (N, C, p, p)
    along_x, along_y = (
        torch.linalg.vector_norm(
            (change.narrow(axis, _APART, side - _APART) - change.narrow(axis, 0, side - _APART)).flatten(1), dim=1
        )
        for axis in (3, 2)
    )  # (N,) each
    level = torch.minimum(along_x, along_y) * (side / (2 * (side - _APART))) ** 0.5
    flat = patches.amax(1) == patches.amin(1)  # `aminmax` takes 20 times as long
    still = (len(level) - flat.sum()) // _STILL
    common = level.masked_fill(flat, torch.inf).sort().values.index_select(0, still.clamp(max=len(level) - 1).view(1))
    return torch.maximum(torch.where(common.isinf(), 0.0, common), _FINE * level)
