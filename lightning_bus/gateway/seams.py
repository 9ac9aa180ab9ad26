"""Where recorded ids end and rendered ones begin.

    ids of the turn │ what closes its answer │ the new messages, as the template writes them, and the generation prompt
    recorded          tail                     rendered

A template is known only by what it renders, so the seam is found by rendering the history alone and with what is new
after it. What always holds: special ids cut text where tokenisers merge nothing across, so what is put after a closing
id is what the template would have put there; and where that cannot be shown, the answer is None and nothing is guessed.
Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lightning_bus.gateway.conversations import Turn
from lightning_bus.gateway.dialects import Json


def suffix_after(turn: Turn, history: Sequence[int], full: Sequence[int], stops: Collection[int]) -> list[int] | None:
    """Return the ids to put after a turn's own; None where the template writes the same history in another way.

    history  the turn's messages, rendered without a generation prompt
    full     the turn's messages and the new ones, rendered with one
    """
    closing = _closing(turn, history, stops)
    if closing is None or list(full[: len(history)]) != list(history):
        return None
    at, is_there = closing
    return [*history[at + is_there :], *full[len(history) :]]


def suffix_by_example(
    turn: Turn, history: Sequence[int], full: Sequence[int], stops: Collection[int]
) -> list[int] | None:
    """As `suffix_after`, for a template that leaves things out of earlier turns, such as their reasoning.

    history  `example(turn's answer)`, rendered without a generation prompt
    full     the example and the new messages, rendered with one

    Where the example's answer ends in both is told by how many closing ids came before. Believed only when what the
    template made of the example differs by one piece left out.
    """
    closing = _closing(turn, history, stops, counted=False)
    if closing is None:
        return None
    at, is_there = closing
    end = history[at]
    end_in_full = _nth(full, end, sum(1 for token in history[: at + 1] if token == end))
    if end_in_full is None or not _has_one_piece_less(full[: end_in_full + 1], history[: at + 1]):
        return None
    return list(full[end_in_full + is_there :])


def example(answer: Json, word: str = "-") -> list[Json]:
    """Return the shortest conversation that ends as this answer does, for `suffix_by_example`."""
    said: Json = {"role": "assistant", "content": word}
    if answer.get("tool_calls"):
        said = {"role": "assistant", "content": None, "tool_calls": answer["tool_calls"]}
    return [{"role": "user", "content": "-"}, said]


def closing_id(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Return the id with which a template closes an answer, told by two renders that differ only in its one word."""
    same = 0
    while same < min(len(one), len(other)) and one[-1 - same] == other[-1 - same]:
        same += 1
    tail = list(one[len(one) - same :])
    return tail[0] if tail and tail.count(tail[0]) == 1 and len(one) > same else None


def _closing(
    turn: Turn, history: Sequence[int], stops: Collection[int], *, counted: bool = True
) -> tuple[int, bool] | None:
    """Where the answer at the end of a rendered history is closed, and whether the turn's own ids hold that already.

    An answer that was cut off lacks the id that closes it; the template's is put there, so that the model reads a
    conversation of the kind that it was trained on.
    """
    place = {token: at for at, token in enumerate(history)}  # the last of each
    own = [turn.stop_id] if turn.stop_id is not None else []
    others = sorted(
        (stop for stop in stops if stop != turn.stop_id), key=lambda stop: place.get(stop, -1), reverse=True
    )
    for end in own + others:
        # The answer itself must have brought it, or it closes an earlier message and the answer would be there twice.
        before = turn.ends.get(end, len(history)) if counted else 0
        if end in place and sum(1 for token in history if token == end) > before:
            return place[end], end == turn.stop_id
    return None


def _nth(ids: Sequence[int], wanted: int, count: int) -> int | None:
    for at, token in enumerate(ids):
        count -= token == wanted
        if not count:
            return at
    return None


def _has_one_piece_less(short: Sequence[int], whole: Sequence[int]) -> bool:
    same = 0
    while same < len(short) and same < len(whole) and short[same] == whole[same]:
        same += 1
    missing = len(whole) - len(short)
    return missing >= 0 and list(short[same:]) == list(whole[same + missing :])
