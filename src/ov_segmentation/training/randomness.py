"""Seeds of all random draws in training: a function of (seed, stream, counters), never of a generator's history.

So a run that is stopped and continued, has other workers or is split over other processes draws the same numbers.
"""

from __future__ import annotations

import numpy as np
import torch

INITIALISATION, ORDER, AUGMENTATION, LOSS, DROPOUT, HOLDOUT = range(6)
"""Streams: independent sequences under one seed."""


def derive_seed(seed: int, stream: int, *counters: int) -> int:
    """A 63-bit seed for the draws that `stream` and `counters` (epoch, sample index, step ...) name."""
    state = np.random.SeedSequence([seed, stream, *counters]).generate_state(2, np.uint32)
    return (int(state[0]) << 31) ^ int(state[1])


def derive_generator(seed: int, stream: int, *counters: int) -> np.random.Generator:
    """A numpy generator seeded as `derive_seed` does."""
    return np.random.default_rng(np.random.SeedSequence([seed, stream, *counters]))


def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order `[length]` int64 in which the samples of an epoch are seen."""
    return derive_generator(seed, ORDER, epoch).permutation(length)


class SampleOrder:
    """Which sample each position of an endless training sequence holds: the shuffled epoch 0, then epoch 1, and so on.

    Args:
        seed: the recipe's.
        length: samples of an epoch.
    """

    def __init__(self, seed: int, length: int) -> None:
        self.seed, self.length = seed, length
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))  # positions are read nearly in order

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Epoch and index of the sample."""
        epoch, place = divmod(position, self.length)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, epoch_order(self.seed, epoch, self.length))
        return epoch, int(self._epoch[1][place])


def seed_step(seed: int, step: int, micro_batch: int, process: int) -> None:
    """Seed torch's global generator, from which dropout draws, for one micro-batch on one process."""
    torch.manual_seed(derive_seed(seed, DROPOUT, step, micro_batch, process))
