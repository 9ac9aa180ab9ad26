"""What cannot be trained is refused before the first step, by a ConfigError that names the values and the way out."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from lightning_bus import ConfigError
from tests.reference.rows import tiny_llama
from tests.unit.trainer.serving_fixtures import build_model, build_tokenizer
from tests.unit.trainer.test_rl import CREDIT, rows_from, rows_of
from tests.unit.trainer.test_rl import group as a_group
from trainer.config import PolicySection
from trainer.optimize import checkpoint
from trainer.optimize.optimizer import Optimizer
from trainer.refusals import PROBE, refuse_directory, refuse_engine, refuse_tokens
from trainer.serving.app import build_app
from trainer.serving.engine import Engine
from trainer.serving.remote import RemoteEngine
from trainer.serving.serve import ensure_policy, load_served
from trainer.session import Progress, Session


def test_a_directory_is_refused_as_a_configuration_that_a_person_must_mend(tmp_path: Path) -> None:
    build_model().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be trained.*holds no tokenizer that can be loaded"):
        refuse_directory(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    refuse_directory(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"cannot be trained.*lacks 1 of its 1 weight files"):
        refuse_directory(tmp_path)


def test_what_the_trainer_would_refuse_never_becomes_a_runs_policy(tmp_path: Path) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    build_model().save_pretrained(model)
    build_tokenizer().save_pretrained(model)
    (model / "model.safetensors").rename(tmp_path / "aside")
    with pytest.raises(ConfigError, match="lacks 1 of its 1 weight files"):
        ensure_policy(PolicySection(model=str(model)), run, 0)
    with pytest.raises(ConfigError, match="cannot be served: .*lacks 1 of its 1 weight files"):
        load_served(model)
    assert not run.exists(), "so that the run can begin once the directory is whole"
    (tmp_path / "aside").rename(model / "model.safetensors")
    assert ensure_policy(PolicySection(model=str(model)), run, 0) == run / "policy"


def ask(app: Any, tokenizer: Any) -> None:
    async def main() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http:
            await refuse_engine(RemoteEngine(http, "http://engine"), "policy", tokenizer)

    asyncio.run(main())


def test_an_engine_with_other_token_ids_is_refused_and_one_that_cannot_be_asked_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Engine(build_model(), build_tokenizer(), torch_threads=1) as engine:
        app = build_app(engine, model_name="policy")
        ask(app, build_tokenizer())
        other = build_tokenizer()
        other.add_tokens(["fox"])
        with pytest.raises(ConfigError, match=r"differ from token 16 on \(\[69, 78, 87\] there, \[259"):
            ask(app, other)
        shuffled = SimpleNamespace(encode=lambda text, **_: [one + 1 for one in build_tokenizer().encode(text)])
        with pytest.raises(ConfigError, match="differ from token 0 on"):
            ask(app, shuffled)
    assert PROBE[16:19] == "fox"
    assert not caplog.records

    async def nothing(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    ask(nothing, other)
    assert "could not be asked" in caplog.text and "404" in caplog.text


def test_an_engine_counts_a_conversation_as_it_would_render_it() -> None:
    messages = [{"role": "user", "content": "2+2?"}]

    async def main(app: Any) -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine") as http:
            return [
                await http.post(route, json=body)
                for route, body in (
                    ("/tokenize", {"model": "policy", "messages": messages}),
                    ("/v1/chat/completions/render", {"model": "policy", "messages": messages}),
                    ("/tokenize", {"model": "policy"}),
                    ("/tokenize", {"model": "nobody", "prompt": ""}),
                )
            ]

    with Engine(build_model(), build_tokenizer(), torch_threads=1) as engine:
        counted, rendered, neither, unknown = asyncio.run(main(build_app(engine, model_name="policy")))
    assert counted.json()["tokens"] == rendered.json()["token_ids"]
    assert counted.json()["count"] == len(counted.json()["tokens"])
    assert (neither.status_code, unknown.status_code) == (400, 404)


def test_ids_that_the_model_does_not_have_are_refused_with_the_rollouts_name() -> None:
    rows = [row for one in rows_of(a_group("a", 0.0, 1.0)) for row in one.rows]
    refuse_tokens(rows, tiny_llama(vocab_size=64))
    with pytest.raises(ConfigError, match="rollout a-0 attempt 1 was recorded with token id 2, and the model has 2"):
        refuse_tokens(
            rows, SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=2)))
        )  # pyright: ignore[reportArgumentType]


def test_a_batch_of_which_no_row_fits_is_refused_and_one_of_which_some_do_is_counted() -> None:
    some = rows_of(a_group("a", 0.0, 1.0), a_group("b", 0.0, 1.0, tokens=9))
    counts: Counter[str] = Counter()
    assert len(rows_from(some, CREDIT, 0, 3, counts)) == 2
    assert counts == Counter(too_long=2)
    with pytest.raises(ConfigError, match=r"all 4 rows .* token_budget = 2, the longest 10 tokens.*Raise it to 10"):
        rows_from(some, CREDIT, 0, 2, counts)


def test_a_checkpoint_of_another_model_is_a_configuration_too(tmp_path: Path) -> None:
    theirs = tiny_llama(vocab_size=64)
    checkpoint.save(tmp_path, 1, theirs, Optimizer(theirs, lr=1e-3), {})
    session: Any = SimpleNamespace(
        checkpoints=tmp_path, directory=tmp_path, model=tiny_llama(vocab_size=32), progress=Progress(step=1)
    )
    with pytest.raises(ConfigError, match=r"cannot go on from its checkpoint: .*is of another model: .*\(64, .*\(32, "):
        Session.resume(session)
