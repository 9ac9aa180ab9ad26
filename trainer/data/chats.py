"""Conversations in chat format → rows that train what the assistant says in them, in the policy's own tokens.

    {"messages": [{"role": "user", …}, {"role": "assistant", …}, …], "tools": [ … ]}      a line; `tools` may be missing

These are the lines that `lightning-bus export --as chat` writes, and what most data sets for supervised training look
like; other keys are not looked at. What always holds: the policy's chat template says what a conversation looks like, as
it does when it is served; trained are the tokens of assistant messages alone, from behind what opens such a message to
the token that ends it, both as the engine would have sampled them; one conversation is one row. A line that is no such
thing is refused with its file and number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_bus import ConfigError
from lightning_bus.adapters import Row
from trainer.serving.chat import ChatFormat, Message, for_template
from trainer.serving.errors import BadRequestError

GENERATION = re.compile(r"{%-?\s*generation\b")  # templates that mark what the assistant says themselves


def chat_rows(files: Sequence[str], chat_format: ChatFormat) -> list[Row]:
    """Return a row for each conversation of these files, in their order; its rollout_id is FILE:LINE.

    Log-probs are 0 and temperatures 1, for nobody sampled them. Raises ConfigError for a file that cannot be read or
    holds nothing, and for a line that is no conversation, that holds no assistant message, or of which the template
    does not say where an assistant message begins and ends.
    """
    rows: list[Row] = []
    for file in files:
        before = len(rows)
        for number, line in _lines(Path(file)):
            where = f"{file}:{number}"
            try:
                messages, tools = _conversation(line)
                token_ids, trained = masked(chat_format, messages, tools)
                if not any(trained):
                    raise ValueError("no message of it is the assistant's, so it trains nothing")
            except (ValueError, BadRequestError) as exc:
                raise ConfigError(f"[train.sft] files: {where}: {exc}") from exc
            rows.append(_row(where, token_ids, trained))
        if len(rows) == before:
            raise ConfigError(f"[train.sft] files: {file} holds no conversation. Give one JSON object a line")
    return rows


def masked(
    chat_format: ChatFormat, messages: Sequence[Message], tools: list[Message] | None
) -> tuple[list[int], list[bool]]:
    """Return the ids of a conversation, and which of them are the assistant's.

    Where the template marks them itself ({% generation %}), that is what counts. Else they are found by rendering what
    comes before each assistant message, with the generation prompt, and what goes up to its end.

    Raises ValueError where a rendering is not a prefix of the next: the template shows a message differently once more
    follow (as some do with reasoning), so that what would be trained is not what the policy is to say.
    """
    template = chat_format.tokenizer.get_chat_template(None, tools)
    if GENERATION.search(template):
        return _marked(chat_format, messages, tools)
    whole = chat_format.prompt_ids(list(messages), tools, add_generation_prompt=False)
    trained = [False] * len(whole)
    for at, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        if at == 0:
            raise ValueError("its first message is the assistant's: nothing was asked")
        before = chat_format.prompt_ids(list(messages[:at]), tools)
        until = chat_format.prompt_ids(list(messages[: at + 1]), tools, add_generation_prompt=False)
        if whole[: len(until)] != until or until[: len(before)] != before:
            raise ValueError(
                f"the chat template shows message {at}, the assistant's, differently once more follows, so its tokens "
                "cannot be told apart. Split the conversation there, or use a template with {% generation %}"
            )
        end = len(before) + len(chat_format.answer_ids(until[len(before) :]))
        trained[len(before) : end] = [True] * (end - len(before))
    return whole, trained


def _marked(
    chat_format: ChatFormat, messages: Sequence[Message], tools: list[Message] | None
) -> tuple[list[int], list[bool]]:
    try:
        found: Any = chat_format.tokenizer.apply_chat_template(
            [for_template(message) for message in messages],
            tools=list(tools) if tools else None,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except BadRequestError:
        raise
    except Exception as exc:  # a template may raise anything about what it is given
        raise ValueError(f"the chat template refused the messages: {exc}") from exc
    return list(found["input_ids"]), [bool(one) for one in found["assistant_masks"]]


def _conversation(line: str) -> tuple[list[Message], list[Message] | None]:
    found: Any = json.loads(line)
    messages: Any = found.get("messages") if isinstance(found, dict) else None
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise ValueError('it is no object with "messages", a list of {"role": …, "content": …}')
    tools: Any = found.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(one, dict) for one in tools)):
        raise ValueError('its "tools" are no list of objects')
    return messages, tools or None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"[train.sft] files: {path} cannot be read: {exc}") from exc


def _row(name: str, token_ids: Sequence[int], trained: Sequence[bool]) -> Row:
    end = max(at for at, one in enumerate(trained) if one) + 1  # what follows the last answer teaches nothing
    return Row(
        rollout_id=name,
        attempt=1,
        group=name,
        token_ids=np.asarray(token_ids[:end], np.int32),
        trained=np.asarray(trained[:end], np.bool_),
        logprobs=np.zeros(end, np.float32),
        temperatures=np.ones(end, np.float32),
        version_oldest=-1,
        version_newest=-1,
        span_ids=(),
    )
