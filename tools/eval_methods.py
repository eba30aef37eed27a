"""The ways to run a detector that tools/eval_net.py compares, from its config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

from common import Gate, Texts, build_gate

from eventful_det.errors import UserError
from eventful_det.evaluation.sweep.runs import Method, Move
from eventful_det.gating.dense import Dense
from eventful_det.gating.selector import DEFAULT
from eventful_det.options import Count, NonNegative, Positive, Range, Share, convert
from eventful_det.runtime.budget import parse_budget
from eventful_det.runtime.motion.key_frames import parse_hold

Hold = Count | Literal["auto", "adaptive"]
Scale = Annotated[float, Range(0.05, 8)]  # of the network's input


@dataclass(frozen=True)
class Curve:
    """Methods that differ in one option; see configs/eval/sweep.yaml."""

    gate: dict[str, Any] | None = None
    hold: Hold = 1
    move: Move = "flow"
    vary: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    square: bool = False


@dataclass(frozen=True)
class EvalOptions:
    """What to run: one method (configs/eval/single.yaml), or curves (configs/eval/sweep.yaml)."""

    hold: Hold = "auto"
    scale: Scale = 1.0
    square: bool = False
    fractions: tuple[Share, ...] = ()
    thresholds: tuple[NonNegative, ...] = ()
    caps: tuple[Share, ...] = ()
    only: Texts | None = None
    fps: tuple[Positive, ...] = ()
    small_cnn: str | None = None
    curves: dict[str, Curve] | None = None


def sweep_methods(curves: Mapping[str, Curve]) -> list[Method]:
    """The methods of curves.

    Raises:
        UserError: a curve is not written as in configs/eval/sweep.yaml.
    """
    methods: list[Method] = []
    for name, curve in curves.items():
        where = f"eval.curves.{name}"
        if len(curve.vary) > 1:
            raise UserError(f"{where}: vary has to name one option, got {', '.join(curve.vary)}")
        fixed: dict[str, Any] = {"hold": parse_hold(curve.hold), "move": curve.move, "square": curve.square}
        if not curve.vary:
            methods.append(Method(name, None, *_gate_with(where, curve.gate), **fixed))
        for option, values in curve.vary.items():
            own = {"hold": Count, "scale": Scale}.get(option)
            for value in values:
                if option == "budget":  # the default policy within it
                    budget = parse_budget(value)
                    amount: Any = getattr(budget, "value", getattr(budget, "seconds", budget))
                    rule = _gate_with(where, curve.gate or {"rule": "rows"}).rule
                    methods.append(Method(name, float(amount), rule, budget, **fixed))
                    continue
                value = cast(float, convert(value, own or float, f"{where}.vary.{option}"))
                gate = _gate_with(where, curve.gate, **({} if own else {option: value}))
                methods.append(Method(name, float(value), *gate, **(fixed | ({option: value} if own else {}))))
    return methods


def chosen(methods: list[Method], only: Sequence[str]) -> list[Method]:
    """The methods of some curves.

    Raises:
        UserError: there is no such curve.
    """
    curves = dict.fromkeys(method.curve for method in methods)
    unknown = sorted(set(only) - set(curves))
    if unknown:
        raise UserError(f"eval.only: there is no curve {', '.join(unknown)}; there are {', '.join(curves)}")
    return [method for method in methods if method.curve in only]


def _gate_with(where: str, gate: Mapping[str, Any] | None, **policy: Any) -> Gate:
    if gate is None:
        if policy:
            raise UserError(f"{where}: {', '.join(policy)} varies a policy, but the curve has no gate")
        return Gate(Dense(), DEFAULT)
    return build_gate({**gate, "policy": {**(gate.get("policy") or {}), **policy}} if policy else gate)
