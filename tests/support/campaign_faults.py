"""The faults of a campaign: each strikes a run once, and says what must follow."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from campaign import NOTHING, Campaign, Outcome
from faults import fill_disk
from muster_runs import Run, kill
from shim import Shim


def kill_rank(campaign: Campaign) -> Outcome:
    kill(campaign.rank())
    return Outcome("failure", ("killed",))


def crash_rank(campaign: Campaign) -> Outcome:
    kill(campaign.rank(), signal.SIGSEGV)
    return Outcome("failure", ("crashed",))


def kill_template(campaign: Campaign) -> Outcome:
    """The process that ranks are forked from; its ranks go with it."""
    kill(campaign.run.template(campaign.chance.choice(list(campaign.run.agents()))))
    return Outcome("failure", ("killed",))


def kill_agent(campaign: Campaign) -> Outcome:
    kill(campaign.agent())
    return Outcome("agent_lost")


def kill_supervisor(campaign: Campaign) -> Outcome:
    """All end with it, and say so; somebody submits the run again."""
    kill(campaign.supervisor())
    campaign.run.wait_gone()
    status = campaign.run.status()
    assert (status["state"], "its supervisor is gone" in status["reason"]) == ("lost", True), status
    campaign.continue_run()
    return Outcome("attempt")


def stop_rank(campaign: Campaign) -> Outcome:
    """For good."""
    kill(campaign.rank(), signal.SIGSTOP)
    return Outcome("failure", ("hung",))


def pause(campaign: Campaign, *pids: int) -> float:
    """For less than anybody's patience; return for how long."""
    began = time.monotonic()
    for pid in pids:
        kill(pid, signal.SIGSTOP)
    time.sleep(campaign.chance.uniform(0.2, 1.5))
    for pid in pids:
        kill(pid, signal.SIGCONT)
    return time.monotonic() - began


def pause_rank(campaign: Campaign) -> Outcome:
    campaign.paused_s = pause(campaign, campaign.rank())
    return NOTHING


def pause_agent(campaign: Campaign) -> Outcome:
    pause(campaign, campaign.agent())
    return NOTHING


def pause_supervisor(campaign: Campaign) -> Outcome:
    pause(campaign, campaign.supervisor())
    return NOTHING


def pause_all(campaign: Campaign) -> Outcome:
    campaign.paused_s = pause(campaign, *campaign.run.processes())
    return NOTHING


def ports(pids: list[int]) -> list[tuple[str, int]]:
    """The addresses of IPv4 on which processes listen."""
    inodes = set()
    for pid in pids:
        with suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    inodes.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    found = [row[1].split(":") for row in rows if row[3] == "0A" and row[9] in inodes]
    return [(socket.inet_ntoa(bytes.fromhex(host)[::-1]), int(port, 16)) for host, port in found]


RUBBISH = (
    b"[" * 50_000 + b"\n", b"GET / HTTP/1.1\r\n\r\n", b'{"identity": "x", "node": 1e999}\n', b"\0" * 4096,
    b'["set", "stop", true]\n', b"\xff\xfe" * 999 + b"\n", b"9" * 100_000 + b"\n", b"\n" * 10_000,
)  # fmt: skip


def strangers(campaign: Campaign) -> Outcome:
    """Rubbish at the agents' ports; others connect, say half a word or nothing, and stay."""
    for address in ports(list(campaign.run.agents().values())):
        for text in campaign.chance.sample(RUBBISH, 4):
            with suppress(OSError), socket.create_connection(address, 2) as one:
                one.settimeout(0.3)
                one.sendall(text)
                one.recv(100)
        for text in (b"", b"h", b'{"half'):
            with suppress(OSError):
                campaign.strangers.append(socket.create_connection(address, 2))
                campaign.strangers[-1].sendall(text)
    while len(campaign.strangers) > 60:
        campaign.strangers.pop(0).close()
    return NOTHING


def full_disk(campaign: Campaign) -> Outcome:
    """For some seconds nothing can be written."""
    fill_disk(campaign.run.folder)
    try:
        time.sleep(campaign.chance.uniform(1, 3))
    finally:
        (campaign.run.folder / "ballast").unlink()
    return survived(campaign, "disk full")


def io_errors(campaign: Campaign) -> Outcome:
    assert campaign.shim is not None
    with campaign.shim.io_errors(campaign.run.folder):
        time.sleep(campaign.chance.uniform(0.2, 2))
    return survived(campaign, "disk failed")


def survived(campaign: Campaign, kind: str) -> Outcome:
    """Whether the disk was needed just then is chance, but the run goes on."""
    status = campaign.run.status()
    assert status["state"] == "running", status
    return Outcome("checkpoint", (kind,))


def jump_clock(campaign: Campaign) -> Outcome:
    """By up to a day, and back."""
    assert campaign.shim is not None
    for wrong_by in (campaign.chance.choice((-1, 1)) * 10 ** campaign.chance.uniform(1, 5), 0):
        campaign.shim.set_clock(wrong_by)
        time.sleep(campaign.chance.uniform(0.3, 1))
    return NOTHING


FAULTS: dict[str, Callable[[Campaign], Outcome]] = {
    "kill a rank": kill_rank, "crash a rank": crash_rank, "kill a template": kill_template, "kill an agent": kill_agent,
    "kill the supervisor": kill_supervisor, "stop a rank": stop_rank, "pause a rank": pause_rank,
    "pause an agent": pause_agent, "pause the supervisor": pause_supervisor, "pause all": pause_all,
    "strangers": strangers, "full disk": full_disk, "input/output errors": io_errors, "jump of the clock": jump_clock,
}  # fmt: skip
NEEDS_SHIM = ("input/output errors", "jump of the clock")


@contextmanager
def campaign_of(run: Run, seed: int, shim: Shim | None = None) -> Iterator[Campaign]:
    """Faults for a run that trains; what held on to it is gone in the end."""
    print(f"\nMUSTER_SEED={seed}", flush=True)
    with ExitStack() as stack:
        campaign = Campaign(run, random.Random(seed), FAULTS, shim)
        stack.callback(lambda: [each.close() for each in campaign.strangers])
        yield campaign
