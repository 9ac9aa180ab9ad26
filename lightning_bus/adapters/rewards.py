"""What a rollout earned, call by call, and where each number came from. Pure.

A reward is a number with its provenance: which rule or emitter gave it, and the span that it is about. Some belong to
the rollout as a whole, others to one model call in it: emitted for a span (`emit_reward(0.2, span=search)`), given by a
rule (`air`) or by a reward hook. What always holds: nothing counts twice, and what cannot be placed, because its span
is not in the log or no model call led to it, is counted by its reason instead of landing on some other call.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from lightning_bus.adapters.causes import Causes
from lightning_bus.otel import names as n
from lightning_bus.spans import Span, reward_of, rewarded_of

FINAL = "final"  # source of what the agent returned, or emitted for the rollout
EMITTED = "emitted"  # source of a reward emitted without a name


class Reward(NamedTuple):
    """One reward. span_id is the span that it is about, which need not be a model call; b"" is the rollout itself."""

    span_id: bytes
    value: float
    source: str


class RolloutRewards(msgspec.Struct, frozen=True):
    """Everything that one rollout earned.

    final     the reward of the rollout itself; None: it has none, which is not 0
    of_calls  by the span id of the model call that earned them, in log order
    unplaced  rewards that belong to no call, by reason
    """

    final: float | None
    of_calls: dict[bytes, list[Reward]] = {}
    final_source: str = FINAL
    unplaced: dict[str, int] = {}

    @property
    def total(self) -> float | None:
        """The return: the final reward and those of the calls. None where there is no final one."""
        if self.final is None:
            return None
        return self.final + math.fsum(reward.value for rewards in self.of_calls.values() for reward in rewards)

    def of(self, call_ids: Iterable[bytes]) -> list[list[Reward]]:
        """Return the rewards of these calls, one list for each."""
        return [self.of_calls.get(call_id, []) for call_id in call_ids]

    def by_source(self) -> dict[str, float]:
        """Return how much of the return each source gave. The values sum to `total`."""
        sums: dict[str, list[float]] = {}
        if self.final is not None:
            sums[self.final_source] = [self.final]
        for rewards in self.of_calls.values():
            for reward in rewards:
                sums.setdefault(reward.source, []).append(reward.value)
        return {source: math.fsum(values) for source, values in sums.items()}

    def shares(self) -> dict[str, float]:
        """Return the share of each source: its value over the sum of all values' sizes.

        Signed, because sources may cancel out: the sizes of the shares sum to 1, or to 0 where nothing was earned.
        """
        return shares_of(self.by_source())


@dataclass(slots=True)
class SourceReport:
    """Where the returns of many rollouts came from. Add each; rollouts without a return do not count."""

    count: int = 0
    sum: float = 0.0
    earning: int = 0  # of those, the ones that any source gave something but 0: the others have no shares
    values: dict[str, float] = field(default_factory=dict[str, float])
    shares: dict[str, float] = field(default_factory=dict[str, float])

    def add(self, total: float | None, by_source: Mapping[str, float]) -> None:
        """Count one rollout's return and what it is made of."""
        if total is None:
            return
        self.count += 1
        self.sum += total
        self.earning += any(by_source.values())
        for source, share in shares_of(by_source).items():
            self.values[source] = self.values.get(source, 0.0) + by_source[source]
            self.shares[source] = self.shares.get(source, 0.0) + share

    @property
    def mean(self) -> float | None:
        """The mean return."""
        return self.sum / self.count if self.count else None

    def by_source(self) -> dict[str, tuple[float, float]]:
        """Return source → (mean value a rollout, mean share of the return of those that earned), largest share first."""
        order = sorted(self.shares, key=lambda source: -abs(self.shares[source]))
        earning = max(1, self.earning)
        return {source: (self.values[source] / self.count, self.shares[source] / earning) for source in order}


def shares_of(values: Mapping[str, float]) -> dict[str, float]:
    """Return each value over the sum of their sizes; zeros where all are 0."""
    whole = math.fsum(abs(value) for value in values.values())
    return {source: value / whole if whole else 0.0 for source, value in values.items()}


def emitted_rewards(spans: Iterable[Span], *, steps: bool = False, final: float | None = None) -> list[Reward]:
    """Return what an agent emitted for parts of its work, in log order.

    steps  also what it emitted for no span, but for the last where that is the rollout's `final` reward told once more

    The reward's span_id is the target's, or that of its own span where it names none.
    """
    found: list[tuple[int, Reward]] = []
    loose: list[tuple[int, Reward]] = []
    for at, span in enumerate(rewarded_of(spans)):
        value = reward_of(span)
        if value is None:
            continue
        source = str(span.attributes.get(n.REWARD_NAME) or EMITTED)
        target = span.attributes.get(n.REWARD_SPAN)
        if target is None:
            loose.append((at, Reward(span.span_id, value, source)))
        else:
            found.append((at, Reward(_span_id(target), value, source)))
    if loose and loose[-1][1].value == final:
        loose.pop()
    return [reward for _, reward in sorted(found + loose)] if steps else [reward for _, reward in found]


def place(reward: Reward, causes: Causes, into: RolloutRewards) -> None:
    """Add a reward to the model call that its span is due to, or count why there is none."""
    if reward.span_id not in causes.spans:
        return _count("reward for a span that is not in the log", into)
    call_id = causes.call_of(reward.span_id)
    if call_id is None:
        return _count("reward for what no model call led to", into)
    into.of_calls.setdefault(call_id, []).append(reward)


def _count(reason: str, into: RolloutRewards) -> None:
    into.unplaced[reason] = into.unplaced.get(reason, 0) + 1


def _span_id(target: object) -> bytes:
    """Return a span id from its hexadecimal form; for what is none, an id that no span has."""
    try:
        return bytes.fromhex(str(target)) or b"?"
    except ValueError:
        return b"?"
