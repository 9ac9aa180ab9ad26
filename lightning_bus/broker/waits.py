"""Who wants to be told what: the end of rollouts (WAIT), the next version of a resource (WATCH).

Subscriptions live in memory only and end by themselves; whoever still cares asks again, so a lost push and a broker
that restarted cost latency and nothing else. What always holds. A subscription is told of each of its rollouts once.
Every number here is bounded, so no client can fill the broker by waiting.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from lightning_bus import messages as m
from lightning_bus.broker.deadlines import Deadlines
from lightning_bus.broker.effects import Send
from lightning_bus.errors import BusyError
from lightning_bus.resources import Resource

WAIT_MS_MAX = 60_000  # then the client asks again; so those who are gone are forgotten soon
WAIT_IDS_MAX = 100_000  # of one WAIT
WAITED_IDS_MAX = 1_000_000  # of all together
WATCHES_MAX = 10_000
ENDED_BYTES_MAX = 4 << 20  # of one ENDED, about; what is more goes into the next
ERROR_CHARS_MAX = 1024  # of an End; QUERY shows it whole
END_BYTES = 64  # of an End without its strings, about

Asker = tuple[str, int]  # peer and the number of its request


@dataclass(slots=True)
class Wait:
    """What one WAIT has still to be told."""

    open: set[str]
    ends: list[m.End] = field(default_factory=list[m.End])  # in the decision that is being taken


class Waits:
    """All WAITs that are still open."""

    def __init__(self) -> None:
        self._waits: dict[Asker, Wait] = {}
        self._askers: defaultdict[str, dict[Asker, None]] = defaultdict(dict)  # rollout → who waits, in order
        self._until = Deadlines[Asker]()
        self.told: dict[Asker, Wait] = {}  # whose `ends` are not empty
        self._ids = 0

    def __len__(self) -> int:
        return len(self._waits)

    def subscribe(self, asker: Asker, rollout_ids: Iterable[str], until_s: float) -> None:
        """Tell the asker when these end. Raises BusyError, having changed nothing; see `check_room`."""
        self.forget(asker)
        wait = Wait(set(rollout_ids))
        if not wait.open:
            return
        self._waits[asker] = wait
        self._ids += len(wait.open)
        self._until.set(asker, until_s)
        for rollout_id in wait.open:
            self._askers[rollout_id][asker] = None

    def check_room(self, asker: Asker, count: int) -> None:
        """Raise BusyError when the asker cannot wait for that many."""
        former = self._waits.get(asker)
        ids = self._ids + count - (len(former.open) if former else 0)
        if ids > WAITED_IDS_MAX:
            raise BusyError(
                f"{ids} rollouts would be waited for; the broker remembers {WAITED_IDS_MAX}. Wait for fewer at a time.",
                retry_after_s=1.0,
            )

    def note_end(self, end: m.End) -> None:
        """A rollout ended: whoever waits for it is told when the decision is complete."""
        for asker in self._askers.pop(end.rollout_id, ()):
            wait = self._waits[asker]
            wait.open.discard(end.rollout_id)
            wait.ends.append(end)
            self.told[asker] = wait
            self._ids -= 1

    def pushes(self) -> list[Send]:
        """Return what is to be told after a decision: one ENDED a WAIT, more only when it is very long."""
        sends: list[Send] = []
        for asker, wait in self.told.items():
            sends += [Send(*asker, body) for body in ended(wait.ends, len(wait.open))]
            wait.ends = []
            if not wait.open:
                self.forget(asker)
        self.told = {}
        return sends

    def expire(self, now_s: float) -> None:
        for asker in self._until.due(now_s):
            self.forget(asker)

    def forget(self, asker: Asker) -> None:
        wait = self._waits.pop(asker, None)
        if wait is None:
            return
        self._until.discard(asker)
        self._ids -= len(wait.open)
        for rollout_id in wait.open:
            askers = self._askers[rollout_id]
            del askers[asker]
            if not askers:
                del self._askers[rollout_id]

    def forget_peer(self, peer: str) -> None:
        for asker in [asker for asker in self._waits if asker[0] == peer]:
            self.forget(asker)


class Watches:
    """All WATCHes that are still open."""

    def __init__(self) -> None:
        self._names: dict[Asker, tuple[str, int]] = {}
        self._askers: defaultdict[str, dict[Asker, int]] = defaultdict(dict)  # name → who watches, above which version
        self._until = Deadlines[Asker]()

    def __len__(self) -> int:
        return len(self._names)

    def subscribe(self, asker: Asker, name: str, above: int, until_s: float) -> None:
        """Answer the asker when a newer version is published. Raises BusyError, having changed nothing."""
        if asker not in self._names and len(self._names) >= WATCHES_MAX:
            raise BusyError(f"{WATCHES_MAX} clients watch resources already. Watch fewer at a time.", retry_after_s=1.0)
        self.forget(asker)
        self._names[asker] = name, above
        self._askers[name][asker] = above
        self._until.set(asker, until_s)

    def published(self, resource: Resource) -> list[Send]:
        """Return the answers that a new version brings about."""
        found = [asker for asker, above in self._askers.get(resource.name, {}).items() if resource.version > above]
        for asker in found:
            self.forget(asker)
        return [Send(*asker, m.ResourceIs(resource)) for asker in found]

    def expire(self, now_s: float) -> list[Send]:
        """Return the answers to those who waited in vain."""
        found = self._until.due(now_s)
        for asker in found:
            self.forget(asker)
        return [Send(*asker, m.ResourceIs(None)) for asker in found]

    def forget(self, asker: Asker) -> None:
        watched = self._names.pop(asker, None)
        if watched is None:
            return
        self._until.discard(asker)
        askers = self._askers[watched[0]]
        del askers[asker]
        if not askers:
            del self._askers[watched[0]]

    def forget_peer(self, peer: str) -> None:
        for asker in [asker for asker in self._names if asker[0] == peer]:
            self.forget(asker)


def end_of(rollout: m.Rollout) -> m.End:
    """Return how a rollout ended, its error cut to what a push carries."""
    error = rollout.error
    if len(error) > ERROR_CHARS_MAX:
        error = f"{error[:ERROR_CHARS_MAX]}… (QUERY shows all {len(error)} characters)"
    return m.End(rollout.submission.rollout_id, rollout.status, rollout.attempt, rollout.reward, error)


def ended(ends: list[m.End], still_open: int) -> list[m.Ended]:
    """Return the ends in as few messages as fit; `open` counts those still under way and those of later messages."""
    bodies: list[m.Ended] = []
    first, size = 0, 0
    for index, end in enumerate(ends):
        end_bytes = END_BYTES + len(end.rollout_id) + 4 * len(end.error)
        if index > first and size + end_bytes > ENDED_BYTES_MAX:
            bodies.append(m.Ended(ends[first:index], still_open + len(ends) - index))
            first, size = index, 0
        size += end_bytes
    bodies.append(m.Ended(ends[first:], still_open))
    return bodies
