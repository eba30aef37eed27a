"""What a training run writes down: metrics.jsonl and, where it is installed, TensorBoard."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

from eventful_det.files import written_whole
from eventful_det.outputs import reporting

_LOG = logging.getLogger(__name__)


class Log:
    """Appends to `metrics.jsonl` and `tensorboard/` of a run directory.

    Lines beyond the resumed step are dropped, and so are damaged ones, with a warning.
    """

    def __init__(self, directory: Path, step: int) -> None:
        self.path = directory / "metrics.jsonl"
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else []
        steps = [_step_of(line) for line in lines]
        damaged = [str(number) for number, found in enumerate(steps, 1) if found is None]
        if damaged:
            shown = ", ".join(damaged[:5]) + ", ..." * (len(damaged) > 5)
            _LOG.warning("%s: damaged lines are left out: %s", self.path, shown)
        kept = [line for line, found in zip(lines, steps, strict=True) if found is not None and found <= step]
        with written_whole(self.path) as part:
            part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError:
            self.board = None
        else:
            self.board = SummaryWriter(directory / "tensorboard", purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float], group: str = "train") -> None:
        """Write one line; `group` heads the names in TensorBoard. Numbers that are not finite become null.

        Raises:
            UserError: it cannot be written.
        """
        rounded = {name: round(value, 6) if math.isfinite(value) else None for name, value in metrics.items()}
        with reporting(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **rounded}) + "\n")
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        """Write out what TensorBoard still holds."""
        if self.board is not None:
            self.board.close()


def _step_of(line: str) -> int | None:
    """The step that a line is about; None if the line is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None
