"""Whose calls train which policy, without touching how agents work together. Pure.

    ["writer", "rewriter"]                               these agents, the policy that is being trained
    {"writer" = "policy", "critic-*" = "critic"}         one policy for each
    "/^(re)?writer$/"                                    a regular expression, searched for in the agent's name
    "pipeline/writer"                                    a path: spans that hang below one another, anywhere in the tree

The agent of a call is the one that the call itself names, else the nearest of the spans above it that names one. The
first pattern that matches decides. What always holds: a call that no pattern matches trains nothing, and a call that
another model answered never trains a policy that is named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning_bus.errors import ConfigError
from lightning_bus.otel import names as n
from lightning_bus.spans import Span

# Where frameworks write an agent's name: the GenAI conventions, OpenInference, AutoGen, LangGraph.
AGENT_NAMES = (n.AGENT_NAME, "agent.name", "recipient_agent_type", "langchain.chain.type")


class Caller(NamedTuple):
    """Who made a call. path: from the top of the tree, each span by its agent's name or else its own."""

    agent: str
    path: tuple[str, ...]


NOBODY = Caller("", ())


@dataclass(frozen=True, slots=True)
class Selection:
    """Which calls are trained, and which policy by each.

    rules  (pattern, policy) in order; a policy "" is whichever is being trained. No rules: every call
    """

    rules: tuple[tuple[str, str], ...] = ()
    _match: tuple[Callable[[Caller], bool], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_match", tuple(_matcher(pattern) for pattern, _ in self.rules))

    @classmethod
    def of(cls, agents: Sequence[str] | Mapping[str, str]) -> Selection:
        """Return the selection that a run file's `agents` asks for. Raises ConfigError for what is no pattern."""
        if isinstance(agents, Mapping):
            return cls(tuple(agents.items()))
        return cls(tuple((pattern, "") for pattern in agents))

    def policy_of(self, caller: Caller) -> str | None:
        """Return the policy that this caller's calls train; None: no policy."""
        if not self.rules:
            return ""
        return next(
            (policy for (_, policy), matches in zip(self.rules, self._match, strict=True) if matches(caller)), None
        )

    def check(self, callers: Collection[Caller]) -> None:
        """Raise ConfigError, naming those who called, when not one of them is selected: the patterns are mistaken."""
        if callers and all(self.policy_of(caller) is None for caller in callers):
            seen = sorted({caller.agent or "(no agent named)" for caller in callers})
            paths = sorted({"/".join(caller.path) for caller in callers if caller.path})
            raise ConfigError(
                f"credit.agents is {[pattern for pattern, _ in self.rules]} and selects none of the calls recorded. Agents "
                f"seen: {', '.join(seen[:SHOWN])}" + (f"; paths: {', '.join(paths[:SHOWN])}" if paths else "") + "."
            )


SHOWN = 10
ALL = Selection()


class Callers:
    """Who made the calls of one attempt, looked up through its span tree.

    Spans whose parents are missing, or hang from one another in a circle, are told as far as they are known.
    """

    __slots__ = ("_known", "_spans")

    def __init__(self, spans: Iterable[Span]) -> None:
        self._spans = {span.span_id: span for span in spans}
        self._known: dict[bytes, Caller] = {}

    def of(self, span: Span) -> Caller:
        """Return who made this call."""
        above = self._above(span.parent_id)
        agent = agent_named(span.attributes)
        if not agent or (above.path and above.path[-1] == agent):
            return above
        return Caller(agent, (*above.path, agent))

    def _above(self, span_id: bytes | None) -> Caller:
        """Return agent and path at a span, itself included."""
        climbed: list[Span] = []
        seen: set[bytes] = set()
        found = NOBODY
        while span_id is not None and span_id not in seen:
            if span_id in self._known:
                found = self._known[span_id]
                break
            span = self._spans.get(span_id)
            if span is None:
                break
            seen.add(span_id)
            climbed.append(span)
            span_id = span.parent_id
        for span in reversed(climbed):
            agent = agent_named(span.attributes)
            found = self._known[span.span_id] = Caller(agent or found.agent, (*found.path, agent or span.name))
        return found


def agent_named(attributes: Mapping[str, Any]) -> str:
    """Return the agent that a span names itself, or ""."""
    for name in AGENT_NAMES:
        agent = attributes.get(name)
        if agent and isinstance(agent, str):
            return agent
    return ""


def _matcher(pattern: str) -> Callable[[Caller], bool]:
    if len(pattern) > 2 and pattern.startswith("/") and pattern.endswith("/"):
        try:
            search = re.compile(pattern[1:-1]).search
        except re.error as exc:
            raise ConfigError(
                f"credit.agents: {pattern!r} is not a regular expression ({exc}). Between slashes stands one; a name "
                "or a path stands without."
            ) from exc
        return lambda caller: search(caller.agent) is not None
    parts = [_wildcards(part) for part in pattern.split("/")]
    if not all(pattern.split("/")):
        raise ConfigError(
            f"credit.agents: {pattern!r} is no pattern. Write an agent's name, a path of names as in 'pipeline/writer', "
            "or a regular expression between slashes as in '/^re/'."
        )
    if len(parts) == 1:
        return lambda caller: parts[0].fullmatch(caller.agent) is not None

    def passes(caller: Caller) -> bool:
        """True where the parts stand in the path, one right below the other."""
        path = caller.path
        return any(
            all(part.fullmatch(path[at + k]) for k, part in enumerate(parts))
            for at in range(len(path) - len(parts) + 1)
        )

    return passes


def _wildcards(text: str) -> re.Pattern[str]:
    """`*` stands for any text; everything else for itself."""
    return re.compile(".*".join(map(re.escape, text.split("*"))), re.DOTALL)
