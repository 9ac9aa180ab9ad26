"""What `lightning-bus serve` refuses before anything starts, and how a refusal reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_bus import cli

CALC = Path(__file__).resolve().parents[3] / "examples" / "calc"
RUN = """
[run]
name = "mini"
directory = "{directory}"
[policy]
model = "examples.calc.policy:build"
[gateway]
upstreams = ["http://127.0.0.1:9100"]
[serve]
bind = "127.0.0.1:9100"
{serve}
[worker]
agent = "examples.calc.agent:agent"
[train]
tasks = "examples.calc.tasks:train"
held_out = "examples.calc.tasks:held_out"
"""


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run `serve` and return what it says on leaving with exit code 2."""
    with pytest.raises(SystemExit) as left:
        cli.main(["serve", *argv])
    said = capsys.readouterr().err
    assert left.value.code == 2, said
    return said


@pytest.mark.parametrize(
    ("serve", "argv", "said"),
    [
        ("", ["--version", "3"], "--version 3 needs an address of its own: --bind HOST:PORT"),
        ("", ["--version", "3", "--bind", "127.0.0.1:9100"], "not one of the run's engines (127.0.0.1:9100"),
        ("", ["--replicas", "2"], "serve.replicas = 2 is for vLLM"),
        ("", ["--engine", "vllm", "--replicas", "2"], "upstreams does not name http://127.0.0.1:9101"),
        ("", ["--engine", "sglang"], "Invalid enum value 'sglang'"),
        ('scripted = { teacher = "examples.calc.teacher:reply" }', ["--engine", "vllm"], "does not name http://127.0.0.1:9101"),
        ('python = "nowhere"', ["--engine", "vllm"], "serve.python 'nowhere' is not there. `make vllm`"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], serve: str, argv: list[str], said: str
) -> None:
    run_toml = tmp_path / "run.toml"
    run_toml.write_text(RUN.format(directory=tmp_path, serve=serve))
    assert said in refusal(capsys, "--run", str(run_toml), *argv)


def test_a_model_has_to_be_named_and_a_version_belongs_to_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert "which model? Give a model directory, or --run" in refusal(capsys)
    assert "a version of which run? Give --run" in refusal(capsys, "some/model", "--version", "3")


def test_the_demo_on_vllm_is_the_demo_with_another_engine() -> None:
    one, other = (cli.load(CALC / name, cli.sections()) for name in cli.DEMO_FILES.values())
    kinds = [type(section) for section in one.sections.values()]
    differ = {kind.__name__ for kind in kinds if one.section(kind) != other.section(kind)}
    assert differ == {"RunSection", "GatewaySection", "ServeSection"}
