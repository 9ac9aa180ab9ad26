"""The drawing of the house: which module may import which. It reads the imports and runs nothing.

    workers ──► lightning_bus ◄── trainer       through the public face only; the two never see each other
    examples ──► public faces of all three       tests, bench ──► anything; nobody imports the three

Inside the bus every module stands on a floor and imports only from lower ones, or from its own subpackage. Floors 0
to 3 are pure, which is what lets a simulator drive the real broker. torch lives in the trainer, and not in those of
its modules that the command line loads. Only imports that stand in the code are seen, not those made at run time by
importlib; and what runs only while type-checking counts too, because it is read as a dependency all the same.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("lightning_bus", "workers", "trainer", "examples")
OUTSIDERS = ("tests", "bench")  # they import anything and nobody imports them

FLOORS = {
    "lightning_bus.errors": 0,
    "lightning_bus.clock": 1,
    "lightning_bus.config": 1,
    "lightning_bus.lifecycle": 1,
    "lightning_bus.resources": 1,
    "lightning_bus.spans": 1,
    "lightning_bus.tokens": 1,
    "lightning_bus.records": 1,
    "lightning_bus.leases": 2,
    "lightning_bus.log.codec": 2,
    "lightning_bus.log.retention": 2,
    "lightning_bus.messages": 2,
    "lightning_bus.adapters": 3,
    "lightning_bus.broker.access": 3,
    "lightning_bus.broker.core": 3,
    "lightning_bus.broker.deadlines": 3,
    "lightning_bus.broker.effects": 3,
    "lightning_bus.broker.letters": 3,
    "lightning_bus.broker.moves": 3,
    "lightning_bus.broker.producers": 3,
    "lightning_bus.broker.ready": 3,
    "lightning_bus.broker.register": 3,
    "lightning_bus.broker.rollouts": 3,
    "lightning_bus.broker.shelf": 3,
    "lightning_bus.broker.state": 3,
    "lightning_bus.broker.waits": 3,
    "lightning_bus.otel.names": 2,
    "lightning_bus.otel.rewards": 2,
    "lightning_bus.otel.sink": 2,
    "lightning_bus.otel.traceparent": 2,
    "lightning_bus.otel.attributes": 3,
    "lightning_bus.otel.convert": 3,
    "lightning_bus.otel.otlp": 3,
    "lightning_bus.otel.otlp_json": 3,
    "lightning_bus.otel.tree": 3,
    "lightning_bus.wire": 3,
    "lightning_bus.daemon": 4,
    "lightning_bus.http": 4,
    "lightning_bus.keys": 4,
    "lightning_bus.log": 4,
    "lightning_bus.transport": 4,
    "lightning_bus.broker": 5,
    "lightning_bus.client": 5,
    "lightning_bus.gateway": 6,
    "lightning_bus.otel": 6,
    "lightning_bus.otel.ingest": 4,
    "lightning_bus.rescoring": 6,
    "lightning_bus": 7,  # the face itself; a new module must be given its floor above
    "lightning_bus.display": 8,
    "lightning_bus.readiness": 4,
    "lightning_bus.supervisor": 8,
    "lightning_bus.cli_shared": 8,
    "lightning_bus.cli_show": 9,
    "lightning_bus.cli_keys": 10,
    "lightning_bus.cli_queue": 10,
    "lightning_bus.cli_replay": 9,
    "lightning_bus.cli_tools": 10,
    "lightning_bus.cli": 11,
}
FACE_FLOOR = FLOORS["lightning_bus"]
PURE_FLOOR_MAX = 3
IMPURE = frozenset(
    {"anyio", "asyncio", "datetime", "httpx", "lmdb", "os", "random", "secrets", "select", "socket", "subprocess", "threading", "time", "uuid", "zmq"}
)  # fmt: skip
CLOCK = "lightning_bus.clock"

PUBLIC = {
    "workers": {"lightning_bus", "lightning_bus.adapters", "lightning_bus.otel"},
    "trainer": {"lightning_bus", "lightning_bus.adapters"},
    "examples": {"lightning_bus", "lightning_bus.adapters", "lightning_bus.otel", "workers", "trainer"},
    "lightning_bus": set[str](),
}
TORCH = frozenset({"torch", "transformers", "safetensors", "flash_attn", "liger_kernel", "peft"})
TORCH_FREE = (
    "trainer",
    "trainer.config",
    "trainer.metrics",
    "trainer.cli",
    "trainer.cli_weights",
    "trainer.algorithms.apo",
)


@dataclass(frozen=True)
class Import:
    """`importer` imports `module`."""

    importer: str
    module: str
    line: int
    relative: bool = False

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.module}"


@dataclass(frozen=True)
class House:
    """Every module of the tree, and what it imports."""

    modules: frozenset[str]
    imports: tuple[Import, ...]


# -- the claims ---------------------------------------------------------------------------------------------------


def test_imports_are_absolute(house: House) -> None:
    assert not relative_imports(house)


def test_every_module_of_the_bus_imports_downwards(house: House) -> None:
    assert not upward_imports(house)


def test_every_module_of_the_bus_has_a_floor(house: House) -> None:
    assert not modules_without_floor(house)


def test_packages_meet_only_at_public_faces(house: House) -> None:
    assert not trespasses(house)


def test_floors_0_to_3_do_no_io_and_read_no_clock(house: House) -> None:
    assert not impurities(house)


def test_torch_lives_in_the_trainer_only(house: House) -> None:
    assert not torch_outside(house)


def test_no_module_imports_itself_in_a_circle(house: House) -> None:
    assert cycle(house) is None


def test_nobody_imports_tests_or_bench(house: House) -> None:
    assert not [str(i) for i in house.imports if top(i.module) in OUTSIDERS]


# -- tests of the test: each violation, planted in a small tree, is found ---------------------------------------------

SOUND = {
    "lightning_bus/__init__.py": "from lightning_bus.client import Client",
    "lightning_bus/errors.py": "",
    "lightning_bus/clock.py": "import time",
    "lightning_bus/spans.py": "import msgspec\nfrom lightning_bus.errors import X",
    "lightning_bus/broker/__init__.py": "",
    "lightning_bus/broker/core.py": "from lightning_bus import spans as s",
    "lightning_bus/broker/server.py": "import anyio\nfrom lightning_bus.broker import core",
    "lightning_bus/client.py": "import anyio\nfrom lightning_bus.spans import Span",
    "lightning_bus/adapters/__init__.py": "from lightning_bus.adapters.credit import credit",
    "lightning_bus/adapters/credit.py": "from lightning_bus.spans import Span",
    "workers/__init__.py": "",
    "workers/runtime.py": "import anyio\nfrom lightning_bus import Client",
    "trainer/__init__.py": "",
    "trainer/config.py": "import msgspec",
    "trainer/step.py": "import torch\nfrom lightning_bus import Client, adapters\nfrom trainer.config import Train",
    "examples/__init__.py": "",
    "examples/calc.py": "import openai",
}


def test_a_sound_tree_is_sound(tmp_path: Path) -> None:
    house = plant(tmp_path, {})
    assert faults(house) == []


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("lightning_bus/spans.py", "from .errors import X", "relative"),
        ("lightning_bus/spans.py", "from lightning_bus.client import Client", "floor 1"),
        ("lightning_bus/spans.py", "from lightning_bus import client", "floor 1"),
        ("lightning_bus/spans.py", "def f():\n    import lightning_bus.client", "floor 1"),
        ("lightning_bus/client.py", "from lightning_bus import Client", "floor 5"),
        ("lightning_bus/client.py", "from lightning_bus.broker import server", "floor 5"),
        ("lightning_bus/new.py", "", "lightning_bus.new has no floor"),
        ("lightning_bus/spans.py", "import time", "pure"),
        ("lightning_bus/broker/core.py", "from anyio import Event", "pure"),
        ("lightning_bus/client.py", "import trainer.step", "public face"),
        ("lightning_bus/client.py", "import torch", "torch"),
        ("trainer/step.py", "from lightning_bus.client import Client", "public face"),
        ("trainer/step.py", "from lightning_bus import client", "public face"),
        ("trainer/step.py", "import workers", "public face"),
        ("workers/runtime.py", "from trainer.step import f", "public face"),
        ("workers/runtime.py", "import examples.calc", "public face"),
        ("examples/calc.py", "from workers.runtime import f", "public face"),
        ("workers/runtime.py", "import transformers", "torch"),
        ("trainer/config.py", "import torch", "torch"),
        ("trainer/config.py", "from trainer.step import f", "circle"),
        ("trainer/step.py", "import tests.helpers", "tests"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, file: str, source: str, fault: str) -> None:
    found = faults(plant(tmp_path, {file: source}))
    assert any(fault in text for text in found), found


# -- how it is done -----------------------------------------------------------------------------------------------


def relative_imports(house: House) -> list[str]:
    return [f"{i}: relative; write the whole name" for i in house.imports if i.relative]


def upward_imports(house: House) -> list[str]:
    found: list[str] = []
    for i in house.imports:
        if top(i.importer) != "lightning_bus" or top(i.module) != "lightning_bus":
            continue
        here, there = floor(i.importer), floor(i.module)
        if there >= here and household(i.importer) != household(i.module):
            found.append(f"{i}: from floor {here} to floor {there}")
    return found


def modules_without_floor(house: House) -> list[str]:
    return [
        f"{module} has no floor: give it one in FLOORS"
        for module in sorted(house.modules)
        if top(module) == "lightning_bus" and module != "lightning_bus" and floor(module) == FACE_FLOOR
    ]


def trespasses(house: House) -> list[str]:
    return [
        f"{i}: not a public face of another package"
        for i in house.imports
        if top(i.module) in PACKAGES and top(i.module) != top(i.importer) and i.module not in PUBLIC[top(i.importer)]
    ]


def impurities(house: House) -> list[str]:
    return [
        f"{i}: floor {floor(i.importer)} is pure"
        for i in house.imports
        if top(i.importer) == "lightning_bus"
        and floor(i.importer) <= PURE_FLOOR_MAX
        and i.importer != CLOCK
        and top(i.module) in IMPURE
    ]


def torch_outside(house: House) -> list[str]:
    return [
        f"{i}: torch lives in the trainer, outside {', '.join(TORCH_FREE)}"
        for i in house.imports
        if top(i.module) in TORCH and (top(i.importer) in ("lightning_bus", "workers") or i.importer in TORCH_FREE)
    ]


def cycle(house: House) -> list[str] | None:
    """Return the modules of a circle, or None."""
    graph: dict[str, set[str]] = {module: set() for module in house.modules}
    for i in house.imports:
        if i.module in house.modules and i.module != i.importer:
            graph[i.importer].add(i.module)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        return exc.args[1]
    return None


def faults(house: House) -> list[str]:
    """Return everything that is wrong with a tree."""
    circle = cycle(house)
    return [
        *relative_imports(house), *upward_imports(house), *modules_without_floor(house), *trespasses(house),
        *impurities(house), *torch_outside(house), *([f"circle: {' → '.join(circle)}"] if circle else []),
        *(f"{i}: nobody imports tests or bench" for i in house.imports if top(i.module) in OUTSIDERS),
    ]  # fmt: skip


def top(module: str) -> str:
    return module.partition(".")[0]


def prefix(module: str) -> str:
    """Return the longest prefix of a module of the bus that has a floor."""
    while module not in FLOORS:
        module = module.rpartition(".")[0]
    return module


def floor(module: str) -> int:
    return FLOORS[prefix(module)]


def household(module: str) -> tuple[str, int]:
    """Modules of one subpackage on one floor may import each other; a lone module is a household of its own."""
    parts = module.split(".")
    return (".".join(parts[:2]) if len(parts) > 1 else module, floor(module))


def read_house(root: Path) -> House:
    files = [file for package in PACKAGES for file in sorted((root / package).rglob("*.py"))]
    assert files, f"no packages under {root}"
    modules = frozenset(module_name(root, file) for file in files)
    return House(modules, tuple(i for file in files for i in imports_of(root, file, modules)))


def module_name(root: Path, file: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(root: Path, file: Path, modules: frozenset[str]) -> Iterator[Import]:
    """Yield the imports of a file; `from package import module` counts as an import of that module."""
    importer = module_name(root, file)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                yield Import(importer, "." * node.level + base, node.lineno, relative=True)
                continue
            inner = [f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in modules]
            for module in inner:
                yield Import(importer, module, node.lineno)
            if len(inner) < len(node.names):
                yield Import(importer, base, node.lineno)


def plant(root: Path, changes: dict[str, str]) -> House:
    """Return the house of a small sound tree in which `changes` were made."""
    for name, source in {**SOUND, **changes}.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    return read_house(root)


@pytest.fixture(scope="module")
def house() -> House:
    return read_house(ROOT)
