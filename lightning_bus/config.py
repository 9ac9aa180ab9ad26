"""RUN.toml: one file that configures every process of a run.

Each section is a frozen struct that lives next to what it configures; the bus owns [run], [broker], [gateway] and
[credit], and other packages bring theirs through the entry-point group `lightning_bus.sections` (`cli.sections()`
collects them). Unknown keys and wrong types are refused with the key's path, so a typo never silently means the default.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import msgspec

from lightning_bus.errors import ConfigError

T = TypeVar("T")


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections of RUN.toml."""


S = TypeVar("S", bound=Section)


class RunSection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[run]: what is this run called, and where does it live."""

    name: str
    seed: int = 0
    directory: str = "runs"  # the run's files go to <directory>/<name>


class BrokerSection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[broker]: the log's only writer."""

    bind: str = "tcp://127.0.0.1:4750"
    lease_s: float = 10.0  # silence after which an attempt is given to another worker; beats come 5 times as often
    max_attempts: int = 5  # per rollout, where the submitter does not say
    map_bytes_max: int = 1 << 40  # largest segment the log may grow to; address space, not disk
    segment_bytes: int = 4 << 30  # the log goes on in a new file after this
    retain_s: float = 0.0  # drop segments whose newest record is older; 0: keep for ever
    retain_bytes: int = 0  # drop the oldest segments while the log is larger; 0: no limit
    drop_read: bool = False  # drop segments that every cursor has passed
    queued_max: int = 1_000_000  # rollouts waiting for a worker; above this SUBMIT is answered BUSY
    keys: str = ""  # directory of keys (lightning-bus keys create): connections are encrypted and roles enforced
    drain_s: float = 10.0  # how long a broker that is told to stop lets workers end what they hold


class GatewaySection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[gateway]: the OpenAI-compatible door that agents call."""

    bind: str = "127.0.0.1:4751"
    upstreams: list[str] = msgspec.field(default_factory=lambda: ["http://127.0.0.1:4752"])
    admission_wait_s: float = 60.0  # how long a call waits for an engine that is restarting or swapping weights
    request_limit_s: float = 120.0  # one model call, queueing in the engine included
    body_bytes_max: int = 4 << 20
    calls_per_attempt_max: int = 64  # model calls of one attempt at a time; the next is answered 429
    health_check_s: float = 2.0  # how often each engine is asked whether it is well
    overrides: dict[str, Any] = {}  # request fields to set for every call, such as top_p = 1.0; a submission's own win


class CreditSection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[credit]: whose model calls are trained, and what each is worth. Formulas: `lightning_bus.adapters.credit`."""

    # identical: every call gets the rollout's return. turn: its own reward and a share of the final one. leave_one_out:
    # compared with the other rollouts that came to the same state. value: by a critic.
    rule: Literal["identical", "turn", "value", "leave_one_out"] = "identical"
    relevance: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5  # turn: share of the final reward before the last turn
    gamma: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0  # discount for each turn to the end
    lambda_: Annotated[float, msgspec.Meta(ge=0, le=1)] = msgspec.field(default=1.0, name="lambda")  # value: of GAE
    # How a group's rollouts are compared, for identical and turn. train.rl.scale divides grpo by the group's spread.
    estimator: Literal["grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "maxrl"] = "grpo"
    # Whose calls are trained: names, paths as "pipeline/writer", regular expressions as "/^re/"; or a policy for each,
    # {writer = "policy", "/critic/" = "critic"}. None: everybody's.
    agents: list[str] | dict[str, str] = []
    # Answers cut off at a token limit: keep trains them, mask leaves the answer out, drop the whole rollout.
    truncated: Literal["keep", "mask", "drop"] = "keep"

    @property
    def policies(self) -> frozenset[str]:
        """The policies that `agents` names; none where it names agents only."""
        return frozenset(self.agents.values()) if isinstance(self.agents, dict) else frozenset()


BUS_SECTIONS: dict[str, type[Section]] = {
    "run": RunSection,
    "broker": BrokerSection,
    "gateway": GatewaySection,
    "credit": CreditSection,
}


@dataclass(frozen=True, slots=True)
class RunFile:
    """A validated RUN.toml."""

    path: Path
    sections: dict[str, Section]

    def section(self, kind: type[T]) -> T:
        """Return the section of that type; defaults where the file does not mention it."""
        for section in self.sections.values():
            if isinstance(section, kind):
                return section
        raise ConfigError(f"{self.path}: no installed package knows a section of type {kind.__name__}")

    @property
    def run(self) -> RunSection:
        return self.section(RunSection)

    @property
    def directory(self) -> Path:
        """Where this run's files are."""
        return Path(self.run.directory) / self.run.name


def load(
    path: Path, kinds: Mapping[str, type[Section]], overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> RunFile:
    """Return the validated run file, `overrides` (section → key → value) laid over it.

    Raises ConfigError naming file, key path and way out when the file is missing, is not TOML, or holds a key or a
    value that no section knows.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Copy examples/calc/run.toml and change it.") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory. Give the path of a RUN.toml.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is not TOML: {exc}. Strings need quotes; see examples/calc/run.toml.") from exc
    for name, keys in (overrides or {}).items():
        table[name] = {**table.get(name, {}), **keys}
    unknown = sorted(set(table) - set(kinds))
    if unknown:
        raise ConfigError(
            f"{path}: unknown section [{unknown[0]}]{_did_you_mean(unknown[0], kinds)}. Known: {', '.join(kinds)}."
        )
    return RunFile(path, {name: _section(path, name, kind, table.get(name, {})) for name, kind in kinds.items()})


def load_section(path: Path, name: str, kind: type[S], default: S | None = None) -> S:
    """Return one section of a run file, whatever else stands in it.

    default  where the file or the section is not there; None: the section's own defaults

    Raises ConfigError as `load` does.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        table = {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is not TOML: {exc}. Strings need quotes; see examples/calc/run.toml.") from exc
    if default is not None and name not in table:
        return default
    return cast(S, _section(path, name, kind, table.get(name, {})))


def to_toml_table(file: RunFile) -> dict[str, Any]:
    """Return the whole configuration, defaults spelled out, as plain tables without None (TOML has none)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in cast(dict[str, Any], value).items() if v is not None}
        if isinstance(value, list):
            return [plain(item) for item in cast(list[Any], value)]
        return value

    return {name: plain(msgspec.to_builtins(section)) for name, section in file.sections.items()}


def _section(path: Path, name: str, kind: type[Section], table: Any) -> Section:
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{path}: {_explain(str(exc), name, kind, table)}") from exc


def _explain(message: str, name: str, kind: type[Section], table: Any) -> str:
    """Turn msgspec's «… - at `$.a.b`» into the key's path in the file, its value, and what it may be."""
    reason, _, where = message.partition(" - at `$")
    where = where.rstrip("`")
    key = name + where
    expected = _type_at(kind, where)
    unknown = re.search(r"unknown field `(.+)`", reason)
    if unknown:
        field = unknown.group(1)
        known = [f.encode_name for f in msgspec.structs.fields(expected)] if _is_struct(expected) else []
        return f"unknown key {key}.{field}{_did_you_mean(field, known)}." + (
            f" Known: {', '.join(known)}." if known else ""
        )
    missing = re.search(r"missing required field `(.+)`", reason)
    if missing:
        return f"{key}.{missing.group(1)} is required and missing."
    choices = f" Choose from: {', '.join(map(str, get_args(expected)))}." if get_origin(expected) is Literal else ""
    return f"{key}: {reason[0].lower()}{reason[1:]}; the value is {_value_at(table, where)!r:.80}.{choices}"


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _type_at(kind: Any, where: str) -> Any:
    """Return the type of the key that a path such as ".rl.loss" or ".rules[0].on" leads to; None inside of a dict."""
    for part in where.split(".")[1:]:
        name, *indices = part.split("[")
        kind = get_type_hints(kind).get(name) if _is_struct(kind) else None
        for _ in indices:
            kind = get_args(kind)[0] if get_origin(kind) is list else None
    return kind


def _value_at(table: Any, where: str) -> Any:
    """Return the value that such a path leads to, or the innermost that holds it."""
    for part in re.findall(r"[^.\[\]]+", where):
        if isinstance(table, list) and part.isdecimal():
            table = cast(list[Any], table)[int(part)]
        elif isinstance(table, dict) and part in table:
            table = cast(dict[str, Any], table)[part]
        else:
            break
    return cast(Any, table)


def _did_you_mean(word: str, known: Mapping[str, Any] | list[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
