"""Every test of the trainer draws the same numbers each time, whichever tests ran before it in the same process."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _the_same_draws() -> None:  # pyright: ignore[reportUnusedFunction]
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
