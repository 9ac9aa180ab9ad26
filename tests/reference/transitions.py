"""Slow twin of merging: token by token, on plain lists, as the rule is said."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_bus.spans import ModelCall


def merged(calls: Sequence[ModelCall]) -> list[list[ModelCall]]:
    """Calls in order of time → rows: a call goes on the newest row whose tokens its prompt begins with."""
    rows: list[list[ModelCall]] = []
    for call in calls:
        prompt = call.prompt_ids_P.tolist()
        for row in reversed(rows):
            tokens = row[-1].prompt_ids_P.tolist() + row[-1].response_ids_R.tolist()
            if prompt[: len(tokens)] == tokens:
                row.append(call)
                break
        else:
            rows.append([call])
    return rows
