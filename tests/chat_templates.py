"""Chat templates of model families in their essence, and a small tokenizer trained here to go with them.

TEMPLATES   name → (template, the token that closes an answer)
"""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<s>", "</s>", "[INST]", "[/INST]", "<|endoftext|>",
]  # fmt: skip

_CALLS = """\
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments if call.function.arguments is string else call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}"""

CHATML = (
    """\
{%- if tools %}{{- '<|im_start|>system\\nTools: ' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}"""
    + _CALLS
    + """\
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
)

# As SmolLM2: a system message of its own where there is none.
DEFAULT_SYSTEM = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}"
    + CHATML
)

# As Qwen3: reasoning only since the last question, tool results as the user's.
THINKING = (
    """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or message.reasoning) %}{{- '<think>\\n' + (message.reasoning or '') + '\\n</think>\\n\\n' }}{%- endif %}
{{- message.content or '' }}"""
    + _CALLS
    + """\
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
)

LLAMA3 = (
    """\
{{- '<|begin_of_text|>' }}
{%- for message in messages %}
{{- '<|start_header_id|>' + (message.role if message.role != 'tool' else 'ipython') + '<|end_header_id|>\\n\\n' + (message.content or '') | trim }}"""
    + _CALLS
    + """\
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
)

# As Mistral: no header before the answer, nothing after its end, tools before the last question only.
MISTRAL = (
    """\
{{- '<s>' }}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{- message.content or '' }}"""
    + _CALLS
    + """\
{{- '</s>' }}
{%- elif message.role == 'tool' %}{{- '[INST]result ' + message.content + '[/INST]' }}
{%- else %}
{%- if tools and loop.index0 == ns.last %}{{- '[INST]tools ' + (tools | tojson) + '[/INST]' }}{%- endif %}
{{- '[INST]' + message.content + '[/INST]' }}
{%- endif %}
{%- endfor %}"""
)

TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "default system": (DEFAULT_SYSTEM, "<|im_end|>"),
    "thinking": (THINKING, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "mistral": (MISTRAL, "</s>"),
}


@cache
def tokenizer(template: str) -> PreTrainedTokenizerFast:
    made = Tokenizer(BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    corpus = ["system user assistant tool ipython answer question the result is You are helpful. think tool_call"] * 50
    made.train_from_iterator(corpus, trainer)
    made.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)
    fast.chat_template = TEMPLATES[template][0]
    return fast
