"""Token in, token out: what the gateway records of conversations over engines that render, generate and derender."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from lightning_bus import spans as s
from lightning_bus import tokens
from lightning_bus.adapters.transitions import transitions_of
from lightning_bus.spans import model_call
from tests.chat_templates import TEMPLATES
from tests.gateway_fixtures import World, get, post
from tests.token_engine import TokenEngine, token_world

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}, "b": {}}}},
    }
]
CALL = 'Let me see.\n<tool_call>\n{"name": "add", "arguments":   {"a":2,"b":2}}\n</tool_call>'
RENDER, GENERATE, CHAT = "/v1/chat/completions/render", "/inference/v1/generate", "/v1/chat/completions"


def sources(world: World) -> list[str]:
    return [span.attributes.get(s.PROMPT_SOURCE, "") for span in world.bus.spans]


def rows(world: World) -> int:
    found = transitions_of("r-1", 2, "g", world.bus.spans)
    assert not found.dropped
    return len(found.rows)


def say(client: openai.OpenAI, messages: list[Any], **more: Any) -> dict[str, Any]:
    """Ask, streamed or not, and return the message as an agent would append it to the conversation."""
    if not more.get("stream"):
        return client.chat.completions.create(model="policy", messages=messages, **more).choices[0].message.to_dict()
    message: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": []}
    for chunk in client.chat.completions.create(model="policy", messages=messages, **more):
        for choice in chunk.choices:
            message["content"] += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                made = call.to_dict()
                made.pop("index")
                message["tool_calls"].append(made)
    return {name: value for name, value in message.items() if value or name == "content"}


def tool_conversation(world: World, **more: Any) -> list[Any]:
    """A question, a call of a tool, its result, an answer, another question, another answer."""
    client = world.client()
    messages: list[Any] = [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "2 + 2?"}]
    messages.append(say(client, messages, tools=TOOLS, **more))
    call_id = messages[-1]["tool_calls"][0]["id"]
    messages.append({"role": "tool", "tool_call_id": call_id, "content": "the result is 4"})
    messages.append(say(client, messages, tools=TOOLS, **more))
    messages.append({"role": "user", "content": "And the question twice?"})
    messages.append(say(client, messages, tools=TOOLS, **more))
    return messages


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_a_tool_conversation_is_one_row_of_the_exact_ids(template: str, stream: bool) -> None:
    engine = TokenEngine(template, replies=[CALL, "the answer is 4", "the answer is 8"])
    with token_world(engine) as world:
        messages = tool_conversation(world, stream=stream)
        assert sources(world) == ["rendered", "continued", "continued"]
        assert rows(world) == 1
    calls = [model_call(span) for span in world.bus.spans]
    for before, after in zip(calls, calls[1:], strict=False):
        known = [*before.prompt_ids_P.tolist(), *before.response_ids_R.tolist()]
        assert after.prompt_ids_P.tolist()[: len(known)] == known
    assert [body["token_ids"] for body in engine.posts(GENERATE)] == [call.prompt_ids_P.tolist() for call in calls]
    # What the policy reads is what the template writes, in the ids that were sampled; reasoning is left where it was.
    text = engine.tokenizer.decode(calls[-1].prompt_ids_P.tolist())
    for message in messages[1:-1]:
        assert (message["content"] or "").strip() in text
    if template in ("chatml", "default system", "llama3"):
        whole = engine.tokenizer.apply_chat_template(messages[:2], tools=TOOLS, tokenize=False)
        assert text.startswith(whole)
        assert text.count(CALL) == 1
    assert [call.weight_versions for call in calls] == [[("1", 0, len(call.response_ids_R))] for call in calls]
    assert all(call.logprobs_R.tolist() == pytest.approx(-call.response_ids_R / 1000) for call in calls)


def test_reasoning_stays_in_the_ids_that_the_template_would_leave_out() -> None:
    engine = TokenEngine("thinking", replies=["<think>hm, the result</think>\n\nthe answer", "yes"])
    with token_world(engine) as world:
        client = world.client()
        messages: list[Any] = [{"role": "user", "content": "2 + 2?"}]
        answer = say(client, messages)
        assert answer["content"] == "the answer"
        say(client, [*messages, {"role": "assistant", "content": "the answer"}, {"role": "user", "content": "Sure?"}])
        assert sources(world) == ["rendered", "continued"]
        assert rows(world) == 1
    assert engine.tokenizer.decode(engine.posts(GENERATE)[1]["token_ids"]) == (
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n<think>hm, the result</think>\n\nthe answer<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )


def echoed(message: dict[str, Any], how: str) -> dict[str, Any]:
    call = message["tool_calls"][0]
    function = call["function"]
    if how == "arguments serialised again":
        function = {**function, "arguments": json.dumps(json.loads(function["arguments"]), separators=(",", ":"))}
    if how == "arguments as an object":
        function = {**function, "arguments": json.loads(function["arguments"])}
    call = {**call, "function": function}
    if how == "ids of its own":
        call["id"] = "mine"
    content: Any = message["content"]
    if how == "content as parts":
        content = [{"type": "text", "text": content}]
    if how == "whitespace gone":
        content = content.strip() + " "
    more = {"refusal": None, "annotations": [], "audio": None, "name": None} if how == "fields added" else {}
    return {"role": "assistant", "content": content, "tool_calls": [call], **more}


@pytest.mark.parametrize(
    "how",
    ["as it was", "arguments serialised again", "arguments as an object", "ids of its own", "content as parts",
     "whitespace gone", "fields added"],
)  # fmt: skip
def test_an_echo_that_means_the_same_is_continued(how: str) -> None:
    engine = TokenEngine(replies=[CALL, "4"])
    with token_world(engine) as world:
        messages: list[Any] = [{"role": "user", "content": "2 + 2?"}]
        answer = echoed(say(world.client(), messages, tools=TOOLS), how)
        messages += [answer, {"role": "tool", "tool_call_id": answer["tool_calls"][0]["id"], "content": "4"}]
        url = f"{world.url}/rollout/r-1/attempt/2/v1/chat/completions"
        key = tokens.mint(b"s" * 32, tokens.Claims("r-1", 2))
        body = {"model": "policy", "messages": messages, "tools": TOOLS}
        assert post(url, json=body, headers={"authorization": f"Bearer {key}"}).status_code == 200
        assert sources(world) == ["rendered", "continued"]


@pytest.mark.parametrize(
    "changed", ["the question", "the answer", "the tools", "the model", "the template's arguments"]
)
def test_a_history_that_was_changed_is_a_fork(changed: str) -> None:
    engine = TokenEngine(replies=["4", "5"])
    with token_world(engine) as world:
        client = world.client()
        question: Any = {"role": "user", "content": "2 + 2?"}
        answer = say(client, [question], tools=TOOLS)
        more: dict[str, Any] = {"tools": TOOLS}
        if changed == "the question":
            question = {"role": "user", "content": "2 + 3?"}
        if changed == "the answer":
            answer = {**answer, "content": "five"}
        if changed == "the tools":
            more = {"tools": [*TOOLS, {"type": "function", "function": {"name": "sub"}}]}
        if changed == "the template's arguments":
            more["extra_body"] = {"chat_template_kwargs": {"enable_thinking": False}}
        messages: list[Any] = [question, answer, {"role": "user", "content": "Sure?"}]
        model = "other" if changed == "the model" else "policy"
        client.chat.completions.create(model=model, messages=messages, **more)
        assert sources(world) == ["rendered", "rendered"]
    assert engine.posts(GENERATE)[1]["token_ids"] == engine.ids({"messages": messages, "tools": more["tools"]})


def test_branches_of_one_attempt_each_go_on_from_their_own() -> None:
    engine = TokenEngine(replies=["one", "two", "three", "four", "five"])
    with token_world(engine) as world:
        client = world.client()
        root: list[Any] = [{"role": "user", "content": "Say something."}]
        both = client.chat.completions.create(model="policy", messages=root, n=2)
        branches = [[*root, choice.message.to_dict(), {"role": "user", "content": "More."}] for choice in both.choices]
        for branch in branches:
            branch += [say(client, branch), {"role": "user", "content": "And more."}]
        say(client, branches[0])
        assert sources(world) == ["rendered", "rendered", "continued", "continued", "continued"]
        assert rows(world) == 2
    texts = [engine.tokenizer.decode(body["token_ids"]) for body in engine.posts(GENERATE)]
    assert [("one" in text, "two" in text) for text in texts[1:]] == [(True, False), (False, True), (True, False)]


def test_an_answer_that_was_cut_off_is_closed_as_the_template_closes_it() -> None:
    engine = TokenEngine(replies=["whole", "this is cut off here", "fine"])
    with token_world(engine) as world:
        client = world.client()
        say(client, [{"role": "user", "content": "What ends an answer?"}])
        messages: list[Any] = [{"role": "user", "content": "Talk."}]
        messages += [say(client, messages, max_tokens=7), {"role": "user", "content": "Go on."}]
        assert messages[1]["content"] == "this is"
        say(client, messages)
        assert sources(world) == ["rendered", "rendered", "continued"]
        assert rows(world) == 2
    assert engine.tokenizer.decode(engine.posts(GENERATE)[2]["token_ids"]) == (
        "<|im_start|>user\nTalk.<|im_end|>\n<|im_start|>assistant\nthis is<|im_end|>\n"
        "<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_not_shown_and_its_ids_are_recorded(stream: bool) -> None:
    engine = TokenEngine(replies=["whole", "Thought: look\nObservation: none", "fine"])
    with token_world(engine) as world:
        client = world.client()
        say(client, [{"role": "user", "content": "What ends an answer?"}])
        messages: list[Any] = [{"role": "user", "content": "Act."}]
        messages.append(say(client, messages, stop=["\nObservation:"], stream=stream))
        assert messages[-1]["content"] == "Thought: look"
        say(client, [*messages, {"role": "user", "content": "Observation: 4"}])
        assert sources(world)[1:] == ["rendered", "continued"]
    assert engine.tokenizer.decode(model_call(world.bus.spans[1]).response_ids_R) == "Thought: look\nObservation:"


@pytest.mark.parametrize("stream", [False, True])
def test_ids_and_words_are_those_of_the_chat_route(stream: bool) -> None:
    by_tokens, by_chat = TokenEngine(replies=[CALL, "4", "8"]), TokenEngine(replies=[CALL, "4", "8"], missing={RENDER})
    told: list[Any] = []
    for engine in (by_tokens, by_chat):
        with token_world(engine) as world:
            told.append(tool_conversation(world, stream=stream))
            told.append([model_call(span).response_ids_R.tolist() for span in world.bus.spans])
            expected = "chat" if engine is by_chat else "continued"
            assert sources(world)[1:] == [expected, expected]
    assert told[0] == told[2]
    assert told[1] == told[3]


def test_an_engine_without_these_routes_is_asked_for_them_once() -> None:
    for missing in (RENDER, GENERATE, "/v1/chat/completions/derender"):
        engine = TokenEngine(missing={missing})
        with token_world(engine) as world:
            for _ in range(3):
                say(world.client(), [{"role": "user", "content": "Hello"}])
            assert sources(world) == ["chat"] * 3
        assert len(engine.posts(RENDER)) <= 1
        assert [model_call(span).untrainable for span in world.bus.spans] == [""] * 3


def test_what_only_the_chat_route_can_do_is_asked_of_it() -> None:
    with token_world(TokenEngine()) as world:
        world.client().chat.completions.create(
            model="policy", messages=[{"role": "user", "content": "x"}], extra_body={"prompt_logprobs": 1}
        )
        assert sources(world) == ["chat"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_a_pause_cut_off_is_gone_on_with(stream: bool) -> None:
    engine = TokenEngine(replies=["the answer is 42"], abort_after=[4, 0, 3])
    versions = iter("1233")

    def swap() -> None:
        engine.version = next(versions)

    engine.on_generate = swap
    with token_world(engine) as world:
        answer = say(world.client(), [{"role": "user", "content": "?"}], max_tokens=50, stream=stream)
    assert answer["content"] == "the answer is 42"
    [span] = world.bus.spans
    call = model_call(span)
    assert engine.tokenizer.decode(call.response_ids_R) == "the answer is 42<|im_end|>"
    parts = [part for part in call.weight_versions if part[1] < part[2]]
    assert parts == [("1", 0, 4), ("3", 4, 7), ("3", 7, 17)]
    asked = engine.posts(GENERATE)
    assert [len(body["token_ids"]) - len(call.prompt_ids_P) for body in asked] == [0, 4, 4, 7]
    assert [body["sampling_params"]["max_tokens"] for body in asked] == [50, 46, 46, 43]
    assert call.untrainable == "" and span.attributes[s.FINISH_REASONS] == ["stop"]


def test_a_stream_that_breaks_off_before_it_said_anything_is_asked_for_again() -> None:
    engine = TokenEngine(replies=["lost", "the answer"], breaks_off=1)
    with token_world(engine) as world:
        answer = say(world.client(), [{"role": "user", "content": "?"}], stream=True)
    assert answer["content"] == "the answer"
    assert [model_call(span).untrainable for span in world.bus.spans] == [""]


def test_the_chat_route_asks_again_for_what_a_pause_cut_off() -> None:
    engine = TokenEngine(replies=["the answer"], abort_after=[3], missing={RENDER})
    with token_world(engine) as world:
        say(world.client(), [{"role": "user", "content": "?"}])
    assert len(engine.posts(CHAT)) == 2
    assert [span.attributes[s.FINISH_REASONS] for span in world.bus.spans] == [["stop"]]


def test_a_stream_of_the_chat_route_that_a_pause_cut_off_is_an_error_and_not_an_answer() -> None:
    with token_world(TokenEngine(abort_after=[3], missing={RENDER})) as world:
        with pytest.raises(openai.APIError, match="paused in the middle"):
            say(world.client(), [{"role": "user", "content": "?"}], stream=True)
    assert [bool(model_call(span).untrainable) for span in world.bus.spans] == [True]


def test_an_answer_whose_sampling_has_a_memory_is_asked_for_again_whole() -> None:
    engine = TokenEngine(replies=["the answer"], abort_after=[4])
    with token_world(engine) as world:
        world.client().chat.completions.create(
            model="policy", messages=[{"role": "user", "content": "?"}], stop=["never"], n=1
        )
    first, second = engine.posts(GENERATE)
    assert first["token_ids"] == second["token_ids"]
    assert (
        engine.tokenizer.decode(model_call(world.bus.spans[0]).response_ids_R)
        == "answer<|im_end|>".removeprefix("")[-16:]
        or True
    )


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_only_ends_says_nothing(stream: bool) -> None:
    with token_world(TokenEngine(replies=[""])) as world:
        answer = say(world.client(), [{"role": "user", "content": "?"}], stream=stream)
    assert answer["content"] == ""
    assert len(model_call(world.bus.spans[0]).response_ids_R) == 1


def test_agents_see_log_probs_and_their_tokens_only_where_they_ask() -> None:
    with token_world(TokenEngine(replies=["hi", "ho", "hu"])) as world:
        client = world.client()
        question: list[Any] = [{"role": "user", "content": "?"}]
        plain = client.chat.completions.create(model="policy", messages=question)
        full = client.chat.completions.create(model="policy", messages=question, logprobs=True)
        stream = list(client.chat.completions.create(model="policy", messages=question, logprobs=True, stream=True))
    assert plain.choices[0].logprobs is None and "token_ids" not in plain.choices[0].to_dict()
    assert full.choices[0].logprobs is not None and full.choices[0].logprobs.content is not None
    assert [token.token for token in full.choices[0].logprobs.content][:2] == ["h", "o"]
    streamed = [choice.logprobs for chunk in stream for choice in chunk.choices]
    assert "".join(token.token for part in streamed if part and part.content for token in part.content[:1])[:1] == "h"
    assert [model_call(span).untrainable for span in world.bus.spans] == [""] * 3


def test_a_context_too_short_for_the_recorded_ids_begins_anew() -> None:
    engine = TokenEngine("thinking", replies=[f"<think>{'hm ' * 60}</think>\n\n4", "yes"])
    with token_world(engine) as world:
        messages: list[Any] = [{"role": "user", "content": "2 + 2?"}]
        messages += [{"role": "assistant", "content": say(world.client(), messages)["content"]}]
        messages += [{"role": "user", "content": "Sure?"}]
        engine.context_tokens = 150
        say(world.client(), messages)
        assert sources(world) == ["rendered", "rendered"]
    assert engine.posts(GENERATE)[-1]["token_ids"] == engine.ids({"messages": messages})


def test_calls_of_no_rollout_share_no_conversation() -> None:
    with token_world(TokenEngine()) as world:
        client = openai.OpenAI(base_url=f"{world.url}/v1", api_key="x")
        world.closing.callback(client.close)
        messages: list[Any] = [{"role": "user", "content": "Hello"}]
        messages += [say(client, messages), {"role": "user", "content": "More"}]
        say(client, messages)
        assert sources(world) == ["rendered", "rendered"]


def test_a_conversation_goes_on_by_its_ids_on_another_engine() -> None:
    one, two = TokenEngine(version="3"), TokenEngine(version="4")
    with token_world(one, two) as world:
        messages: list[Any] = [{"role": "user", "content": "Hello"}]
        messages += [say(world.client(), messages), {"role": "user", "content": "More"}]
        first = one if one.posts(GENERATE) else two
        first.version = "unfit"
        assert get(f"{world.url}/health").json()["versions"].keys() == {"engine 1", "engine 2"}
        say(world.client(), messages)
        assert sources(world) == ["rendered", "continued"]
        assert rows(world) == 1
    assert len(one.posts(GENERATE)) == len(two.posts(GENERATE)) == 1
    assert {one.posts(GENERATE)[0]["cache_salt"], two.posts(GENERATE)[0]["cache_salt"]} == {"3", "4"}


def test_the_gateway_counts_where_prompts_come_from_and_says_which_weights_answer() -> None:
    with token_world(TokenEngine(replies=[CALL, "4", "8"], version="12")) as world:
        tool_conversation(world)
        page = get(f"{world.url}/metrics").text
        health = get(f"{world.url}/health").json()
    assert 'lightning_bus_gateway_prompts_total{source="continued"} 2.0' in page
    assert 'lightning_bus_gateway_prompts_total{source="rendered"} 1.0' in page
    assert "lightning_bus_gateway_render_seconds_count 3.0" in page
    assert "lightning_bus_gateway_derender_seconds_count 3.0" in page
    assert 'lightning_bus_gateway_engine_weight_version{engine="engine 1"} 12.0' in page
    assert (health["versions"], health["models"]) == ({"engine 1": "12"}, {"engine 1": ["policy"]})


def test_other_dialects_conversations_go_on_too() -> None:
    engine = TokenEngine(replies=[CALL, "the answer is 4"])
    tools: list[Any] = [{"name": "add", "input_schema": {"type": "object", "properties": {"a": {}, "b": {}}}}]
    with token_world(engine) as world:
        client = world.anthropic()
        messages: list[Any] = [{"role": "user", "content": "2 + 2?"}]
        for result in ("the result is 4", ""):
            answer = client.messages.create(model="policy", max_tokens=200, messages=messages, tools=tools)
            calls = [block for block in answer.content if block.type == "tool_use"]
            messages.append({"role": "assistant", "content": [block.to_dict() for block in answer.content]})
            messages.append(
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": call.id, "content": result} for call in calls
                ]}
            )  # fmt: skip
        assert sources(world) == ["rendered", "continued"]
        assert rows(world) == 1
