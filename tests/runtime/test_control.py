"""The pace of simulated machines: slow, noisy, suddenly loaded, idle."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from eventful_det.runtime.pace import Load, Pace

Machine = Callable[[int, Load], float]


def machine(frame: float, gmac: float, noise: float = 0.0, loaded: range = range(0), factor: float = 3.0) -> Machine:
    """Seconds of a step; `factor` times as many while it is loaded, and seeded noise of so many per cent."""
    random = np.random.default_rng(0)

    def run(step: int, load: Load) -> float:
        busy = factor if step in loaded else 1.0
        return (frame * load.frames + gmac * load.gmacs) * busy * float(np.exp(noise * random.standard_normal()))

    return run


def simulate(run: Machine, target: float, wanted: Callable[[int], float], steps: int = 120) -> np.ndarray:
    """Seconds of every step, of a video whose frames want so many GMACs each, 1 = dense; the first is dense."""
    first = Load(1, 1.0)
    pace, taken = Pace.first(first, 2 * run(-1, first)), []
    for step in range(steps):
        load = Load(1, min(wanted(step), max(0.01, min(1.0, pace.gmacs(1, target)))))
        taken.append(run(step, load))
        pace = pace.learn(load, taken[-1])
    return np.array(taken)


@pytest.mark.parametrize(("frame", "gmac"), [(0.0, 0.2), (0.02, 0.2), (0.045, 0.2), (0.01, 4.0), (0.03, 0.03)])
def test_settles_without_oscillation(frame: float, gmac: float) -> None:
    target = 0.05
    taken = simulate(machine(frame, gmac), target, lambda _: 1.0)
    best = min(target, frame + gmac)
    assert abs(taken[20:] - best).max() < 0.1 * best
    assert abs(taken[60:] - best).max() < 0.02 * best
    assert taken.max() < 1.1 * best  # never far above, not even on the way
    crossings = (np.diff(np.sign(taken[5:] - best).astype(int)) != 0) & (abs(taken[6:] - best) > 0.01 * best)
    assert crossings.sum() <= 1


def test_noise_is_not_amplified() -> None:
    taken = simulate(machine(0.01, 0.2, noise=0.15), 0.05, lambda _: 1.0, 400)[50:]
    assert taken.mean() == pytest.approx(0.05, rel=0.05)
    assert taken.std() < 0.25 * 0.05  # noise alone: 0.15


def test_sudden_load_is_met_and_forgotten() -> None:
    taken = simulate(machine(0.005, 0.2, loaded=range(40, 80)), 0.05, lambda _: 1.0)
    assert taken[40] == pytest.approx(0.15, rel=0.05)
    assert (taken[52:80] < 1.1 * 0.05).all() and (taken[52:80] > 0.9 * 0.05).all()
    assert (taken[80:] < 1.1 * 0.05).all()
    assert (taken[95:] > 0.9 * 0.05).all()


def test_a_still_scene_winds_nothing_up() -> None:
    def wanted(step: int) -> float:
        return 1.0 if step < 40 or step >= 100 else 0.001

    taken = simulate(machine(0.02, 0.2), 0.05, wanted, 140)
    assert (taken[100:] < 1.15 * 0.05).all() and (taken[110:] > 0.95 * 0.05).all()


def test_a_target_out_of_reach_winds_nothing_up() -> None:
    """Overload for a long time, then relief: no slower than after a short overload."""
    recovered = []
    for last in (60, 400):
        taken = simulate(machine(0.02, 0.2, loaded=range(40, last), factor=10), 0.05, lambda _: 1.0, last + 60)
        recovered.append(int(np.argmax(taken[last:] > 0.9 * 0.05)))
        assert (taken[last + 40 :] < 1.05 * 0.05).all()
    assert max(recovered) < 25 and abs(recovered[0] - recovered[1]) < 5


def test_one_spike_is_no_load() -> None:
    taken = simulate(machine(0.01, 0.2, loaded=range(60, 61), factor=20), 0.05, lambda _: 1.0)
    assert taken[60] > 0.9 and (taken[61:] > 0.7 * 0.05).all()


def test_rounds_of_many_frames() -> None:
    pace = Pace(0.01, 0.2)
    assert pace.seconds(Load(4, 0.5)) == pytest.approx(0.14)
    assert pace.gmacs(4, 0.14) == pytest.approx(0.5)
    assert pace.gmacs(4, 0.03) < 0
    assert pace.learn(Load(4, 0.5), 0.14) == pace
