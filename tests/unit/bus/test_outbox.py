"""What leaves the broker, and how much of it may be under way to a peer that does not read."""

from __future__ import annotations

from lightning_bus.broker.door import IGNORED_S, REMEMBERED_MAX, UNREADABLE_MAX, Door
from lightning_bus.broker.outbox import TAKEN_S, WINDOW_BYTES, WINDOWS_BYTES_MAX, Windows

MIB = 1 << 20


def greedy(peer: str) -> bool:
    return True


def modest(peer: str) -> bool:
    return False


def test_a_window_is_bounded_in_bytes_and_one_answer_always_fits() -> None:
    windows = Windows()
    assert windows.room("p", 2 * WINDOW_BYTES)
    sent = 0
    while windows.room("p", 4 * MIB):
        windows.sent("p", 4 * MIB, 0.0)
        sent += 4 * MIB
    assert sent == WINDOW_BYTES
    assert windows.room("another", 4 * MIB)


def test_who_goes_on_from_an_answers_end_has_taken_it_and_what_came_before() -> None:
    windows = Windows()
    for number in range(1, 5):
        windows.sent("p", 4 * MIB, 0.0, next_offset=100 * number)
    assert not windows.room("p", 4 * MIB)
    windows.went_on("p", 150)  # nothing ended there: it proves nothing
    assert not windows.room("p", 4 * MIB)
    windows.went_on("p", 200)
    assert windows.room("p", 8 * MIB)
    assert not windows.room("p", 12 * MIB)


def test_what_never_shows_as_taken_is_written_off_in_time() -> None:
    windows = Windows()
    windows.sent("p", WINDOW_BYTES, 10.0)
    windows.write_off(10.0 + TAKEN_S - 0.1, modest)
    assert not windows.room("p", MIB)
    windows.write_off(10.0 + TAKEN_S, modest)
    assert windows.room("p", MIB)


def test_a_peer_that_asks_for_more_and_shows_nothing_gets_less_and_less() -> None:
    windows = Windows()
    now_s = 0.0
    windows_left = 0
    while now_s < 100.0:
        if windows.room("p", WINDOW_BYTES):
            windows.sent("p", WINDOW_BYTES, now_s, next_offset=1)
            windows_left += 1
        now_s += 0.1
        windows.write_off(now_s, greedy)
    assert windows_left == 5  # at 0, 5, 15, 35 and 75 s
    windows.went_on("p", 1)
    windows.sent("p", WINDOW_BYTES, now_s, next_offset=2)
    windows.write_off(now_s + TAKEN_S, greedy)
    assert windows.room("p", WINDOW_BYTES)


def test_all_windows_together_are_bounded_too() -> None:
    windows = Windows()
    peers = WINDOWS_BYTES_MAX // WINDOW_BYTES
    for number in range(peers):
        assert windows.room(f"p-{number}", WINDOW_BYTES)
        windows.sent(f"p-{number}", WINDOW_BYTES, 0.0)
    assert not windows.room("one more", MIB)


def test_a_peer_that_is_unreadable_again_and_again_is_ignored_for_a_while() -> None:
    door = Door()
    for _ in range(UNREADABLE_MAX):
        assert door.admits(b"p", 0.0)
        door.could_not_read(b"p", 0.0)
    assert not door.admits(b"p", IGNORED_S - 0.1)
    assert door.admits(b"another", 0.0)
    assert door.admits(b"p", IGNORED_S)
    assert door.unreadable == UNREADABLE_MAX + 1


def test_one_readable_message_makes_good() -> None:
    door = Door()
    for _ in range(UNREADABLE_MAX - 1):
        door.could_not_read(b"p", 0.0)
    door.could_read(b"p")
    door.could_not_read(b"p", 0.0)
    assert door.admits(b"p", 0.0)


def test_what_is_remembered_of_unreadable_peers_is_bounded() -> None:
    door = Door()
    for number in range(2 * REMEMBERED_MAX):
        door.could_not_read(str(number).encode(), 0.0)
    assert len(door._in_a_row) == REMEMBERED_MAX  # pyright: ignore[reportPrivateUsage]
