"""The model registry: every weight version that a run has published, and which of them are pinned.

    newest(bus)  get(bus, 12)  versions(bus)      the records, from the bus
    read_log(run_directory)                       the same of a run that is stopped, from its log
    tensors_of(version)                           the weights themselves
    pin(bus, 12)  unpin(bus, 12)  pinned(bus)     whose files stay
    newest(bus, "critic")  …                      of several policies in one log, each with versions of its own

A version is a resource on the bus, so its record never changes; its weights lie in the checkpoint that was written
before it was published. Pins are a resource too: each of its versions is the whole list, so its history tells who was
pinned when. The trainer reads them before it drops a checkpoint.

torch is imported by `tensors_of` alone: whoever only lists versions does not wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import msgspec

from lightning_bus import (
    POLICY,
    CallError,
    Client,
    Conflict,
    CreditSection,
    LogReader,
    NotFound,
    Pins,
    Resource,
    RunFile,
    WeightVersion,
    pins_of,
    policy_of,
    weights_of,
)
from trainer.config import PolicySection

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T", bound=msgspec.Struct)

PAGE = 256  # records asked for at once: they travel together, and each names every call it was trained on
PIN_TRIES = 16  # of a change of the pins while others change them too


@dataclass(frozen=True, slots=True)
class Registry:
    """What was known at one moment: versions by number, oldest first, and the numbers of the pinned ones."""

    versions: dict[int, WeightVersion] = field(default_factory=dict[int, WeightVersion])
    pins: frozenset[int] = frozenset()
    policy: str = POLICY

    @property
    def newest(self) -> WeightVersion | None:
        return next(reversed(self.versions.values()), None)

    def get(self, number: int) -> WeightVersion:
        """Return a version. Raises NotFound."""
        if number not in self.versions:
            raise _unknown(number, self.newest)
        return self.versions[number]


def published_as(run: RunFile) -> str:
    """Return the name under which a run publishes its versions: its policy's where [credit] agents names several.

    A run with one policy publishes it as "policy", whatever its agents call it.
    """
    credit = next((one for one in run.sections.values() if isinstance(one, CreditSection)), CreditSection())
    return run.section(PolicySection).name if len(credit.policies) > 1 else POLICY


async def newest(bus: Client, policy: str = POLICY) -> WeightVersion | None:
    """Return the newest published version of a policy; None before the first."""
    return _decode(await bus.get(weights_of(policy)), WeightVersion)


async def get(bus: Client, number: int, policy: str = POLICY) -> WeightVersion:
    """Return a published version. Raises NotFound, saying which there are."""
    version = _decode(await bus.get(weights_of(policy), number), WeightVersion) if number >= 0 else None
    if version is None:
        raise _unknown(number, await newest(bus, policy))
    return version


async def publish(bus: Client, version: WeightVersion, policy: str = POLICY) -> None:
    """Say on the bus that these weights are the version of their number; said again, for a resumed run, it is a no-op.

    Raises Conflict when that number is another set of weights: then two trainers publish one policy.
    """
    known = _decode(await bus.get(weights_of(policy), version.version), WeightVersion)
    if known is None:
        await bus.put(Resource(weights_of(policy), version.version, msgspec.msgpack.encode(version)))
    elif known.checksum != version.checksum and _algorithm(known) == _algorithm(version):
        raise Conflict(
            f"version {version.version} of {policy} is published with checksum {known.checksum}, and this trainer made "
            f"{version.checksum}: another trainer publishes under the same name. Each of several policies of one log needs "
            "a name of its own in [credit] agents and [policy] name."
        )


async def versions(bus: Client, *, last: int | None = None, policy: str = POLICY) -> list[WeightVersion]:
    """Return the published versions, oldest first; only those of the `last` numbers where that is given."""
    latest = await newest(bus, policy)
    if latest is None:
        return []
    first = 0 if last is None else max(0, latest.version + 1 - last)
    numbers = range(first, latest.version + 1)
    found: dict[int, WeightVersion] = {}

    async def ask(number: int) -> None:
        version = _decode(await bus.get(weights_of(policy), number), WeightVersion)
        if version is not None:  # a version that was trained but never published left its number unused
            found[number] = version

    for start in range(0, len(numbers), PAGE):
        async with anyio.create_task_group() as tasks:
            for number in numbers[start : start + PAGE]:
                tasks.start_soon(ask, number)
    return [found[number] for number in sorted(found)]


async def read_bus(bus: Client, *, last: int | None = None, policy: str = POLICY) -> Registry:
    """Return what the bus knows: all versions, or those of the `last` numbers and the pinned ones."""
    pins = await pinned(bus, policy)
    known = {version.version: version for version in await versions(bus, last=last, policy=policy)}
    for number in pins - known.keys():
        known[number] = await get(bus, number, policy)
    return Registry(dict(sorted(known.items())), pins, policy)


def read_log(run_directory: Path, policy: str = POLICY) -> Registry:
    """Return what the log of a run tells, while a broker writes it or after. Raises CallError where there is no log."""
    known: dict[int, WeightVersion] = {}
    pins: Resource | None = None
    with LogReader(run_directory / "log") as log:
        for resource in log.resources():
            if resource.name == weights_of(policy):
                known[resource.version] = msgspec.msgpack.decode(resource.body, type=WeightVersion)
            elif resource.name == pins_of(policy) and (pins is None or resource.version > pins.version):
                pins = resource
    return Registry(dict(sorted(known.items())), _numbers(_decode(pins, Pins)), policy)


def policies_in(run_directory: Path) -> list[str]:
    """Return the policies that have versions in the log of a run. Raises CallError where there is no log."""
    with LogReader(run_directory / "log") as log:
        return sorted({policy for resource in log.resources() if (policy := policy_of(resource.name)) is not None})


# -- pins ---------------------------------------------------------------------------------------------------------


async def pinned(bus: Client, policy: str = POLICY) -> frozenset[int]:
    """Return the numbers of the pinned versions."""
    return _numbers(_decode(await bus.get(pins_of(policy)), Pins))


async def pin(bus: Client, number: int, run_directory: Path | None = None, policy: str = POLICY) -> bool:
    """Have a version's file kept from now on; False when it was pinned already.

    Raises NotFound for a version that was never published, and, with the run's directory at hand, Conflict when its
    file is gone: the pin is not left behind then.
    """
    version = await get(bus, number, policy)
    added = await _change_pins(bus, policy, add=number)
    # Looked for after the pin is known, for until then the trainer may drop it.
    if run_directory is not None and find_file(version, run_directory) is None:
        await _change_pins(bus, policy, remove=number)
        raise Conflict(
            f"version {number} cannot be kept: {version.path or 'its file'} is gone. A run keeps the newest [train] "
            "keep_checkpoints and what was pinned in time."
        )
    return added


async def unpin(bus: Client, number: int, policy: str = POLICY) -> bool:
    """Let a version's file go when its time comes; False when it was not pinned."""
    return await _change_pins(bus, policy, remove=number)


async def files_to_keep(bus: Client, run_directory: Path, policy: str = POLICY) -> set[Path]:
    """Return what retention must leave: the files of pinned versions, and the newest's, for replicas start from it."""
    latest = await newest(bus, policy)
    wanted = [await get(bus, number, policy) for number in await pinned(bus, policy)]
    wanted += [] if latest is None else [latest]
    found = [find_file(version, run_directory) for version in wanted]
    return {path for path in found if path is not None}


async def _change_pins(bus: Client, policy: str, *, add: int | None = None, remove: int | None = None) -> bool:
    for _ in range(PIN_TRIES):
        resource = await bus.get(pins_of(policy))
        before = _numbers(_decode(resource, Pins))
        after = (before | ({add} if add is not None else set())) - ({remove} if remove is not None else set())
        if after == before:
            return False
        number = 0 if resource is None else resource.version + 1
        try:
            await bus.put(Resource(pins_of(policy), number, msgspec.msgpack.encode(Pins(sorted(after)))))
        except Conflict:
            continue  # someone else published that version of the list first: change theirs
        return True
    raise Conflict(f"the pins changed {PIN_TRIES} times while this change was tried. Try again.")


# -- weights ------------------------------------------------------------------------------------------------------


def find_file(version: WeightVersion, run_directory: Path | None = None) -> Path | None:
    """Return the checkpoint or model directory that holds a version, or None when it is gone.

    A run's directory may have been moved since: what is not where the record says is looked for there.
    """
    if not version.path:
        return None
    said = Path(version.path)
    places = [said]
    if run_directory is not None:
        places += [run_directory / said, run_directory / "checkpoints" / said.name, run_directory / said.name]
    return next((place for place in places if place.exists()), None)


def file_of(version: WeightVersion, run_directory: Path | None = None) -> Path:
    """As `find_file`. Raises NotFound when the file is gone."""
    path = find_file(version, run_directory)
    if path is None:
        raise NotFound(
            f"the weights of version {version.version} are gone: {version.path or 'no place was recorded'} does not "
            "exist. Pin versions that are to stay: lightning-bus weights pin N"
        )
    return path


def tensors_of(version: WeightVersion, run_directory: Path | None = None) -> Mapping[str, Tensor]:
    """Return the weights of a version by name, as float32 master weights; a checkpoint's are mapped, not copied.

    Of a run that trains an adapter, the base that it began with and the version's adapter in one. Raises NotFound when
    the file is gone, and ValueError when it is damaged or holds another version.
    """
    return with_base(*_stored_weights(version, run_directory))


def adapter_of(version: WeightVersion, run_directory: Path | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what peft's adapter_config.json says of a version's adapter, and its matrices by peft's names.

    Raises as `tensors_of`, and ValueError for a version that is a whole model.
    """
    from trainer.policy.lora import peft_names, read_config
    from trainer.policy.model import is_adapter_weight

    weights, path = _stored_weights(version, run_directory)
    if not all(is_adapter_weight(name) for name in weights):
        raise ValueError(
            f"{path} holds a whole model and no adapter: version {version.version} was trained without one"
        )
    return read_config(path.parent), peft_names(weights)


def _stored_weights(version: WeightVersion, run_directory: Path | None) -> tuple[Mapping[str, Tensor], Path]:
    from trainer.optimize import checkpoint
    from trainer.policy.model import load_policy, named_weights
    from trainer.serving.weights import weights_checksum

    path = file_of(version, run_directory)
    if path.is_dir():
        weights = dict(named_weights(load_policy(path)))
    else:
        stored = checkpoint.read(path)
        check_is(version, path, stored.extra)
        weights = stored.weights
    found = weights_checksum(weights)
    if _algorithm(version) == found.partition(":")[0] and version.checksum != found:
        raise ValueError(
            f"{path} has checksum {found}, version {version.version} was published with {version.checksum}: it was changed"
        )
    return weights, path


def with_base(weights: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor]:
    """Return the whole model of a checkpoint's weights: they may be an adapter's, whose base the run began with."""
    from trainer.policy.lora import merged_from, read_config
    from trainer.policy.model import is_adapter_weight

    if not any(is_adapter_weight(name) for name in weights):
        return weights
    return merged_from(weights, read_config(path.parent), path.parent.parent / "policy")


def check_is(version: WeightVersion, path: Path, extra: Mapping[str, Any]) -> None:
    """Raise ValueError when a checkpoint's own notes say that it holds another version."""
    if extra.get("version") != version.version:
        raise ValueError(
            f"{path} holds version {extra.get('version')}, not {version.version}: it was written again since"
        )


def _algorithm(version: WeightVersion) -> str:
    return version.checksum.partition(":")[0]


def _decode(resource: Resource | None, kind: type[T]) -> T | None:
    return None if resource is None else msgspec.msgpack.decode(resource.body, type=kind)


def _numbers(pins: Pins | None) -> frozenset[int]:
    return frozenset() if pins is None else frozenset(pins.versions)


def _unknown(number: int, latest: WeightVersion | None) -> CallError:
    there = "none is published yet" if latest is None else f"there are versions up to {latest.version}"
    return NotFound(f"there is no weight version {number}: {there}. See: lightning-bus weights list")
