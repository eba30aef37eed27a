"""What a training will take, measured on one batch before it begins."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from eventful_det.evaluation.efficiency import peak_memory, reset_peak_memory
from eventful_det.training.trainer import Trainer

_ADAM = 2  # numbers that AdamW remembers of every parameter


@dataclass(frozen=True)
class Estimate:
    """What a training will take.

    Attributes:
        steps: that are left.
        seconds: of the computation of a step.
        read_seconds: of reading and augmenting the images of a step, by all workers of a process together; it
            goes on beside the computation.
        memory: largest memory in bytes of this process: of the tensors on a GPU, or resident.
        parameters: that are trained.
    """

    steps: int
    seconds: float
    read_seconds: float
    memory: int
    parameters: int

    @property
    def total(self) -> float:
        """Seconds to the end: the slower of computing and reading sets the pace."""
        return self.steps * max(self.seconds, self.read_seconds)

    def __str__(self) -> str:
        slow = "; reading is the slower: give it more train.workers" if self.read_seconds > self.seconds else ""
        return (
            f"{self.parameters / 1e6:.1f} million parameters; {self.seconds:.2f} s to compute a step, "
            f"{self.read_seconds:.2f} s to read its images{slow}; {self.steps} steps: about {_clock(self.total)}; "
            f"{self.memory / 2**30:.1f} GiB per process"
        )


def probe(trainer: Trainer) -> Estimate:
    """Time the forward and backward pass of a batch, twice, and leave the trainer as it was.

    All processes have to call it, as their gradients are averaged; evaluations and checkpoints are not counted.
    """
    began = time.perf_counter()
    samples = [trainer.data[(n, trainer.data.size_of_step(0))] for n in range(trainer.share)]
    reading = (time.perf_counter() - began) / max(1, trainer.options.workers)
    images, targets = torch.stack([image for image, _ in samples]), [target for _, target in samples]
    trainer.objective.train()
    trained = sum(p.numel() for p in trainer.network.parameters() if p.requires_grad)
    reset_peak_memory(trainer.device)
    for _ in range(2):  # the first one also allocates and compiles
        began = time.perf_counter()
        trainer.add_gradients((images, targets))
        trainer.optimizer.zero_grad(set_to_none=True)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
    seconds = time.perf_counter() - began
    to_come = 0 if trainer.optimizer.state else 4 * _ADAM * trained
    return Estimate(
        steps=trainer.options.steps - trainer.step,
        seconds=seconds,
        read_seconds=reading,
        memory=peak_memory(trainer.device) + to_come,
        parameters=trained,
    )


def _clock(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
