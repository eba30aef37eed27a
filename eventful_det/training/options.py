"""How to train, as one typed record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from eventful_det.errors import UserError
from eventful_det.options import Count, Natural, NonNegative, Positive, Range, Seed, Share, convert_fields


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Attributes:
        steps: optimiser steps.
        batch: images (or clips) per step, of all processes together.
        at_once: images that a process works off at once, to save memory; gradients add up until the batch is
            reached. 0 = all of its share.
        lr: peak learning rate; `warmup` steps lead to it; `schedule` is "cosine" or "step" with `milestones`.
        weight_decay, layer_decay: of AdamW; the rate of a block is `layer_decay` times that of the next.
        clip: largest norm of the gradient; 0 = any.
        ema: decay of the averaged weights that are written at the end; 0 = none.
        amp: type of the products, see `precision.autocast_dtype`.
        checkpointing: recompute activations of the blocks in the backward pass, to save memory.
        seed: of the order, the augmentation and all sampling.
        workers: processes that read and augment, for each training process.
        log_every, checkpoint_every, eval_every: steps; eval_every = 0: no evaluation while training.
    """

    steps: Count = 3000
    batch: Count = 8
    at_once: Natural = 0
    lr: Positive = 4e-4
    warmup: Natural = 100
    schedule: Literal["cosine", "step"] = "cosine"
    milestones: tuple[Share, ...] = (0.89, 0.96)
    weight_decay: NonNegative = 0.05
    layer_decay: Annotated[float, Range(0, 1, above=True)] = 0.8
    clip: NonNegative = 1.0
    ema: Share = 0.998
    amp: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    checkpointing: bool = False
    seed: Seed = 0
    workers: Annotated[int, Range(0, 256)] = 1
    log_every: Count = 20
    checkpoint_every: Count = 200
    eval_every: Natural = 0

    def __post_init__(self) -> None:
        convert_fields(self, "train")

    def shares(self, ranks: int) -> tuple[int, int]:
        """Images per step of each of `ranks` processes, and how many of them it works off at once.

        Raises:
            UserError: the batch cannot be shared out evenly.
        """
        if self.batch % ranks:
            raise UserError(f"train.batch ({self.batch}) must be a multiple of the number of processes ({ranks})")
        share = self.batch // ranks
        at_once = min(self.at_once or share, share)
        if share % at_once:
            raise UserError(f"train.at_once ({self.at_once}) must divide the {share} images of a process")
        return share, at_once


FREE = ("log_every", "checkpoint_every", "eval_every", "workers")  # may change when a run is continued
