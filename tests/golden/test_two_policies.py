"""Two policies over one recorded log: each learns from its own agents' calls, at its own pace, under its own versions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bus import (
    BlockingClient,
    Conflict,
    CreditSection,
    LogReader,
    Resource,
    RunFile,
    Submission,
    WeightVersion,
    cli,
    weights_of,
)
from lightning_bus.adapters import Row, ScoredGroup, TransitionStream, scored
from lightning_bus.daemon import load_run, run_secret
from lightning_bus.log.verify import verify
from lightning_bus.spans import is_model_call
from tests.bus_fixtures import BrokerProcess
from tests.golden import multi_agent
from tests.recorded_run import write_run
from trainer.algorithms.admission import keep_running_ahead
from trainer.config import PolicySection, TrainSection, answering_model
from trainer.data.filters import drop_stale
from trainer.data.stream import version_of
from trainer.registry import policies_in, published_as, read_log
from trainer.session import Progress

CREDIT = CreditSection(agents={"writer": "policy", "rewriter": "policy", "checker": "fixed"})
RUN = multi_agent.load()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", RUN) / "log"


def stream(policy: str, **more: Any) -> TransitionStream:
    return TransitionStream(group_size=3, labels={"phase": "train"}, credit=CREDIT, policy=policy, **more)


def rows(groups: Sequence[ScoredGroup]) -> list[Row]:
    return [row for group in groups for rollout in group.rollouts for row in rollout.rows]


def calls(groups: Sequence[ScoredGroup]) -> Counter[tuple[str, bytes]]:
    return Counter((row.rollout_id, span_id) for row in rows(groups) for span_id in row.span_ids)


def test_each_call_is_one_policys_and_none_is_forgotten(log: Path) -> None:
    with LogReader(log) as reader:
        ours, theirs = (list(stream(policy).read(reader)) for policy in ("policy", "fixed"))
        both = list(stream(None).read(reader))  # type: ignore[arg-type]
    assert {row.policy for row in rows(ours)} == {"policy"}
    assert {row.policy for row in rows(theirs)} == {"fixed"}
    assert not calls(ours).keys() & calls(theirs).keys()
    assert calls(ours) + calls(theirs) == calls(both)
    assert set(calls(both).values()) == {1}
    recorded = [(rollout.rollout_id, span) for rollout in RUN for span in rollout.spans if is_model_call(span)]
    left_out = {(name, span.span_id) for name, span in recorded} - calls(both).keys()
    assert len(left_out) == 2, "the call that was sent again, and the one without ids"
    dropped = [sum((group.dropped for group in groups), Counter[str]()) for groups in (ours, theirs)]
    assert dropped[0]["other policy"] == sum(span.name == "chat fixed" for _, span in recorded)
    # A rollout's reward is everybody's: who checked well has its share in what came of it.
    assert [one.reward for group in ours for one in group.rollouts] == [
        one.reward for group in theirs for one in group.rollouts
    ]


@given(st.dictionaries(st.sampled_from(["writer", "rewriter", "checker", "*"]), st.sampled_from(["policy", "fixed"])))
def test_whoever_is_mapped_to_whichever_policy_no_call_is_trained_twice(agents: dict[str, str]) -> None:
    """Each call is one policy's, or counted by each as left out."""
    credit = CreditSection(agents=agents)
    recorded = sum(is_model_call(span) for rollout in RUN for span in rollout.spans)
    trained = Counter[tuple[str, bytes]]()
    for policy in ("policy", "fixed"):
        rollouts, dropped = scored(RUN, credit, policy=policy)
        mine = Counter((one.rollout_id, call) for one in rollouts for row in one.rows for call in row.span_ids)
        assert mine.total() + dropped.total() == recorded
        trained += mine
    if agents:  # else everybody trains whichever policy is asked for
        assert set(trained.values()) <= {1}


def test_each_trainer_goes_on_from_a_cursor_of_its_own(log: Path) -> None:
    with LogReader(log) as reader:
        ahead, behind = stream("policy"), stream("fixed")
        first, second = ahead.read(reader), behind.read(reader)
        assert [next(first).name, next(first).name, next(second).name] == ["count", "join", "count"]
        again = stream("fixed", cursor=behind.cursor)
        assert [group.name for group in again.read(reader)] == ["join"]
        assert list(stream("policy", cursor=ahead.cursor).read(reader)) == []


def test_staleness_is_by_the_policys_own_versions(log: Path) -> None:
    """The writer's rows are of versions 7 and 8, the checker's of 7: 40 updates of another policy age neither."""
    with LogReader(log) as reader:
        ours, theirs = (rows(list(stream(policy).read(reader))) for policy in ("policy", "fixed"))
    assert {(row.version_oldest, row.version_newest) for row in ours} == {(7, 7), (7, 8), (8, 8)}
    assert drop_stale(ours, trainer_version=8, staleness_max=1).dropped == Counter()
    assert drop_stale(ours, trainer_version=8, staleness_max=0).dropped == Counter(
        stale=sum(row.version_oldest == 7 for row in ours)
    )
    assert drop_stale(theirs, trainer_version=47, staleness_max=8).dropped == Counter(stale=len(theirs))
    assert [version_of(RUN[0], policy) for policy in ("policy", "fixed", "third", "")] == [8, 7, -1, 8]


def run_file(directory: Path, name: str, address: str, policy: str, agents: dict[str, str] | None = None) -> RunFile:
    """Write a run of the team, and return it as a trainer reads it."""
    home = directory / name
    home.mkdir(parents=True, exist_ok=True)
    run_secret(home)
    named = agents if agents is not None else CREDIT.agents
    table = ", ".join(f'{agent} = "{of}"' for agent, of in dict(named).items())
    (home / "run.toml").write_text(
        f'[run]\nname = "{name}"\n[broker]\nbind = "{address}"\n[policy]\nmodel = "m"\nname = "{policy}"\n'
        f'[credit]\nagents = {{ {table} }}\n[worker]\nagent = "a:b"\n[train]\ntasks = "t"\nheld_out = "h"\n'
    )
    return load_run(home)


def version(number: int, policy: str, spans: Sequence[tuple[str, bytes]] = ()) -> WeightVersion:
    return msgspec.convert(
        {
            "version": number, "parent": number - 1 if number else None, "phase": "rl", "step": number, "path": "p",
            "checksum": f"crc:{policy}{number}", "trained": [[name, 1, [span_id]] for name, span_id in spans],
        },
        WeightVersion,
    )  # fmt: skip


def test_versions_of_two_policies_stand_side_by_side_in_one_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with BrokerProcess(tmp_path / "team" / "log") as process, BlockingClient(process.address) as bus:
        one = run_file(tmp_path, "team", process.address, "policy")
        other = run_file(tmp_path, "team-checker", process.address, "fixed")
        assert [published_as(one), published_as(other)] == ["policy", "fixed"]
        for number in range(3):
            bus.put(Resource(weights_of("policy"), number, msgspec.msgpack.encode(version(number, "policy"))))
        bus.put(Resource(weights_of("fixed"), 0, msgspec.msgpack.encode(version(0, "fixed"))))
        # The team's own run reads its log; that of the checker has none and asks the bus.
        told = [listed(capsys, "--run", str(file.directory)) for file in (one, other)]
        named = listed(capsys, "--run", str(one.directory), "--policy", "fixed")
        shown = said(capsys, "list", "--run", str(other.directory))
    assert [(each["policy"], [v["version"] for v in each["versions"]]) for each in told] == [
        ("policy", [2, 1, 0]), ("fixed", [0]),
    ]  # fmt: skip
    assert named["versions"] == told[1]["versions"]
    assert "policy fixed" in shown
    assert policies_in(one.directory) == ["fixed", "policy"]
    assert list(read_log(one.directory, "fixed").versions) == [0]
    report = verify(tmp_path / "team")
    assert not [check for check in report.checks if check.unit == "versions" and check.offenders]


def listed(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    return json.loads(said(capsys, "list", *argv, "--json"))


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(["weights", *argv])
    out, err = capsys.readouterr()
    assert int(caught.value.code or 0) == 0, err
    return out


def test_a_run_with_one_policy_publishes_as_ever(tmp_path: Path) -> None:
    for name, agents in (("a", {"writer": "calc"}), ("b", {})):
        file = run_file(tmp_path, name, "tcp://127.0.0.1:9", "calc", agents)
        assert published_as(file) == "policy"
        assert answering_model(file.section(PolicySection), file.section(CreditSection)) == "calc"
    file = run_file(tmp_path, "c", "tcp://127.0.0.1:9", "fixed")
    assert answering_model(file.section(PolicySection), file.section(CreditSection)) == "", "agents name their models"


def test_a_follower_submits_nothing() -> None:
    with pytest.raises(ValueError, match="follow = true submits no rollouts, and rl.curriculum asks for some"):
        msgspec.convert({"tasks": "t", "held_out": "h", "follow": True, "rl": {"curriculum": True}}, TrainSection)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("credit", "follow", "asked"),
    [(CreditSection(), False, "calc"), (CREDIT, False, ""), (CREDIT, True, None)],
)
async def test_who_submits_and_which_model_answers(credit: CreditSection, follow: bool, asked: str | None) -> None:
    """One policy answers every call; of several, agents name theirs; who follows submits nothing."""
    submitted: list[Submission] = []

    async def submit(rollouts: list[Submission]) -> None:
        submitted.extend(rollouts)

    train = TrainSection(tasks="", held_out="", follow=follow)
    session: Any = SimpleNamespace(
        train=train, progress=Progress(), policy=PolicySection(model="", name="calc"),
        run=SimpleNamespace(section=lambda kind: credit), bus=SimpleNamespace(submit=submit),
    )  # fmt: skip
    await keep_running_ahead(session, ["task"])
    assert {one.model for one in submitted} == (set() if asked is None else {asked})


async def publish_twice(address: str) -> None:
    from lightning_bus import Client
    from trainer.registry import publish

    async with Client(address) as bus:
        await publish(bus, version(0, "a"), "a")
        await publish(bus, version(0, "a"), "a")
        with pytest.raises(Conflict, match="another trainer publishes under the same name"):
            await publish(bus, version(0, "b"), "a")


@pytest.mark.anyio
async def test_two_trainers_under_one_name_are_told_apart(tmp_path: Path) -> None:
    from tests.bus_fixtures import broker

    async with broker(tmp_path / "log") as address:
        await publish_twice(address)
