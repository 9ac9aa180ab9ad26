"""Which rows share a forward pass: few bins of at most token_budget tokens, equally heavy, equally many for each rank.

The plan depends only on the lengths, in their order: the same rows always land in the same bins. Rows are
never split or truncated; every row lands in exactly one bin. Heavy bins come first, so that a step that does not
fit into memory fails at once, and those that ranks compute at the same time stand side by side.
"""

from collections.abc import Sequence

# A row of this length spends about as much time in attention (quadratic) as in everything else (linear). It
# is of the order of six model widths; a plan is only slightly less even when it is off by a factor of two.
QUADRATIC_TOKENS = 4096


def plan_packs(
    lengths_N: Sequence[int], token_budget: int, *, ranks: int = 1, quadratic_tokens: int = QUADRATIC_TOKENS
) -> list[list[int]]:
    """Put N rows into bins of at most token_budget tokens and return the row indices of each bin, ascending.

    ranks    how many processes share the step. The number of bins is a multiple of it, because ranks that compute
             together must do so equally often; where there are fewer rows than that, some bins are empty
    returns  rank r computes bins r, r + ranks, r + 2 · ranks, …

    First-fit decreasing on the cost L + L² / quadratic_tokens says how many bins are needed. The rows are then dealt
    out again, heaviest first, each to the cheapest bin that has room (Graham's LPT: without a budget the heaviest bin
    costs at most 4/3 of the best plan's); where that deal does not work out, the first-fit bins stand, and heavy
    ones are halved until their number is right. Ranks wait for each other in every layer of every bin, so what a
    step takes is the sum, over rounds, of the heaviest bin of the round: bins sorted by cost make that as small as
    these bins allow.

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
    if ranks < 1:
        raise ValueError(f"ranks={ranks}: at least one process computes")
    costs_N = [length + length * length / quadratic_tokens for length in lengths_N]
    heaviest_first = sorted(range(len(lengths_N)), key=lambda index: (-costs_N[index], index))
    bins = _first_fit(lengths_N, heaviest_first, token_budget)
    missing = -len(bins) % ranks
    dealt = _deal(lengths_N, costs_N, heaviest_first, token_budget, len(bins) + missing)
    bins = dealt or _halved(bins, costs_N, missing)
    cost = [sum(costs_N[index] for index in members) for members in bins]
    # Of two that cost the same, the one with the first row; an empty one comes last.
    order = sorted(range(len(bins)), key=lambda k: (-cost[k], min(bins[k], default=0)))
    return [sorted(bins[k]) for k in order]


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


def _halved(bins: list[list[int]], costs_N: Sequence[float], times: int) -> list[list[int]]:
    """Halve the heaviest bin that holds several rows, `times` times; an empty bin is added where none does."""
    bins = [list(members) for members in bins]
    for _ in range(times):
        heaviest = max(bins, key=lambda members: (len(members) > 1, sum(costs_N[index] for index in members)))
        bins.append([])
        if len(heaviest) > 1:
            halves: tuple[list[int], list[int]] = ([], [])
            for index in heaviest:  # heaviest first, as the bins were filled
                min(halves, key=lambda half: sum(costs_N[other] for other in half)).append(index)
            heaviest[:], bins[-1][:] = halves
    return bins
