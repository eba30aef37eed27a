"""The ways to run a detector that tools/eval_net.py compares, from its config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from common import Gate, build_gate
from omegaconf import DictConfig, OmegaConf, open_dict

from eventful_det.errors import UserError
from eventful_det.evaluation.runs import Method
from eventful_det.gating.dense import Dense
from eventful_det.gating.selector import DEFAULT


def sweep_methods(config: DictConfig) -> list[Method]:
    """The methods of an `eval` config with curves (configs/eval/sweep.yaml).

    Raises:
        UserError: a curve is not written as there.
    """
    methods: list[Method] = []
    for curve, entry in config.curves.items():
        unknown = sorted(set(entry) - {"gate", "vary", "square"})
        vary = entry.get("vary") or {}
        if unknown or len(vary) > 1:
            expected = "gate, square and vary, vary with one option"
            raise UserError(f"eval.curves.{curve}: expected {expected}; got {dict(entry)}")
        square = bool(entry.get("square", False))
        if not vary:
            methods.append(Method(curve, None, *_gate_with(entry.get("gate")), square=square))
        for option, values in vary.items():
            for value in values:
                own = {option: value} if option in ("hold", "scale") else {}
                gate = _gate_with(entry.get("gate"), **({} if own else {option: value}))
                methods.append(Method(curve, float(value), *gate, square=square, **own))
    return methods


def chosen(methods: list[Method], only: str | Sequence[str]) -> list[Method]:
    """The methods of some curves.

    Raises:
        UserError: there is no such curve.
    """
    names = {only} if isinstance(only, str) else set(only)
    curves = dict.fromkeys(method.curve for method in methods)
    unknown = sorted(names - set(curves))
    if unknown:
        raise UserError(f"eval.only: there is no curve {', '.join(unknown)}; there are {', '.join(curves)}")
    return [method for method in methods if method.curve in names]


def _gate_with(gate: DictConfig | None, **policy: Any) -> Gate:
    if gate is None:
        if policy:
            raise UserError(f"eval.curves: {', '.join(policy)} varies a policy, but the curve has no gate")
        return Gate(Dense(), DEFAULT)
    with open_dict(gate):
        return build_gate(cast(DictConfig, OmegaConf.merge(gate, {"policy": policy} if policy else {})))
