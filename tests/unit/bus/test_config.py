"""RUN.toml: what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from lightning_bus.config import BUS_SECTIONS, BrokerSection, CreditSection, RunSection, Section, load, to_toml_table
from lightning_bus.errors import ConfigError


class Limits(Section):
    rows_max: int = 3


class Extra(Section):
    bind: str = "127.0.0.1:1"
    path: str | None = None
    limits: Limits = Limits()


class Unknown(Section):
    pass


KINDS = {**BUS_SECTIONS, "extra": Extra}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_minimal_file_gets_all_defaults(tmp_path: Path) -> None:
    file = load(write(tmp_path, '[run]\nname = "x"'), KINDS)
    assert file.run == RunSection(name="x")
    assert file.section(BrokerSection) == BrokerSection()
    assert file.directory == Path("runs/x")


def test_what_is_written_back_reads_the_same(tmp_path: Path) -> None:
    file = load(write(tmp_path, '[run]\nname = "x"\n[extra.limits]\nrows_max = 7'), KINDS)
    again = load(write(tmp_path, tomli_w.dumps(to_toml_table(file))), KINDS)
    assert again.sections == file.sections


@pytest.mark.parametrize("agents", [["writer", "/^re/"], {"writer": "policy", "pipeline/critic": "critic"}])
def test_credit_names_agents_or_a_policy_for_each(tmp_path: Path, agents: Any) -> None:
    text = f'[run]\nname = "x"\n{tomli_w.dumps({"credit": {"rule": "turn", "lambda": 0.9, "agents": agents}})}'
    file = load(write(tmp_path, text), KINDS)
    assert file.section(CreditSection) == CreditSection(rule="turn", lambda_=0.9, agents=agents)
    assert load(write(tmp_path, tomli_w.dumps(to_toml_table(file))), KINDS).sections == file.sections


def test_overrides_lie_over_the_file(tmp_path: Path) -> None:
    file = load(write(tmp_path, '[run]\nname = "x"\nseed = 1'), KINDS, {"run": {"seed": 2}, "broker": {"lease_s": 3.0}})
    assert file.run == RunSection(name="x", seed=2)
    assert file.section(BrokerSection).lease_s == 3.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[run]", "run.name is required and missing"),
        ('[run]\nname = "x"\nsede = 1', "unknown key run.sede (did you mean seed?)"),
        ('[run]\nname = "x"\nseed = "one"', "run.seed: expected `int`, got `str`"),
        ('[run]\nname = "x"\n[brokr]', "unknown section [brokr] (did you mean broker?)"),
        ('[run]\nname = "x"\n[extra.limits]\nrows = 1', "unknown key extra.limits.rows"),
        ('[run]\nname = "x"\n[credit]\nlamda = 1.0', "unknown key credit.lamda (did you mean lambda?)"),
        ('[run]\nname = "x"\n[credit]\nrelevance = 2.0', "credit.relevance: expected `float` <= 1.0"),
        ('[run]\nname = "x"\n[credit]\nrule = "turns"', "Choose from: identical, turn, value, leave_one_out"),
        ("[run\n", "is not TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_path(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text), KINDS)
    assert says in str(caught.value)
    assert "run.toml" in str(caught.value)


def test_a_missing_file_and_a_directory_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "none.toml", KINDS)
    with pytest.raises(ConfigError, match="is a directory"):
        load(tmp_path, KINDS)


def test_a_section_that_no_package_brings_is_an_error(tmp_path: Path) -> None:
    file = load(write(tmp_path, '[run]\nname = "x"'), KINDS)
    with pytest.raises(ConfigError, match="no installed package knows a section of type Unknown"):
        file.section(Unknown)
