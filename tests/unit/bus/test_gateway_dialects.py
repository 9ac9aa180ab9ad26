"""What the real `anthropic` and `openai` clients say in their other APIs, what the engine is asked, what they read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from lightning_bus import spans as s
from lightning_bus.adapters.transitions import transitions_of
from lightning_bus.gateway.anthropic_messages import Messages
from lightning_bus.gateway.dialects import BadRequest
from lightning_bus.gateway.openai_responses import Responses
from lightning_bus.spans import model_call
from tests.gateway_fixtures import ARGUMENTS, PROMPT_IDS, QUESTION, RESPONSE_IDS, World, open_world

ADD_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
ANTHROPIC_TOOL: Any = {"name": "add", "description": "adds", "input_schema": ADD_SCHEMA}
RESPONSES_TOOL: Any = {
    "type": "function", "name": "add", "description": "adds", "parameters": ADD_SCHEMA, "strict": False,
}  # fmt: skip
CHAT_TOOL: Any = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": ADD_SCHEMA}}


@pytest.fixture
def world() -> Iterator[World]:
    with open_world() as opened:
        yield opened


# -- Anthropic's messages


def test_an_anthropic_client_is_answered_and_recorded_exactly(world: World) -> None:
    message = world.anthropic().messages.create(
        model="policy",
        max_tokens=48,
        system="Be brief.",
        messages=QUESTION,
        stop_sequences=["END"],
        extra_body={"temperature": 0.5},
    )
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": "answer 0"}]
    assert (message.stop_reason, message.usage.input_tokens, message.usage.output_tokens) == ("end_turn", 4, 3)

    [asked] = world.engine.requests
    assert asked["messages"] == [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert (asked["max_tokens"], asked["stop"], asked["temperature"]) == (48, ["END"], 0.5)
    [span] = world.bus.spans
    call = model_call(span)
    assert call.untrainable == ""
    assert (call.prompt_ids_P.tolist(), call.response_ids_R.tolist()) == (PROMPT_IDS, RESPONSE_IDS)
    assert span.attributes[s.ROUTE] == "/v1/messages"
    assert json.loads(span.attributes[s.ORIGINAL_REQUEST])["system"] == "Be brief."
    assert json.loads(span.attributes[s.REQUEST_BODY]) == asked
    assert span.attributes[s.USER_AGENT].startswith("Anthropic/Python")


def test_an_anthropic_conversation_with_tools_is_the_chats(world: World) -> None:
    world.engine.calls_tool = True
    client = world.anthropic()
    first = client.messages.create(model="policy", max_tokens=48, messages=QUESTION, tools=[ANTHROPIC_TOOL])
    assert first.stop_reason == "tool_use"
    [use] = first.content
    assert use.to_dict() == {"type": "tool_use", "id": "call-1", "name": "add", "input": {"a": 2, "b": 2}}

    world.engine.calls_tool = False
    result: Any = {"type": "tool_result", "tool_use_id": "call-1", "content": [{"type": "text", "text": "4"}]}
    content: Any = [result, {"type": "text", "text": "So?"}]
    history: Any = [*QUESTION, {"role": "assistant", "content": first.content}, {"role": "user", "content": content}]
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    client.messages.create(model="policy", max_tokens=48, messages=history, tools=[ANTHROPIC_TOOL], tool_choice=choice)
    asked = world.engine.requests[1]
    function = {"name": "add", "arguments": '{"a":2,"b":2}'}
    assert asked["messages"][1:] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call-1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call-1", "content": "4"},
        {"role": "user", "content": "So?"},
    ]
    assert asked["tools"] == [CHAT_TOOL]
    assert (asked["tool_choice"], asked["parallel_tool_calls"]) == ("required", False)


def test_an_anthropic_stream_is_the_message(world: World) -> None:
    with world.anthropic().messages.stream(model="policy", max_tokens=48, messages=QUESTION) as stream:
        texts = list(stream.text_stream)
        message = stream.get_final_message()
    assert texts == ["t0 ", "t1 ", "t2 "]
    assert (message.stop_reason, message.usage.input_tokens, message.usage.output_tokens) == ("end_turn", 4, 3)
    [span] = world.bus.spans
    assert model_call(span).untrainable == ""
    assert 0 < span.attributes[s.FIRST_TOKEN_MS] < 5000


def test_an_anthropic_stream_of_a_tool_call_is_the_call(world: World) -> None:
    world.engine.calls_tool = True
    with world.anthropic().messages.stream(
        model="policy", max_tokens=48, messages=QUESTION, tools=[ANTHROPIC_TOOL]
    ) as stream:
        message = stream.get_final_message()
    [use] = message.content
    assert use.to_dict() == {"type": "tool_use", "id": "call-1", "name": "add", "input": {"a": 2, "b": 2}}
    assert message.stop_reason == "tool_use"
    [span] = world.bus.spans
    assert json.loads(span.attributes[s.RESPONSE_BODY])["tool_calls"][0]["function"]["arguments"] == ARGUMENTS


def test_anthropic_tokens_are_counted_by_the_engine_and_not_recorded(world: World) -> None:
    counted = world.anthropic().messages.count_tokens(model="policy", messages=QUESTION)
    assert counted.input_tokens == len(PROMPT_IDS)
    assert world.engine.requests[0]["max_tokens"] == 1
    assert world.bus.spans == ()


def test_an_anthropic_client_lists_models_and_may_have_the_other_clients_base_url(world: World) -> None:
    client = world.anthropic()
    assert [model.id for model in client.models.list()] == ["policy"]
    same = client.with_options(base_url=f"{client.base_url}v1")
    assert same.messages.create(model="policy", max_tokens=8, messages=QUESTION).stop_reason == "end_turn"


def test_an_anthropic_client_understands_every_refusal(world: World) -> None:
    client = world.anthropic()
    with pytest.raises(anthropic.AuthenticationError, match="signature"):
        client.with_options(api_key="eA.eA").messages.create(model="policy", max_tokens=8, messages=QUESTION)
    document: Any = [{"role": "user", "content": [{"type": "document", "source": {}}]}]
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\] is a 'document'"):
        client.messages.create(model="policy", max_tokens=8, messages=document)
    with pytest.raises(anthropic.RequestTooLargeError, match="body_bytes_max"):
        client.messages.create(model="policy", max_tokens=8, messages=QUESTION, system="x" * 20_000)
    with pytest.raises(anthropic.NotFoundError):
        client.post("/v1/messages/nothing", cast_to=object, body={})
    world.engine.stream_breaks = True
    with (
        pytest.raises(anthropic.APIStatusError, match="before the answer was finished"),
        client.messages.stream(model="policy", max_tokens=8, messages=QUESTION) as stream,
    ):
        stream.get_final_message()


# -- OpenAI's responses


def test_a_response_is_answered_and_recorded_exactly(world: World) -> None:
    response = world.client().responses.create(
        model="policy", instructions="Be brief.", input="2 + 2?", max_output_tokens=48, temperature=0.5
    )
    assert (response.output_text, response.status) == ("answer 0", "completed")
    assert response.usage is not None and response.usage.total_tokens == 7
    [asked] = world.engine.requests
    assert asked["messages"] == [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert (asked["max_completion_tokens"], asked["temperature"]) == (48, 0.5)
    [span] = world.bus.spans
    assert model_call(span).untrainable == ""
    assert (span.attributes[s.ROUTE], span.attributes[s.MAX_TOKENS]) == ("/v1/responses", 48)


def test_a_response_conversation_with_tools_is_the_chats(world: World) -> None:
    world.engine.calls_tool = True
    client = world.client()
    given: Any = [{"role": "user", "content": "2 + 2?"}]
    first = client.responses.create(model="policy", input=given, tools=[RESPONSES_TOOL])
    [call] = first.output
    assert (call.type, call.to_dict()["call_id"], call.to_dict()["arguments"]) == ("function_call", "call-1", ARGUMENTS)
    given += [call.to_dict(), {"type": "function_call_output", "call_id": "call-1", "output": "4"}]
    world.engine.calls_tool = False
    client.responses.create(model="policy", input=given, tools=[RESPONSES_TOOL], tool_choice="auto")
    asked = world.engine.requests[1]
    function = {"name": "add", "arguments": ARGUMENTS}
    assert asked["messages"] == [
        *QUESTION,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call-1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call-1", "content": "4"},
    ]
    assert asked["tools"][0]["function"]["parameters"] == ADD_SCHEMA


@pytest.mark.parametrize("calls_tool", [False, True])
def test_a_streamed_response_ends_as_the_one_in_one_piece(world: World, calls_tool: bool) -> None:
    world.engine.calls_tool = calls_tool
    with world.client().responses.stream(model="policy", input="2 + 2?", tools=[RESPONSES_TOOL]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.completed"
    if calls_tool:
        assert final.output[0].to_dict()["arguments"] == ARGUMENTS
    else:
        assert final.output_text == "t0 t1 t2 "
        assert [event.delta for event in events if event.type == "response.output_text.delta"] == ["t0 ", "t1 ", "t2 "]
    assert model_call(world.bus.spans[0]).untrainable == ""


def test_a_streamed_response_that_breaks_off_is_an_error_to_the_agent(world: World) -> None:
    world.engine.stream_breaks = True
    with pytest.raises(openai.APIError, match="before the answer was finished"):
        list(world.client().responses.create(model="policy", input="2 + 2?", stream=True))


# -- completions


def test_completions_of_bare_prompts_are_recorded_each_with_its_own_tokens(world: World) -> None:
    completion = world.client().completions.create(model="policy", prompt="2 + 2 =", n=2)
    assert [choice.text for choice in completion.choices] == [" text 0", " text 1"]
    assert completion.choices[0].logprobs is None
    assert not {"token_ids", "prompt_token_ids"} & set(completion.choices[0].to_dict())
    assert world.engine.requests[0]["logprobs"] == 0
    calls = [model_call(span) for span in world.bus.spans]
    assert [(call.untrainable, call.prompt_ids_P.tolist()) for call in calls] == [("", PROMPT_IDS)] * 2


def test_streamed_completions_are_recorded_whole(world: World) -> None:
    chunks = list(world.client().completions.create(model="policy", prompt="2 + 2 =", stream=True, logprobs=0))
    assert "".join(chunk.choices[0].text for chunk in chunks) == " text 0"
    assert chunks[0].choices[0].logprobs is not None
    call = model_call(world.bus.spans[0])
    assert (call.untrainable, call.response_ids_R.tolist()) == ("", RESPONSE_IDS)


# -- several answers, and a client that asks again


def test_a_retry_of_several_choices_supersedes_each_by_its_own(world: World) -> None:
    create = world.client().chat.completions.create
    create(model="policy", messages=QUESTION, n=2)
    create(model="policy", messages=QUESTION, n=2, extra_headers={"x-stainless-retry-count": "1"})
    found = transitions_of("r-1", 2, "", world.bus.spans)
    assert (found.calls, dict(found.dropped), len(found.rows)) == (4, {"superseded by the client's retry": 2}, 2)


# -- what the engine has no words for


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"messages": "hi"}, "messages is 'hi'"),
        ({"messages": [3]}, r"messages\[0\] is 3"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role is 'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, r"content is None"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"text is None"),
        ({"messages": [], "tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "server tool"),
        ({"messages": [], "tools": [{"input_schema": {}}]}, r"tools\[0\].name is None"),
        ({"messages": [], "tool_choice": {"type": "some"}}, "tool_choice.type is 'some'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]}, "base64 or url"),
    ],
)
def test_messages_that_cannot_be_said_are_refused_with_their_place(asked: dict[str, Any], why: str) -> None:
    with pytest.raises(BadRequest, match=why):
        Messages().to_engine(asked)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"input": 3}, "input is 3"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"input": [{"role": "robot", "content": "x"}]}, "role is 'robot'"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input_file"),
        ({"input": "x", "previous_response_id": "resp_1"}, "keeps nothing between calls"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "hosted tool"),
        ({"input": "x", "tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"input": "x", "instructions": 3}, "instructions is 3"),
    ],
)
def test_responses_that_cannot_be_said_are_refused_with_their_place(asked: dict[str, Any], why: str) -> None:
    with pytest.raises(BadRequest, match=why):
        Responses().to_engine(asked)


def test_images_and_schemas_are_said_in_the_chats_words() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    sent = Messages().to_engine({"messages": [{"role": "user", "content": [image, {"type": "text", "text": "?"}]}]})
    assert sent["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "text", "text": "?"},
    ]
    form = {"type": "json_schema", "name": "sum", "schema": ADD_SCHEMA, "strict": True}
    picture = {"type": "input_image", "image_url": "http://x/y.png", "detail": "low"}
    asked = {"input": [{"role": "developer", "content": [picture]}], "text": {"format": form}, "store": True}
    sent = Responses().to_engine(asked)
    assert sent["messages"][0] == {
        "role": "system",
        "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png", "detail": "low"}}],
    }
    assert sent["response_format"]["json_schema"] == {"name": "sum", "schema": ADD_SCHEMA, "strict": True}
    assert "store" not in sent
