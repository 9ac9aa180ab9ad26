"""Keys on disk: made whole, found, revoked, and noticed by a ring that is in use."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from zmq import curve_keypair

from lightning_bus import keys
from lightning_bus.broker.access import Role
from lightning_bus.config import BrokerSection, RunFile, RunSection
from lightning_bus.errors import ConfigError, Conflict, NotFound
from lightning_bus.keys import (
    ClientKey,
    Identity,
    KeyRing,
    adopt_key,
    create_key,
    ensure_run_keys,
    find_key,
    revoke_key,
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_roles_are_those_the_broker_enforces() -> None:
    assert set(keys.ROLES) == {role.value for role in Role}


def test_a_key_that_was_made_is_accepted_under_its_name_and_role(tmp_path: Path) -> None:
    key = ClientKey.load(create_key(tmp_path, "gpu-7", "worker"))
    ring = KeyRing.load(tmp_path)
    identity = ring.lookup(key.public)
    assert identity is not None
    assert (key.name, key.role, identity.name, identity.role) == ("gpu-7", "worker", "gpu-7", "worker")
    assert ring.lookup(key.public.encode()) is identity
    assert key.server == ring.server.public
    assert identity.created.endswith("Z")


def test_only_the_owner_reads_secrets_and_nothing_prints_them(tmp_path: Path) -> None:
    path = create_key(tmp_path, "a", "worker")
    key, ring = ClientKey.load(path), KeyRing.load(tmp_path)
    assert mode(path) == mode(tmp_path / "server.key") == 0o600
    assert key.secret not in repr(key)
    assert ring.server.secret not in repr(ring.server)
    assert key.secret not in (tmp_path / "clients" / "a.toml").read_text()


def test_all_keys_of_a_directory_know_the_same_server(tmp_path: Path) -> None:
    first, second = (ClientKey.load(create_key(tmp_path, name, "worker")) for name in "ab")
    assert first.server == second.server
    assert first.public != second.public


def test_a_name_is_given_once_and_again_after_it_was_revoked(tmp_path: Path) -> None:
    first = ClientKey.load(create_key(tmp_path, "a", "worker"))
    with pytest.raises(Conflict, match="there is a key 'a'"):
        create_key(tmp_path, "a", "admin")
    revoke_key(tmp_path, "a")
    second = ClientKey.load(create_key(tmp_path, "a", "worker"))
    ring = KeyRing.load(tmp_path)
    assert ring.lookup(first.public) is None
    assert ring.lookup(second.public) is not None


def test_a_key_file_that_lies_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.key").write_text("precious")
    with pytest.raises(Conflict, match="Move it away"):
        create_key(tmp_path, "a", "worker")
    assert (tmp_path / "a.key").read_text() == "precious"
    assert not (tmp_path / "clients" / "a.toml").exists()


@pytest.mark.parametrize("name", ["", "server", "../a", "a/b", ".a", "-a", "a b", "a" * 65, "ä"])
def test_what_is_no_name_is_said_so(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="is no name for a key"):
        create_key(tmp_path, name, "worker")
    with pytest.raises(NotFound):
        revoke_key(tmp_path, name)


def test_what_is_no_role_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="role 'boss': choose one of worker, agent, gateway, trainer, admin"):
        create_key(tmp_path, "a", "boss")


def test_a_directory_without_keys_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lightning-bus keys create NAME --role worker --dir"):
        KeyRing.load(tmp_path)


# -- a ring in use


def test_a_ring_tells_each_revoked_name_once(tmp_path: Path) -> None:
    key = ClientKey.load(create_key(tmp_path, "a", "worker"))
    create_key(tmp_path, "b", "worker")
    ring = KeyRing.load(tmp_path)
    assert ring.refresh() == set()
    assert revoke_key(tmp_path, "a").public == key.public
    assert ring.lookup(key.public) is not None  # not looked yet
    assert ring.refresh() == {"a"}
    assert ring.refresh() == set()
    assert ring.lookup(key.public) is None
    assert ring.admit(key.public) == "revoked key"


def test_a_key_made_while_the_broker_runs_is_let_in_at_once(tmp_path: Path) -> None:
    create_key(tmp_path, "a", "worker")
    ring = KeyRing.load(tmp_path)
    late = ClientKey.load(create_key(tmp_path, "late", "trainer"))
    admitted = ring.admit(late.public)
    assert isinstance(admitted, Identity)
    assert (admitted.name, admitted.role) == ("late", "trainer")
    assert ring.admit(curve_keypair()[0].decode()) == "unknown key"


def test_a_revocation_seen_at_the_door_is_still_told(tmp_path: Path) -> None:
    create_key(tmp_path, "a", "worker")
    ring = KeyRing.load(tmp_path)
    revoke_key(tmp_path, "a")
    ring.admit(curve_keypair()[0].decode())
    assert ring.refresh() == {"a"}


def test_a_name_whose_key_was_replaced_counts_as_revoked(tmp_path: Path) -> None:
    old = ClientKey.load(create_key(tmp_path, "a", "worker"))
    ring = KeyRing.load(tmp_path)
    revoke_key(tmp_path, "a")
    new = ClientKey.load(create_key(tmp_path, "a", "worker"))
    assert ring.refresh() == {"a"}
    assert ring.lookup(old.public) is None
    assert ring.lookup(new.public) is not None


def test_a_role_changed_by_hand_holds_from_then_on(tmp_path: Path) -> None:
    key = ClientKey.load(create_key(tmp_path, "a", "worker"))
    ring = KeyRing.load(tmp_path)
    file = tmp_path / "clients" / "a.toml"
    file.write_text(file.read_text().replace('"worker"', '"agent"'))
    assert ring.refresh() == {"a"}
    identity = ring.lookup(key.public)
    assert identity is not None
    assert identity.role == "agent"


@pytest.mark.parametrize("content", [b"", b"\xff", b"name = 1", b'name = "b"', b'name = "a"\nrole = "boss"'])
def test_a_file_that_is_no_key_lets_nobody_in(tmp_path: Path, content: bytes) -> None:
    key = ClientKey.load(create_key(tmp_path, "a", "worker"))
    ring = KeyRing.load(tmp_path)
    (tmp_path / "clients" / "a.toml").write_bytes(content)
    assert ring.refresh() == {"a"}
    assert ring.lookup(key.public) is None
    revoke_key(tmp_path, "a")
    assert not (tmp_path / "clients" / "a.toml").exists()


def test_a_directory_that_is_gone_lets_nobody_in(tmp_path: Path) -> None:
    key = ClientKey.load(create_key(tmp_path, "a", "worker"))
    ring = KeyRing.load(tmp_path)
    (tmp_path / "clients").rename(tmp_path / "elsewhere")
    assert ring.refresh() == {"a"}
    assert ring.lookup(key.public) is None


def test_a_key_that_stands_in_both_places_is_revoked(tmp_path: Path) -> None:
    key = ClientKey.load(create_key(tmp_path, "a", "worker"))
    entry = (tmp_path / "clients" / "a.toml").read_bytes()
    revoke_key(tmp_path, "a")
    (tmp_path / "clients" / "a.toml").write_bytes(entry)  # from a backup
    assert KeyRing.load(tmp_path).admit(key.public) == "revoked key"


# -- files from outside


@pytest.mark.parametrize(
    ("line", "bad", "message"),
    [("secret", "x", "40 characters of Z85"), ("role", "boss", "Choose one of"), ("secret", None, "secret is missing")],
)
def test_a_damaged_key_file_says_what_is_wrong(tmp_path: Path, line: str, bad: str | None, message: str) -> None:
    path = create_key(tmp_path, "a", "worker")
    kept = [text for text in path.read_text().splitlines() if not text.startswith(line)]
    path.write_text("\n".join([*kept, *([] if bad is None else [f'{line} = "{bad}"'])]))
    with pytest.raises(ConfigError, match=message):
        ClientKey.load(path)


def test_a_public_key_of_another_secret_is_found_out(tmp_path: Path) -> None:
    path, other = (create_key(tmp_path, name, "worker") for name in "ab")
    path.write_text(path.read_text().replace(ClientKey.load(path).public, ClientKey.load(other).public))
    with pytest.raises(ConfigError, match="not a pair"):
        ClientKey.load(path)


def test_a_key_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the key .*a\.key: No such file"):
        ClientKey.load(tmp_path / "a.key")


# -- finding them


def test_a_key_that_is_given_goes_before_the_environment_and_that_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(keys.KEY_ENV, "")  # restored afterwards, whatever is adopted here
    monkeypatch.delenv(keys.KEY_ENV)
    run = RunFile(
        tmp_path, {"run": RunSection(name="run", directory=str(tmp_path)), "broker": BrokerSection(keys="auto")}
    )
    ensure_run_keys(tmp_path / "run" / "keys")

    def adopted(key: Path | None, file: RunFile | None) -> str | None:
        adopt_key("worker", key, file)
        found = find_key()
        return None if found is None else found.name

    assert adopted(None, None) is None
    assert adopted(None, run) == "worker"
    monkeypatch.setenv(keys.KEY_ENV, str(create_key(tmp_path, "mine", "worker")))
    assert adopted(None, run) == "mine"
    assert adopted(create_key(tmp_path, "given", "worker"), run) == "given"


def test_the_keys_of_a_run_are_made_once_and_again_when_revoked(tmp_path: Path) -> None:
    ensure_run_keys(tmp_path)
    first = {role: ClientKey.load(tmp_path / f"{role}.key") for role in keys.RUN_ROLES}
    ensure_run_keys(tmp_path)
    assert {role: ClientKey.load(tmp_path / f"{role}.key") for role in keys.RUN_ROLES} == first
    revoke_key(tmp_path, "worker")
    ensure_run_keys(tmp_path)
    ring = KeyRing.load(tmp_path)
    assert ring.lookup(first["worker"].public) is None
    assert ring.lookup(ClientKey.load(tmp_path / "worker.key").public) is not None
    assert ring.lookup(first["trainer"].public) is not None


def test_the_setting_names_a_directory(tmp_path: Path) -> None:
    assert keys.keys_directory("", tmp_path) is None
    assert keys.keys_directory("auto", tmp_path) == tmp_path / "keys"
    assert keys.keys_directory("etc/keys", tmp_path) == Path("etc/keys")
