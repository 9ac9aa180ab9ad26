"""From [train.rl] to the algorithm that it names.

algorithm = "grpo"              one of ours, with [train.rl.options] for its fields
algorithm = "mine:Mine"         a class of your own, called with [train.rl.options]
algorithm = "passed:mine.Mine"  an object that was handed to Trainer(algorithm=…) and that nothing of the above can say
no algorithm                    what `loss`, `scale` and `normalise` say, compared by [credit] estimator
"""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec

from lightning_bus import ConfigError, CreditSection
from trainer.algorithms.base import Algorithm
from trainer.algorithms.policy_gradients import CISPO, GRPO, PolicyGradient, Reinforce
from trainer.config import ALGORITHMS, RlSection
from trainer.loading import import_named

PASSED = "passed:"


def algorithm_of(config: RlSection, credit: CreditSection) -> Algorithm:
    """Return the algorithm of a run, under its [credit]. Raises ConfigError naming key, value and way out."""
    if not config.algorithm:
        return _by_loss(config, credit).credited(credit)
    if config.algorithm.startswith(PASSED):
        raise ConfigError(
            f"this run learns by an object, {config.algorithm.removeprefix(PASSED)}, that a run file cannot describe: go on "
            "with Trainer(algorithm=that object).fit(resume=True). A dataclass in a module of its own can be described"
        )
    kind = import_named(ALGORITHMS.get(config.algorithm, config.algorithm), "train.rl.algorithm")
    if not (isinstance(kind, type) and issubclass(kind, Algorithm)):
        raise ConfigError(
            f"train.rl.algorithm = {config.algorithm!r} is no subclass of trainer.Algorithm. Write "
            "class Mine(Algorithm) with advantages(batch) and loss(inputs)."
        )
    return _made(kind, config).credited(credit)


def described(algorithm: Algorithm) -> dict[str, Any]:
    """Return the keys of [train.rl] that make such an algorithm, or say that TOML, or another process, cannot make it."""
    kind = type(algorithm)
    source, passed = f"{kind.__module__}:{kind.__qualname__}", f"{PASSED}{kind.__module__}.{kind.__qualname__}"
    if kind.__module__ == "__main__" or "<" in source:
        return {"algorithm": passed}
    if not dataclasses.is_dataclass(algorithm):
        plain = kind.__init__ is object.__init__ and not vars(algorithm)  # made of nothing, and nothing was put on it
        return {"algorithm": source if plain else passed}
    fields = [field for field in dataclasses.fields(algorithm) if field.init and field.name != "credit"]
    given = {field.name: getattr(algorithm, field.name) for field in fields}
    options = {field.name: given[field.name] for field in fields if given[field.name] != field.default}
    if any(value is None for value in options.values()):
        return {"algorithm": passed}
    names = {path: name for name, path in ALGORITHMS.items()}
    return {"algorithm": names.get(source, source), "options": msgspec.to_builtins(options)}


def can_be_described(algorithm: Algorithm) -> bool:
    """Whether a run file can say all of this algorithm, so that another process makes the same one."""
    return not described(algorithm)["algorithm"].startswith(PASSED)


def _by_loss(config: RlSection, credit: CreditSection) -> PolicyGradient:
    how: Any = {"estimator": credit.estimator, "scale": config.scale, "normalise": config.normalise}
    if config.loss == "ppo_clip":
        return GRPO(clip_high=0.28, **how)
    return {"cispo": CISPO, "reinforce": Reinforce}[config.loss](**how)


def _made(kind: type[Algorithm], config: RlSection) -> Algorithm:
    options: dict[str, Any] = dict(config.options)
    if dataclasses.is_dataclass(kind):
        known = [field.name for field in dataclasses.fields(kind) if field.init and field.name != "credit"]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ConfigError(
                f"train.rl.options.{unknown[0]} is no option of {config.algorithm}. Known: {', '.join(known)}."
            )
        try:
            return msgspec.convert(options, kind)
        except msgspec.ValidationError as exc:
            raise ConfigError(f"train.rl.options of {config.algorithm}: {exc}") from exc
    try:
        return kind(**options)
    except Exception as exc:  # the class is the user's: whatever it raises is for the user to read
        raise ConfigError(
            f"train.rl.algorithm = {config.algorithm!r} with options {options} raised {type(exc).__name__}: {exc}"
        ) from exc
