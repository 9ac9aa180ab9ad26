"""Which rows share a forward pass: few bins of at most token_budget tokens, equally heavy.

The plan depends only on the lengths, in their order: the same rows always land in the same bins. Rows are
never split or truncated; every row lands in exactly one bin.
"""

from collections.abc import Sequence

# A row of this length spends about as much time in attention (quadratic) as in everything else (linear). It
# is of the order of six model widths; a plan is only slightly less even when it is off by a factor of two.
QUADRATIC_TOKENS = 4096


def plan_packs(
    lengths_N: Sequence[int], token_budget: int, *, quadratic_tokens: int = QUADRATIC_TOKENS
) -> list[list[int]]:
    """Put N rows into bins of at most token_budget tokens and return the row indices of each bin, ascending.

    First-fit decreasing on the cost L + L² / quadratic_tokens says how many bins are needed. The rows are
    then dealt out again, heaviest first, each to the cheapest bin that has room, which evens out memory peaks
    and the load of data-parallel ranks; where that deal does not work out, the first-fit bins stand.

    Raises ValueError for an empty row and for one longer than the budget.
    """
    for index, length in enumerate(lengths_N):
        if length < 1:
            raise ValueError(f"row {index} has {length} tokens: a row holds at least one")
        if length > token_budget:
            raise ValueError(
                f"row {index} has {length} tokens, token_budget is {token_budget}: raise the budget "
                "or drop long rows before packing"
            )
    costs_N = [length + length * length / quadratic_tokens for length in lengths_N]
    heaviest_first = sorted(range(len(lengths_N)), key=lambda index: (-costs_N[index], index))
    bins = _first_fit(lengths_N, heaviest_first, token_budget)
    bins = _deal(lengths_N, costs_N, heaviest_first, token_budget, len(bins)) or bins
    return sorted((sorted(members) for members in bins), key=lambda members: members[0])


def _first_fit(lengths_N: Sequence[int], order: Sequence[int], token_budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for index in order:
        for k, free in enumerate(room):
            if lengths_N[index] <= free:
                bins[k].append(index)
                room[k] -= lengths_N[index]
                break
        else:
            bins.append([index])
            room.append(token_budget - lengths_N[index])
    return bins


def _deal(
    lengths_N: Sequence[int], costs_N: Sequence[float], order: Sequence[int], token_budget: int, num_bins: int
) -> list[list[int]] | None:
    """Deal the rows to num_bins bins of nearly equal cost; None when some row finds no room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room = [token_budget] * num_bins
    cost = [0.0] * num_bins
    for index in order:
        with_room = [k for k in range(num_bins) if lengths_N[index] <= room[k]]
        if not with_room:
            return None
        k = min(with_room, key=lambda k: (cost[k], k))
        bins[k].append(index)
        room[k] -= lengths_N[index]
        cost[k] += costs_N[index]
    return bins
