"""The calculator's policy: a Hugging Face model directory with random weights, made here from a seed.

About a million parameters, so that the whole ring turns on a laptop's CPU and nothing is downloaded: a Llama of
ordinary shape (tied embeddings, float32) and a byte-level BPE tokenizer trained on the stories themselves. Any
text encodes, GSM8K too, only less compactly. What always holds: the same seed writes the same bytes; a number that
the stories use is the same single token wherever it stands; and the chat template writes a tool call exactly as
the policy is to emit it, so that a conversation rendered again begins with the ids already generated. Then
successive model calls of a rollout merge into one training row.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from examples.calc import tasks

CONTEXT_TOKENS_MAX = 1024
# Two wide layers learn to copy in half the time that four narrow ones take.
WIDTH, LAYERS, HEADS, FEED_FORWARD = 192, 2, 6, 512
# Far above the usual 0.02: a token then outweighs what random layers add to it, and copying a number, which is most
# of the job, is learned in far fewer updates. At 1.0 it takes longer again.
EMBEDDING_STD = 0.3

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (PAD, START, END)
TOOL_TAGS = ("<tool_call>", "</tool_call>")

# ChatML with Hermes tool calls. OpenAI's `arguments` is a JSON string and is written as it is: dumping it a second
# time could move a space, and the ids would no longer be the ones that were generated.
CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n' }}
    {%- endif %}
    {{- 'Tools:' }}
    {%- for tool in tools %}
        {{- ' ' + tool.function.name + '(' + tool.function.parameters.properties | join(', ') + ')' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages if message.role != 'system' %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {%- if not loop.first or message.content %}
            {{- '\\n' }}
        {%- endif %}
        {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {%- if call.function.arguments is string %}
            {{- call.function.arguments }}
        {%- else %}
            {{- call.function.arguments | tojson }}
        {%- endif %}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def build(directory: Path, seed: int) -> None:
    """Write tokenizer, chat template, configuration and random weights into `directory`, made where it is missing.

    The result loads with `AutoTokenizer` and `AutoModelForCausalLM` and is served like any other model directory.
    Files of the same names are overwritten.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": PAD,
            "model_max_length": CONTEXT_TOKENS_MAX,
            "clean_up_tokenization_spaces": False,
        },
    )
    stop = {"bos_token_id": None, "eos_token_id": ids[END], "pad_token_id": ids[PAD]}
    vocabulary = tokenizer.get_vocab_size()
    _write_json(
        directory / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "float32",
            "vocab_size": vocabulary,
            "hidden_size": WIDTH,
            "intermediate_size": FEED_FORWARD,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "max_position_embeddings": CONTEXT_TOKENS_MAX,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
            **stop,
        },
    )
    _write_json(directory / "generation_config.json", {"do_sample": True, "temperature": 1.0, **stop})
    save_file(_weights(vocabulary, seed), directory / "model.safetensors", metadata={"format": "pt"})


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    # The first cut decides what can be one token. Numbers stand alone, two digits at a time. A run of JSON, such
    # as ` "arguments":`, may become one token, because the ring pays for every token that is generated.
    pieces = r"""\d{1,2}| ?[{"][^\s\d]*| ?\p{L}+| ?[^\s\d\p{L}]|\s+"""
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(pieces), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=4096,  # never reached: merging stops when every piece of the corpus is one token
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    # Not special: a decoder that skips special tokens must still show the tags that a tool call is parsed from.
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TOOL_TAGS])
    return tokenizer


def _corpus() -> list[str]:
    """Every word and number of the stories, and every piece of the replies."""
    stories = [story for kind in tasks.STORIES.values() for story in kind]
    plain = [story.format(name=name, friend=name, thing="x", a=1, b=1) for story in stories for name in tasks.NAMES]
    words = [before + word for word in (*tasks.NAMES, *tasks.THINGS) for before in (" ", "")]
    numbers = [str(number) for number in range(tasks.NUMBER_MAX + 1)]
    roles = ["system\nTools: calculator(expression)", "user\n", "assistant\n", "tool\n"]
    calls = [f'\n{{"name": "calculator", "arguments": {{"expression": "1{op}1"}}}}\n' for op in tasks.STORIES]
    return [*plain, *words, *numbers, *roles, *calls, "Answer: 1"]


def _weights(vocabulary: int, seed: int) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    random = np.random.default_rng(seed)

    def normal(rows: int, columns: int, std: float) -> np.ndarray[Any, np.dtype[np.float32]]:
        return (std * random.standard_normal((rows, columns))).astype(np.float32)

    inner = WIDTH**-0.5
    outer = inner / (2 * LAYERS) ** 0.5  # what is added to the residual stream, so that depth does not inflate it
    weights = {"model.embed_tokens.weight": normal(vocabulary, WIDTH, EMBEDDING_STD)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj"):
            weights[f"{prefix}.self_attn.{name}.weight"] = normal(WIDTH, WIDTH, inner)
        weights[f"{prefix}.self_attn.o_proj.weight"] = normal(WIDTH, WIDTH, outer)
        for name in ("gate_proj", "up_proj"):
            weights[f"{prefix}.mlp.{name}.weight"] = normal(FEED_FORWARD, WIDTH, inner)
        weights[f"{prefix}.mlp.down_proj.weight"] = normal(WIDTH, FEED_FORWARD, outer)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}.{name}.weight"] = np.ones(WIDTH, np.float32)
    weights["model.norm.weight"] = np.ones(WIDTH, np.float32)
    return weights


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
