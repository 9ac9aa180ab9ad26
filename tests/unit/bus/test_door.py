"""Real sockets with keys: who holds a good key is heard under its own name, and nobody else is heard at all."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import zmq

from lightning_bus import wire
from lightning_bus.errors import AccessDenied, ConfigError
from lightning_bus.keys import ClientKey, Identity, KeyRing, create_key, revoke_key
from lightning_bus.messages import Error
from lightning_bus.transport import Arrived, ConnectKey, Dealer, Router, bind_router, connect_dealer, producer_name
from lightning_bus.transport.channel import HANDSHAKE_MS
from lightning_bus.transport.dealer import Hangups
from tests.bus_fixtures import PATIENCE_S

pytestmark = pytest.mark.anyio
LOCAL = "tcp://127.0.0.1:*"


@contextmanager
def guarded(directory: Path) -> Iterator[tuple[Router, str, KeyRing]]:
    """A broker's socket with a ring that knows one key, `good`."""
    create_key(directory, "good", "worker")
    ring = KeyRing.load(directory)
    router, address = bind_router(LOCAL, ring)
    with router:
        yield router, address, ring


def key_of(directory: Path, name: str = "good") -> ClientKey:
    return ClientKey.load(directory / f"{name}.key")


async def until_sent(dealer: Dealer, frames: list[bytes]) -> None:
    """Send as soon as there is a connection. Raises what the dealer raises."""
    with anyio.fail_after(PATIENCE_S):
        while not dealer.send(frames):
            await anyio.lowlevel.checkpoint()


async def until_counted(router: Router, *reasons: str) -> None:
    """Return when one of them was counted: a failed handshake is reported by another thread."""
    with anyio.fail_after(PATIENCE_S):
        while not any(router.refused[reason] for reason in reasons):
            await anyio.lowlevel.checkpoint()


async def first(router: Router) -> Arrived:
    with anyio.fail_after(PATIENCE_S):
        return (await router.receive())[0]


async def refusal(dealer: Dealer) -> str:
    """Return the message of the ERROR that comes back."""
    with anyio.fail_after(PATIENCE_S):
        body = wire.decode((await dealer.receive())[0]).body
    assert isinstance(body, Error)
    assert body.code == "AccessDenied"
    return body.message


async def nothing_but(router: Router, address: str, directory: Path) -> None:
    """Whatever was sent before, the next thing the application hears is a good key's message."""
    with connect_dealer(address, "good/proof", key_of(directory)) as dealer:
        await until_sent(dealer, [b"proof"])
        assert await first(router) == Arrived(b"good/proof", "good", [b"proof"], "worker")


# -- who is let in


async def test_a_good_key_is_heard_with_its_name_and_role_and_answered(tmp_path: Path) -> None:
    with guarded(tmp_path) as (router, address, _):
        key = key_of(tmp_path)
        name = producer_name("worker", key)
        assert name.startswith("good/")
        with connect_dealer(address, name, key) as dealer:
            await until_sent(dealer, [b"a", b"b"])
            assert await first(router) == Arrived(name.encode(), "good", [b"a", b"b"], "worker")
            assert router.send([name.encode(), b"answer"])
            assert await dealer.receive() == [[b"answer"]]
        assert not router.refused


async def test_a_plain_socket_has_no_users() -> None:
    router, address = bind_router(LOCAL)
    with router, connect_dealer(address, "peer") as dealer:
        await until_sent(dealer, [b"a"])
        assert await first(router) == Arrived(b"peer", "", [b"a"], "")


async def test_a_key_made_after_the_broker_started_is_let_in(tmp_path: Path) -> None:
    with guarded(tmp_path) as (router, address, _):
        create_key(tmp_path, "late", "gateway")
        with connect_dealer(address, "late/1", key_of(tmp_path, "late")) as dealer:
            await until_sent(dealer, [b"a"])
            assert await first(router) == Arrived(b"late/1", "late", [b"a"], "gateway")


# -- who is not


def foreign(directory: Path, elsewhere: Path) -> ConnectKey:
    """A key of another broker's directory, with this broker's public key put in."""
    key = ClientKey.load(create_key(elsewhere, "good", "worker"))
    return ClientKey(key.name, key.role, key.public, key.secret, key_of(directory).server)


async def test_an_unknown_key_is_refused_at_once_and_counted(tmp_path: Path) -> None:
    with guarded(tmp_path / "a") as (router, address, _):
        stranger = foreign(tmp_path / "a", tmp_path / "b")
        with (
            connect_dealer(address, "good/x", stranger) as dealer,
            pytest.raises(AccessDenied, match=r"refused the key 'good' \(role worker\).*lightning-bus keys list"),
        ):
            await until_sent(dealer, [b"evil"])
        with connect_dealer(address, "good/x", stranger) as dealer:
            for _ in range(2):  # and every time it is asked again
                with pytest.raises(AccessDenied):
                    await until_sent(dealer, [b"evil"])
        assert router.refused["unknown key"] >= 1
        await nothing_but(router, address, tmp_path / "a")


async def test_a_key_revoked_before_it_connects_is_refused(tmp_path: Path) -> None:
    with guarded(tmp_path) as (router, address, ring):
        create_key(tmp_path, "gone", "worker")
        key = key_of(tmp_path, "gone")
        revoke_key(tmp_path, "gone")
        ring.refresh()
        with connect_dealer(address, "gone/x", key) as dealer, pytest.raises(AccessDenied, match="was revoked"):
            await until_sent(dealer, [b"evil"])
        assert router.refused["revoked key"] >= 1
        await nothing_but(router, address, tmp_path)


async def test_a_client_without_a_key_is_told_that_one_is_wanted(tmp_path: Path) -> None:
    with guarded(tmp_path) as (router, address, _):
        with (
            connect_dealer(address, "good/x") as dealer,
            pytest.raises(AccessDenied, match="wants a key.*lightning-bus keys create"),
        ):
            await until_sent(dealer, [b"evil"])
        await nothing_but(router, address, tmp_path)
        await until_counted(router, "no key", "broken handshake")  # both sides hang up at once


async def test_a_client_with_a_key_is_told_that_the_broker_takes_none(tmp_path: Path) -> None:
    create_key(tmp_path, "good", "worker")
    router, address = bind_router(LOCAL)
    with (
        router,
        connect_dealer(address, "good/x", key_of(tmp_path)) as dealer,
        pytest.raises(AccessDenied, match="takes no keys.*unset LIGHTNING_BUS_KEY"),  # it may hang up before it is read
    ):
        await until_sent(dealer, [b"secret"])


async def test_a_wrong_server_key_is_found_out_by_both(tmp_path: Path) -> None:
    """So nobody between a client and its broker can pretend to be the broker."""
    with guarded(tmp_path / "a") as (router, address, _):
        create_key(tmp_path / "b", "good", "worker")
        with (
            connect_dealer(address, "good/x", key_of(tmp_path / "b")) as dealer,
            pytest.raises(AccessDenied, match="is probably another broker's"),
        ):
            await until_sent(dealer, [b"secret"])
        await until_counted(router, "wrong server key")
        await nothing_but(router, address, tmp_path / "a")


# -- once inside


async def test_a_key_revoked_while_connected_is_cut_off_both_ways(tmp_path: Path) -> None:
    with guarded(tmp_path) as (router, address, ring):
        create_key(tmp_path, "gone", "worker")
        with connect_dealer(address, "gone/x", key_of(tmp_path, "gone")) as dealer:
            await until_sent(dealer, [b"before"])
            assert (await first(router)).user == "gone"
            assert router.send([b"gone/x", b"task"])
            assert await dealer.receive() == [[b"task"]]
            revoke_key(tmp_path, "gone")
            assert ring.refresh() == {"gone"}
            assert router.send([b"gone/x", b"task"]) is False
            await until_sent(dealer, [b"after"])
            await nothing_but(router, address, tmp_path)
            assert "revoked" in await refusal(dealer)
        assert router.refused["revoked key"] == 1


async def test_a_new_key_of_an_old_name_does_not_bring_the_old_one_back(tmp_path: Path) -> None:
    with guarded(tmp_path) as (router, address, ring), connect_dealer(address, "good/x", key_of(tmp_path)) as old:
        await until_sent(old, [b"before"])
        await first(router)
        revoke_key(tmp_path, "good")
        create_key(tmp_path, "good", "worker")
        assert ring.refresh() == {"good"}
        await until_sent(old, [b"after"])
        await nothing_but(router, address, tmp_path)
        assert await refusal(old)


async def test_a_key_cannot_speak_under_the_name_of_another(tmp_path: Path) -> None:
    with guarded(tmp_path) as (router, address, _):
        create_key(tmp_path, "thief", "agent")
        for name in ("good/x", "thief", "thiefs/x", ""):
            with connect_dealer(address, name, key_of(tmp_path, "thief")) as thief:
                await until_sent(thief, [b"evil"])
                # It has to be read for the refusal to go out.
                await nothing_but(router, address, tmp_path)
                assert "is not a name for the key 'thief'" in await refusal(thief)
        assert router.refused["another key's name"] == 4


async def test_a_key_cannot_collect_the_answers_of_another(tmp_path: Path) -> None:
    """A ROUTER hands the answers of a routing id to whoever connected under it last."""
    with guarded(tmp_path) as (router, address, _):
        create_key(tmp_path, "thief", "agent")
        with (
            connect_dealer(address, "good/x", key_of(tmp_path)) as owner,
            connect_dealer(address, "good/x", key_of(tmp_path, "thief")) as thief,
        ):
            await until_sent(owner, [b"mine"])
            await first(router)
            await until_sent(thief, [b"mine"])
            await nothing_but(router, address, tmp_path)
            assert router.send([b"good/x", b"token"])
            with anyio.fail_after(PATIENCE_S):
                assert await owner.receive() == [[b"token"]]
            assert await refusal(thief)


async def test_a_client_that_comes_back_gets_its_answers(tmp_path: Path) -> None:
    with guarded(tmp_path) as (router, address, _):
        with connect_dealer(address, "good/x", key_of(tmp_path)) as old:
            await until_sent(old, [b"old"])
            await first(router)
            with connect_dealer(address, "good/x", key_of(tmp_path)) as new:
                await until_sent(new, [b"new"])
                await first(router)
                assert router.send([b"good/x", b"answer"])
                with anyio.fail_after(PATIENCE_S):
                    assert await new.receive() == [[b"answer"]]


async def test_many_names_of_one_key_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_bus.transport.router.ROUTES_MAX", 2)
    with guarded(tmp_path) as (router, address, _):
        for name in ("good/1", "good/2", "good/3"):
            with connect_dealer(address, name, key_of(tmp_path)) as dealer:
                await until_sent(dealer, [b"a"])
                await first(router)
        assert list(router._routes) == [b"good/2", b"good/3"]  # pyright: ignore[reportPrivateUsage]


# -- what is on the wire


class Tap:
    """A TCP proxy that remembers what clients said."""

    def __init__(self, address: str) -> None:
        self.heard = bytearray()
        self._target = ("127.0.0.1", int(address.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with self._listener, self._listener.accept()[0] as client, socket.create_connection(self._target) as server:
            back = threading.Thread(target=self._pump, args=(server, client, None))
            back.start()
            self._pump(client, server, self.heard)
            back.join()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket, heard: bytearray | None) -> None:
        while data := source.recv(65536):
            if heard is not None:
                heard += data
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)

    def join(self) -> None:
        self._thread.join(PATIENCE_S)


async def test_captured_bytes_say_nothing_and_do_nothing_when_replayed(tmp_path: Path) -> None:
    with guarded(tmp_path) as (router, address, _):
        tap = Tap(address)
        with connect_dealer(tap.address, "good/x", key_of(tmp_path)) as dealer:
            await until_sent(dealer, [b"pay one coin"])
            assert (await first(router)).frames == [b"pay one coin"]
        await anyio.to_thread.run_sync(tap.join)
        assert b"coin" not in tap.heard
        assert b"good/x" not in tap.heard
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as replay:
            replay.sendall(tap.heard)
            replay.settimeout(PATIENCE_S)
            while replay.recv(65536):  # until the broker hangs up
                pass
        await nothing_but(router, address, tmp_path)
        await until_counted(router, "wrong server key", "broken handshake")


# -- the door stays open for others


async def test_two_thousand_half_open_connections_keep_nobody_out(tmp_path: Path) -> None:
    with guarded(tmp_path) as (router, address, _):
        port = int(address.rpartition(":")[2])
        half_open = [socket.create_connection(("127.0.0.1", port)) for _ in range(2000)]
        try:
            await nothing_but(router, address, tmp_path)
            half_open[0].settimeout(PATIENCE_S)
            while half_open[0].recv(64):  # the broker's greeting; then it gives up on us
                pass
        finally:
            for connection in half_open:
                connection.close()
        await nothing_but(router, address, tmp_path)


@pytest.mark.parametrize(("every_s", "told"), [(0.5, True), (HANDSHAKE_MS / 1000, False)])
def test_a_broker_that_stalls_is_waited_for_and_one_that_hangs_up_is_not(every_s: float, told: bool) -> None:
    hangups = Hangups()
    assert any(hangups.add(number * every_s) for number in range(20)) is told


def test_a_broker_that_hangs_up_for_a_moment_is_waited_for() -> None:
    hangups = Hangups()
    assert not any(hangups.add(number * 0.05) for number in range(20))


async def test_a_ring_that_fails_costs_a_client_another_try_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with guarded(tmp_path) as (router, address, ring):
        admit, failures = ring.admit, iter([1])

        def fail_at_first(public: str) -> Identity | str:
            if next(failures, None) is not None:
                raise RuntimeError("a bug")
            return admit(public)

        monkeypatch.setattr(ring, "admit", fail_at_first)
        await nothing_but(router, address, tmp_path)
        assert router.refused["failure"] == 1
        assert "could not be judged" in caplog.text


async def test_without_its_doorkeeper_a_broker_lets_nobody_in(tmp_path: Path) -> None:
    """libzmq's default is to let everybody in when nobody answers at the door."""
    with guarded(tmp_path) as (router, address, _):
        doorkeeper = router._doorkeeper  # pyright: ignore[reportPrivateUsage]
        assert doorkeeper is not None
        router._socket.disable_monitor()  # pyright: ignore[reportPrivateUsage]
        doorkeeper.close()
        router._doorkeeper = None  # pyright: ignore[reportPrivateUsage]
        with connect_dealer(address, "good/x", key_of(tmp_path)) as dealer:
            monitor = dealer._monitor  # pyright: ignore[reportPrivateUsage]
            assert await anyio.to_thread.run_sync(monitor.poll, PATIENCE_S * 1e3)  # the handshake ended
            assert dealer.send([b"evil"]) is False


async def test_refusals_are_logged_once_in_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lightning_bus.transport.zap.LOG_EVERY_S", float("inf"))
    with guarded(tmp_path) as (router, address, _):
        create_key(tmp_path, "gone", "worker")
        key = key_of(tmp_path, "gone")
        revoke_key(tmp_path, "gone")
        for _ in range(5):
            with connect_dealer(address, "gone/x", key) as dealer, pytest.raises(AccessDenied):
                await until_sent(dealer, [b"evil"])
        assert router.refused["revoked key"] >= 5
    lines = [record.getMessage() for record in caplog.records if "revoked" in record.getMessage()]
    assert lines == ["refused a connection from 127.0.0.1: revoked key (1 so far)"]


# -- where a broker may listen


@pytest.mark.parametrize(
    "address",
    ["tcp://0.0.0.0:4750", "tcp://*:4750", "tcp://10.0.0.1:4750", "tcp://[::]:4750", "tcp://localhost:4750",
     "tcp://eth0:4750", "tcp://broker.example:4750", "ws://127.0.0.1:4750"],
)  # fmt: skip
async def test_a_broker_without_keys_listens_on_this_machine_only(address: str) -> None:
    with pytest.raises(ConfigError, match=r"lightning-bus keys create .*\[broker\] keys"):
        bind_router(address)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:*", "tcp://127.9.9.9:*", "ipc://{}/s", "inproc://x"])
async def test_local_addresses_need_no_keys(tmp_path: Path, address: str) -> None:
    bind_router(address.format(tmp_path))[0].close()


async def test_with_keys_a_broker_may_listen_everywhere(tmp_path: Path) -> None:
    create_key(tmp_path, "good", "worker")
    bind_router("tcp://0.0.0.0:*", KeyRing.load(tmp_path))[0].close()


def test_zmq_can_encrypt() -> None:
    assert zmq.has("curve"), "this libzmq was built without CURVE; install the pyzmq wheel"
