"""What a model computes in during a fit: evaluation mode in the trainer's precision, randomness that can be resumed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import nn


@contextmanager
def evaluating(network: nn.Module, trainer: Trainer) -> Iterator[None]:
    """Evaluation mode in the trainer's precision, without gradients."""
    training = network.training
    network.eval()
    try:
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            yield
    finally:
        network.train(training)


@contextmanager
def randomness(numbers: Sequence[int], device: torch.device) -> Iterator[None]:
    """Draw random numbers that follow from some numbers alone, for instance a run's seed, a step and a rank."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(list(numbers)).generate_state(1)[0]))
        yield
