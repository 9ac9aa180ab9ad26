"""What a run cannot be trained on, refused before its first step: the reason, the values, and the way out.

    refuse_unreadable  files of conversations that are not there
    refuse_directory   no whole model, or a tokenizer that is not its own
    refuse_engine      an engine that writes text with other token ids
    refuse_tokens      recorded ids that the model does not have
    refuse_lengths     rows of which none fits into a forward pass
    as_config_error    the same for what other modules refuse by ValueError

All raise ConfigError: no restart mends it, a person does. What is merely unfit here and there (a reward that is NaN, one
row that is too long) is left out and counted instead, see `data.filters`; rewards that are not finite are refused by the
worker and by the broker already.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_bus import ConfigError
from lightning_bus.adapters import Row
from trainer.policy.model import check_tokenizer, check_weights
from trainer.serving.errors import WeightUpdateError
from trainer.serving.remote import RemoteEngine

log = logging.getLogger(__name__)

# Words, numbers, code, spaces, two scripts and an emoji: tokenizers that agree on all of these are one, or as good as one.
PROBE = 'The quick brown fox: 12 + 305 = 317.\n\tdef f(x): return {"key": [x, -1]}\n  Größe naïve 漢字 привет 🙂'


def refuse_unreadable(files: Sequence[str]) -> None:
    """Refuse a file of [train.sft] files that cannot be read."""
    for name in files:
        try:
            with open(name, encoding="utf-8"):
                pass
        except OSError as exc:
            raise ConfigError(
                f"[train.sft] files: {name} cannot be read from {Path.cwd()}: {exc.strerror}. Name it as it is seen from "
                "there, or by its whole path"
            ) from exc


def refuse_directory(directory: Path) -> None:
    """Refuse a model directory with a file missing or cut short, or with another model's tokenizer."""
    with as_config_error("this policy cannot be trained"):
        check_weights(directory)
        check_tokenizer(directory)


async def refuse_engine(engine: RemoteEngine, model_name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse an engine whose token ids mean something else than the trainer's: compares the ids of a fixed text.

    An engine that cannot be asked (no /tokenize route, no answer) is let pass, with a line in the log: whether it is
    there at all is for others to say.
    """
    try:
        theirs = await engine.tokenize(model_name, PROBE)
    except WeightUpdateError as exc:
        log.warning("whether %s has the trainer's tokenizer could not be asked: %s", engine.url, exc)
        return
    ours: list[int] = tokenizer.encode(PROBE, add_special_tokens=False)
    if theirs == ours:
        return
    at = next((n for n, (one, other) in enumerate(zip(theirs, ours, strict=False)) if one != other), None)
    place = min(len(theirs), len(ours)) if at is None else at
    raise ConfigError(
        f"the engine at {engine.url} and the trainer have different tokenizers: of the same text the engine makes "
        f"{len(theirs)} tokens and the trainer {len(ours)}, which differ from token {place} on "
        f"({theirs[place : place + 3]} there, {ours[place : place + 3]} here). Every recorded id would mean something "
        "else here. Serve the directory that is trained: the run's own policy/"
    )


def refuse_tokens(rows: Sequence[Row], model: PreTrainedModel) -> None:
    """Refuse rows with a token id that the model has no embedding for, naming the rollout."""
    size = model.config.get_text_config().vocab_size
    for row in rows:
        if (largest := int(row.token_ids.max(initial=0))) >= size:
            raise ConfigError(
                f"rollout {row.rollout_id} attempt {row.attempt} was recorded with token id {largest}, and the model has "
                f"{size}: it was sampled by another model. Train the model that the engines serve, or start a new run"
            )


def refuse_lengths(lengths: Sequence[int], token_budget: int) -> None:
    """Refuse a batch of which every row is longer than a forward pass may be. Where some fit, the others are counted."""
    if lengths and min(lengths) > token_budget:
        raise ConfigError(
            f"all {len(lengths)} rows of this batch are longer than [train] token_budget = {token_budget}, the longest "
            f"{max(lengths)} tokens, so nothing could be learnt. Raise it to {max(lengths)} or more (memory grows with "
            "it; [policy] recompute = true needs less), or have agents say less"
        )


@contextmanager
def as_config_error(what: str) -> Iterator[None]:
    """Turn a ValueError, or a package that is not installed, into a ConfigError that begins with `what`."""
    try:
        yield
    except (ValueError, ModuleNotFoundError) as exc:
        raise ConfigError(f"{what}: {exc}") from exc
