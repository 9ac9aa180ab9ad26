"""Messages to prompt ids, completions to messages, and scripted replies in the policy's own tokens.

Always holds: the chat template alone decides what a conversation looks like; token ids and log-probs of a choice
are the engine's, position by position, whatever the text beside them shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from trainer.serving import hermes
from trainer.serving.errors import BadRequestError, EngineFailedError
from trainer.serving.request import Completion, VersionSpan

Message = dict[str, Any]
Script = Callable[..., Any]  # (messages, tools) -> the assistant message to give back

SCRIPTED_VERSION = "scripted"  # weight version of tokens that no weights produced


class ChatFormat:
    """One tokenizer and its chat template. Belongs to one thread, like the tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self._end_ids = end_ids
        self._token_texts: dict[int, str] = {}

    def prompt_ids(
        self,
        messages: list[Message],
        tools: list[Message] | None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids a model is to continue. Raises BadRequestError for messages the template cannot render.

        add_generation_prompt   end with what opens the assistant's turn; without it this is the history alone
        continue_final_message  leave the last message open, so that the model goes on with it
        template_kwargs         variables of the template, such as enable_thinking
        """
        if template_kwargs and "chat_template" in template_kwargs:
            raise BadRequestError(
                "chat_template_kwargs holds a chat_template; the model's own is used here. Send only its variables.",
                param="chat_template_kwargs",
            )
        turn = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        return self.encode(self._render(messages, tools, {**(template_kwargs or {}), **turn}))

    def scripted(
        self, script: Script, messages: list[Message], tools: list[Message] | None
    ) -> tuple[list[int], Completion]:
        """Prompt ids and the completion the policy would have produced to give the script's reply."""
        try:
            reply = script(messages, tools)
        except Exception as exc:
            raise EngineFailedError(f"the scripted model failed: {type(exc).__name__}: {exc}") from exc
        if not isinstance(reply, dict):
            raise EngineFailedError(f"the scripted model gave a {type(reply).__name__}; an assistant message is a dict")
        prompt = self._render(messages, tools, {"add_generation_prompt": True})
        whole = self._render([*messages, {"role": "assistant", **reply}], tools, {"add_generation_prompt": False})
        prompt_ids, whole_ids = self.encode(prompt), self.encode(whole)
        if whole_ids[: len(prompt_ids)] != prompt_ids:
            raise EngineFailedError(
                "the chat template renders a reply differently from what its generation prompt begins, so a scripted "
                "reply has no exact token ids. Use a template whose generation prompt is a prefix of the rendered turn."
            )
        token_ids = self.answer_ids(whole_ids[len(prompt_ids) :])
        span = VersionSpan(SCRIPTED_VERSION, 0, len(token_ids))
        none: list[list[tuple[int, float]]] = [[] for _ in token_ids]
        return prompt_ids, Completion(token_ids, [0.0] * len(token_ids), none, "stop", None, [span])

    def answer_ids(self, token_ids: list[int]) -> list[int]:
        """What a model samples of an assistant message: up to the token that ends it, without what templates put behind."""
        end = next((at + 1 for at, token_id in enumerate(token_ids) if token_id in self._end_ids), len(token_ids))
        return token_ids[:end]

    def text(self, completion: Completion, stops: tuple[str, ...], *, with_special: bool = False) -> str:
        """The text of a completion: without its end token and without the stop string that ended it.

        with_special shows special tokens, which tool-call tags are in some tokenizers
        """
        text = self.decode(self.shown_ids(completion.token_ids), with_special=with_special)
        if isinstance(completion.stop_reason, str) and completion.stop_reason in stops:
            text = text.partition(completion.stop_reason)[0]
        return text

    def shown_ids(self, token_ids: list[int]) -> list[int]:
        return token_ids[:-1] if token_ids and token_ids[-1] in self._end_ids else token_ids

    def message(self, text: str, *, tools: bool) -> Message:
        """The assistant message a text stands for; calls are looked for only where tools were offered."""
        content, calls = hermes.parse(text) if tools else (text, [])
        return {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}

    def logprobs(self, token_ids: list[int], logprobs: list[float], top: list[list[tuple[int, float]]]) -> Message:
        """OpenAI's logprobs object."""
        rows = zip(token_ids, logprobs, top, strict=True)
        return {
            "content": [
                {**self._logprob(token, logprob), "top_logprobs": [self._logprob(*pair) for pair in pairs]}
                for token, logprob, pairs in rows
            ]
        }

    def token_text(self, token_id: int) -> str:
        """What one token looks like by itself."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self.decode([token_id], with_special=True)
        return text

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, token_ids: list[int], *, with_special: bool) -> str:
        text = self.tokenizer.decode(token_ids, skip_special_tokens=not with_special)
        assert isinstance(text, str)
        return text

    def _logprob(self, token_id: int, logprob: float) -> Message:
        text = self.token_text(token_id)
        # JSON has no -inf; OpenAI writes -9999.0 for a token that could not have been sampled.
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

    def _render(self, messages: list[Message], tools: list[Message] | None, options: Mapping[str, Any]) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [for_template(message) for message in messages],
                tools=list(tools) if tools else None,
                tokenize=False,
                **options,
            )
        except BadRequestError:
            raise
        except Exception as exc:  # a template may raise anything about what a client sent
            raise BadRequestError(f"the chat template refused the messages: {exc}", param="messages") from exc
        assert isinstance(text, str)
        return text


def for_template(message: Mapping[str, Any]) -> Message:
    """A message as templates expect it: content a string, arguments of tool calls an object."""
    if not isinstance(message.get("role"), str):
        raise BadRequestError("every message needs a role, such as user", param="messages")
    rendered = dict(message)
    content = rendered.get("content")
    if isinstance(content, list):
        rendered["content"] = "\n".join(_part_text(part) for part in content)
    elif not isinstance(content, str | None):
        raise BadRequestError(f"content is a {type(content).__name__}; send text or a list of parts", param="messages")
    if rendered.get("tool_calls"):
        rendered["tool_calls"] = [_with_object_arguments(call) for call in rendered["tool_calls"]]
    return rendered


def _part_text(part: object) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise BadRequestError(f"a content part of type {kind!r} was sent; this model reads text only", param="messages")


def _with_object_arguments(call: Any) -> Message:
    try:
        function = dict(call["function"])
        if isinstance(function.get("arguments"), str):
            function["arguments"] = json.loads(function["arguments"] or "{}")
        return {**call, "function": function}
    except (KeyError, TypeError, ValueError) as exc:
        raise BadRequestError(
            f"a tool call in the history cannot be read ({exc}); send function.name and function.arguments as JSON",
            param="messages",
        ) from exc
