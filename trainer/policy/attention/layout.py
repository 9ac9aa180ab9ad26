"""Where the rows of a pack begin and end, in the forms that attention kernels ask for.

Made once per pack and shared by all layers; masks are made when the first layer asks and kept for the others.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

# N rows, T packed tokens.


class RowLayout:
    """The rows of one pack.

    lengths    (N,) of the rows; they sum to T
    starts_N1  (N + 1,) int32, on the model's device: where each row begins, and T ("cu_seqlens")
    longest    the largest of the lengths
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.lengths = tuple(int(length) for length in lengths)
        self.longest = max(self.lengths)
        self.num_tokens = sum(self.lengths)
        self._lengths_N = torch.tensor(self.lengths, dtype=torch.int32)
        starts_N1 = torch.nn.functional.pad(self._lengths_N.cumsum(0, dtype=torch.int32), (1, 0))
        self.starts_N1 = sent(starts_N1, torch.device(device))
        self._dense: dict[int | None, Tensor] = {}
        self._blocks: dict[int | None, BlockMask] = {}

    @functools.cached_property
    def row_T(self) -> Tensor:
        """(T,) int64, on the model's device: which row a token is of. For masks, which most kernels do without."""
        row_T = torch.arange(len(self.lengths)).repeat_interleave(self._lengths_N, output_size=self.num_tokens)
        return sent(row_T, self.starts_N1.device)

    def dense_mask(self, window: int | None = None) -> Tensor:
        """(T, T) bool, True where the token of the row may look at the token of the column."""
        if window not in self._dense:
            at_T = torch.arange(self.num_tokens, device=self.row_T.device)
            self._dense[window] = self._visible(window)(at_T[:0], at_T[:0], at_T[:, None], at_T[None, :])
        return self._dense[window]

    def block_mask(self, window: int | None = None) -> BlockMask:
        """The same for flex attention, which skips blocks where nothing may be looked at."""
        if window not in self._blocks:
            device = self.row_T.device
            self._blocks[window] = create_block_mask(
                self._visible(window),
                None,
                None,
                self.num_tokens,
                self.num_tokens,
                device=device,
                _compile=device.type == "cuda",  # uncompiled it makes the whole T x T mask on the way
            )
        return self._blocks[window]

    def _visible(self, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        row_T = self.row_T

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            causal = (row_T[query] == row_T[key]) & (query >= key)
            return causal if window is None else causal & (query - key < window)

        return visible


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. From a CPU to a GPU by pinned memory: nothing waits for what the GPU is doing."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
