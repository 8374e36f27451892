"""The clock that stands still while its process does."""

import time

from trainer.agent.awake_clock import GAP_S, TICK_S, AwakeClock


class Hand:
    """The hand of a clock that a test moves."""

    time = 100.0

    def __call__(self) -> float:
        return self.time


def test_a_gap_counts_for_nothing_and_a_short_wait_does() -> None:
    hand = Hand()
    clock = AwakeClock(hand)
    first = clock.now()
    hand.time += GAP_S / 2
    assert clock.now() - first == GAP_S / 2
    hand.time += 3600
    assert clock.now() - first == GAP_S / 2
    hand.time += 1
    assert clock.now() - first == GAP_S / 2 + 1


def test_silence_begins_anew_when_the_process_wakes_up() -> None:
    hand = Hand()
    clock = AwakeClock(hand)
    clock.now()
    hand.time += 1
    assert clock.since(100.0) == 1
    hand.time += 3600  # a rank's last beat was before it
    assert clock.since(100.5) == 0
    hand.time += 1.5
    assert clock.since(100.5) == 1.5
    assert clock.since(hand.time - 0.5) == 0.5  # and this beat came after it


def test_a_process_that_is_busy_elsewhere_is_awake() -> None:
    clock = AwakeClock()
    clock.now()
    before, limit = clock.looked, time.monotonic() + 40 * TICK_S
    while clock.looked == before and time.monotonic() < limit:
        time.sleep(TICK_S / 5)
    assert clock.looked > before, "nobody looked at the clock"
