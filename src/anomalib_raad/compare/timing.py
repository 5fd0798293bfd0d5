"""Timings that can be compared: all in turn in one process, so that what else the machine does slows all alike."""

import time
from collections.abc import Callable, Sequence
from statistics import median

from tqdm import trange


def median_seconds(steps: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Take one step of each in every round and return the median seconds of each."""
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in trange(rounds, desc="Rounds of timed steps"):
        for step, times in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
    return [median(times) for times in seconds]
