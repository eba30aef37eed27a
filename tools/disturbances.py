"""What noise, light and weather cost a gated detector: one row for each of the disturbances of synthetic video.

    python tools/disturbances.py                       # all of them, by the default gate
    python tools/disturbances.py only=[night,rain] gate/policy=frugal

"selected" is the mean share of the tokens selected on frames where nothing but the disturbance happens, "most" the
largest one; "flushes" are frames there that were taken for another scene. AP50 is measured on the same scenes with
moving objects. Writes disturbances.md and results.json to `output`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import build_gate, choose_device, command, say, write_results

from eventful_det.data.synthetic.disturbances import DISTURBANCES
from eventful_det.detectors.checkpoints.files import load_detector
from eventful_det.errors import UserError
from eventful_det.evaluation.disturbances import UNDISTURBED, markdown, measure
from eventful_det.options import Count, Natural, nearest
from eventful_det.outputs import owned, write_text


@dataclass(frozen=True)
class Options:
    """What may be asked; configs/disturbances.yaml explains it."""

    gate: dict[str, Any]
    weights: str | None
    only: tuple[str, ...] | None
    videos: Count
    frames: Count
    seed: Natural
    output: str
    device: str


def run(config: Options) -> None:
    """Measure all disturbances, then write the table."""
    gate = build_gate(config.gate)
    known = (UNDISTURBED, *DISTURBANCES)
    names = known if config.only is None else config.only
    for name in names:
        if name not in known:
            raise UserError(f"only: unknown disturbance {name!r}; {nearest(name, known)}")
    detector = load_detector(config.weights).to(choose_device(config.device))
    directory = Path(config.output)
    rows = []
    with owned(directory):
        for name in names:
            rows.append(
                measure(
                    detector,
                    name,
                    rule=gate.rule,
                    selector=gate.selector,
                    videos=config.videos,
                    frames=config.frames,
                    seed=config.seed,
                )
            )
            say(markdown(rows[-1:]).splitlines()[-1])
        write_text(directory / "disturbances.md", markdown(rows))
        write_results(directory, {"command": command(), "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    from command_line import start

    start("disturbances")
