"""The same run twice, bit for bit: seeds, and kernels that add in one order.

On a CPU this costs next to nothing: there two runs over the same rows differ only where a seed does, or the number of
threads. On a GPU it forbids kernels that add with atomics, which is slower, and torch refuses what it has no other for.
Which rollouts a step learns from is decided by when they end; to repeat that, train over a recorded log.
"""

import os
import random

import numpy as np
import torch


def be_deterministic(seed: int) -> None:
    """Seed every generator and choose deterministic kernels, for this process and from now on.

    To be called before the first computation on a GPU. A resumed run takes its generators from the checkpoint.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
