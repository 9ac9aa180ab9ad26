"""The spans of an attempt as the tree that they are. Pure.

Children stand under their parents in order of time. A span whose parent is not there, because it was never sent or
hangs from the attempt's root that is not recorded yet, stands at the top. Nothing is lost and nothing loops, whatever
ids spans claim: each stands once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lightning_bus.otel import names as n
from lightning_bus.spans import Span, is_model_call, model_call, reward_of


@dataclass(slots=True, eq=False)
class Node:
    """A span and what happened under it."""

    span: Span
    children: list[Node] = field(default_factory=list["Node"])


def tree(spans: Iterable[Span]) -> list[Node]:
    """Return the tops of the tree, in order of time. A span that is there twice is taken once."""
    nodes: dict[bytes, Node] = {}
    for span in spans:
        nodes.setdefault(span.span_id, Node(span))
    tops: list[Node] = []
    for node in nodes.values():
        parent = nodes.get(node.span.parent_id or b"")
        if parent is None or _is_above(node, parent, nodes):
            tops.append(node)
        else:
            parent.children.append(node)
    for node in nodes.values():
        node.children.sort(key=_when)
    return sorted(tops, key=_when)


def tree_lines(spans: Iterable[Span]) -> list[str]:
    """Return the tree for people: a line for each span, with when it began, how long it took, and what came of it."""
    tops = tree(spans)
    if not tops:
        return []
    began_ns = min(top.span.start_ns for top in tops)
    lines = [
        (f"{indent}{_inline(node.span.name)}", node.span) for top in tops for indent, node in _walk(top, "", "", "")
    ]
    width = min(60, max(len(text) for text, _ in lines))
    return [f"{text:<{width}}  {_times(span, began_ns)}{_facts(span)}" for text, span in lines]


def tree_facts(spans: Iterable[Span], facts: Any) -> list[dict[str, Any]]:
    """Return the tree for programs: `facts(span)` of each top, and `children` in it."""

    def of(node: Node) -> dict[str, Any]:
        return {**facts(node.span), "children": [of(child) for child in node.children]}

    return [of(top) for top in tree(spans)]


def _walk(node: Node, branch: str, indent: str, below: str) -> Iterator[tuple[str, Node]]:
    yield indent + branch, node
    for at, child in enumerate(node.children):
        last = at == len(node.children) - 1
        yield from _walk(child, "└─ " if last else "├─ ", below, below + ("   " if last else "│  "))


def _is_above(node: Node, above: Node, nodes: dict[bytes, Node]) -> bool:
    """True where `above` hangs, further up, from the node itself: ids that make a circle."""
    seen: set[bytes] = set()
    at: Node | None = above
    while at is not None and at.span.span_id not in seen:
        if at is node:
            return True
        seen.add(at.span.span_id)
        at = nodes.get(at.span.parent_id or b"")
    return False


def _when(node: Node) -> tuple[int, int]:
    return node.span.start_ns, node.span.sequence


def _times(span: Span, began_ns: int) -> str:
    return f"{(span.start_ns - began_ns) / 1e6:>+10.1f} ms {(span.end_ns - span.start_ns) / 1e6:>10.1f} ms"


def _facts(span: Span) -> str:
    text = ""
    if is_model_call(span):
        call = model_call(span)
        versions = ",".join(version for version, _, _ in call.weight_versions)
        text += f"  {len(call.prompt_ids_P)} + {len(call.response_ids_R)} tokens  version {versions or '–'}"
        text += f"  untrainable: {call.untrainable}" if call.untrainable else ""
    reward = reward_of(span)
    if reward is not None:
        name, target = span.attributes.get(n.REWARD_NAME), span.attributes.get(n.REWARD_SPAN)
        text += f"  reward {reward:g}" + (f" ({_inline(str(name))})" if name else "")
        text += f" for {target}" if target else ""
    if n.MESSAGE_BODY in span.attributes:
        text += f"  {_inline(str(span.attributes[n.MESSAGE_BODY]))[:100]}"
    error = span.error.strip().splitlines()
    return text + (f"  error: {_inline(error[-1])}" if error else "")


def _inline(text: str) -> str:
    """Keep a name from doing anything to the terminal."""
    return "".join(char if char.isprintable() else " " for char in text)
