"""A tiny model and tokenizer for the serving tests: random weights, real shapes, built in milliseconds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainer.serving.engine import Engine
from trainer.serving.request import Delta, Request
from trainer.serving.sampling import SamplingParams

torch.set_num_threads(1)  # a second thread only waits for the first at this size

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|pad|>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens plus ChatML's markers: any text encodes, and every id decodes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: id for id, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=TEMPLATE
    )


def build_model(seed: int = 0, *, heads: int = 4, key_value_heads: int = 2, layers: int = 2) -> LlamaForCausalLM:
    """About 0.1M random parameters with tied embeddings; logits spread enough that greedy choices do not tie."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=257,
        pad_token_id=258,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def reference_logprobs(
    model: LlamaForCausalLM, prompt_ids: list[int], token_ids: list[int], temperature: float = 1.0
) -> list[float]:
    """What the log-probs should be: one plain forward pass over prompt and response, nothing cached, nothing batched."""
    logits = model(torch.tensor([prompt_ids + token_ids])).logits[0, len(prompt_ids) - 1 : -1].float()
    logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(token_ids)[:, None]).squeeze(-1).tolist()


async def until(condition: Callable[[], bool]) -> None:
    """Let everything else run until the condition holds; the test's own time limit bounds it."""
    while not condition():  # noqa: ASYNC110 - what is awaited lives in another thread, which knows of no event here
        await asyncio.sleep(0)


def stand_still_after(engine: Engine, tokens: int) -> None:
    """From now on the engine stands still when a request has so many tokens.

    It is told so on its own thread, and obeys before the next step: however late a test looks, it finds the request
    under way.
    """
    submit = engine.submit

    def counted(
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        on_tokens: Callable[[Delta], None] | None = None,
        **more: Any,
    ) -> Request:
        seen = 0

        def count(delta: Delta) -> None:
            nonlocal seen
            seen += len(delta.token_ids)
            if seen == tokens:
                engine._loop.pause("keep")
            if on_tokens is not None:
                on_tokens(delta)

        return submit(prompt_ids, params, on_tokens=count, **more)

    engine.submit = counted  # pyright: ignore[reportAttributeAccessIssue]
