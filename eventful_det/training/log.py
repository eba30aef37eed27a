"""What a training run writes down: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path


class Log:
    """Appends to `metrics.jsonl` and `tensorboard/` of a run directory; lines beyond the resumed step are dropped."""

    def __init__(self, directory: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = directory / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        self.path.write_text("".join(line + "\n" for line in kept))
        self.board = SummaryWriter(directory / "tensorboard", purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float], group: str = "train") -> None:
        """Write one line; `group` heads the names in TensorBoard."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **{k: round(v, 6) for k, v in metrics.items()}}) + "\n")
        for name, value in metrics.items():
            self.board.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        self.board.close()
