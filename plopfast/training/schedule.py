"""The learning rate over the steps of a training."""

import math


def lr_factor(step: int, steps: int, warmup: float, schedule: str) -> float:
    """The share of the peak learning rate at a step (from 0): linear warmup, then cosine, linear or constant."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    done = (step - rising) / max(1, steps - rising)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[schedule]
