"""How long the agents of many nodes take to meet, and what it costs node 0 and the others to watch each other.

No cluster: node 0's agent is a process with a share of one core (stopped and continued, as a quota does), the agents of
the other nodes are threads of a few processes on the same machine, one of them alone in its process. All run the code
that real agents run to meet, and then wait for news as those do; there are no ranks, and no store for them. Starts are
spread evenly. Node 0 starts first.

    python bench/meeting.py [--nodes 64 1024] [--share 0.5 1] [--spread 10] [--watch 21] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import secrets
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import connection
from pathlib import Path
from typing import Any

import measure
from measure import table

from trainer.agent import rendezvous
from trainer.agent.rendezvous import NodeRendezvous
from trainer.wiring.hardware import raise_open_files
from trainer.wiring.network import candidate_ports
from trainer.wiring.node import Wiring

HOSTS = 6  # processes that the other agents share
PERIOD_S = 0.1  # of node 0's share: what a quota of a cgroup has
LEAD_S, PATIENCE_S = 8.0, 120.0  # for the processes to import what they need; for all the rest
GOAL_S, GOAL_SHARE = 5.0, 0.03
"""After the last start all must have met, and watching may take so much of a core."""


class NoStore:
    """In the place of the ranks' store."""

    port = 1

    def __init__(self, address: str) -> None:
        """It serves nobody."""

    def close(self) -> None:
        """Nor does it have to be ended."""


def agent(job: dict[str, Any], node: int) -> NodeRendezvous:
    """The agent of one node, as far as it meets others."""
    hosts = ("127.0.0.1",) * job["nodes"]
    ports = tuple(candidate_ports(job["id"]))
    wiring = Wiring("local", job["id"], 0, job["nodes"], node, hosts, hosts[0], ports, 8, None, 1, None, "lo", {})
    return NodeRendezvous(
        wiring, job["secret"].encode(), PATIENCE_S, PATIENCE_S, lambda: False, lambda number, failures: number, print
    )


def watch(job: dict[str, Any], meeting: NodeRendezvous) -> None:
    """What an agent does with the others in mind while its ranks train."""
    while time.time() < job["end"]:
        connection.wait([meeting.wakes()], 0.1)
        wishes = meeting.look()
        assert not wishes.next_round and meeting.lost_peer() is None, meeting.lost_peer()


def be(job: dict[str, Any], node: int, met: dict[int, float]) -> None:
    """One agent, from its start to the end of the watch."""
    time.sleep(max(0.0, job["start"] + job["spread"] * max(node - 1, 0) / max(job["nodes"] - 2, 1) - time.time()))
    meeting = agent(job, node)
    meeting.next_round()
    met[node] = time.time()
    watch(job, meeting)


def host(job: dict[str, Any], nodes: list[int]) -> None:
    """A process with the agents of some nodes: print when each had met all, and the CPU time of the watch's middle."""
    raise_open_files()
    rendezvous.RankStore = NoStore  # type: ignore[assignment, misc]
    met: dict[int, float] = {}
    threading.stack_size(1 << 18)
    threads = [threading.Thread(target=be, args=(job, node, met), daemon=True) for node in nodes]
    for thread in threads:
        thread.start()
    used = []
    for moment in (job["end"] - job["watch"] + 2, job["end"] - 1):
        time.sleep(max(0.0, moment - time.time()))
        usage = resource.getrusage(resource.RUSAGE_SELF)
        used.append(usage.ru_utime + usage.ru_stime)
    print(json.dumps({"met": met, "share": (used[1] - used[0]) / (job["watch"] - 3)}), flush=True)
    time.sleep(max(0.0, job["end"] + 2 - time.time()))  # nobody leaves while another may still look
    os._exit(0)


def throttle(process: subprocess.Popen[bytes], share: float, end: float) -> None:
    """Let a process run for a share of each period."""
    while share < 1 and time.time() < end and process.poll() is None:
        process.send_signal(signal.SIGCONT)
        time.sleep(share * PERIOD_S)
        process.send_signal(signal.SIGSTOP)
        time.sleep((1 - share) * PERIOD_S)
    process.send_signal(signal.SIGCONT)


def measure_one(nodes: int, share: float, spread: float, watch_s: float) -> dict[str, Any]:
    """One meeting."""
    start = time.time() + LEAD_S
    job = {
        "id": f"meeting-{os.getpid()}-{nodes}-{share}-{spread}", "nodes": nodes, "secret": secrets.token_hex(32),
        "start": start, "spread": spread, "watch": watch_s, "end": start + spread + GOAL_S + watch_s,
    }  # fmt: skip
    places = [[0], [1], *([node for node in range(2, nodes) if node % HOSTS == part] for part in range(HOSTS))]
    processes = [
        subprocess.Popen([sys.executable, __file__, "--host", json.dumps([job, place])], stdout=subprocess.PIPE)
        for place in places if place
    ]  # fmt: skip
    governor = threading.Thread(target=throttle, args=(processes[0], share, job["end"]))
    governor.start()
    said = [process.communicate(timeout=PATIENCE_S * 2)[0] for process in processes]
    governor.join()
    found = [json.loads(text.splitlines()[-1]) for text in said]
    met = {int(node): when for each in found for node, when in each["met"].items()}
    others = sum(each["share"] for each in found[2:]) / max(nodes - 2, 1)
    return {
        "nodes": nodes, "share": share, "spread_s": spread, "met": len(met),
        "s_after_last_start": round(max(met.values()) - start - spread, 2) if len(met) == nodes else None,
        "watch_node_0": round(found[0]["share"], 4), "watch_alone": round(found[1]["share"], 4),
        "watch_other": round(others, 4),
    }  # fmt: skip


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--share", type=float, nargs="+", default=[1.0, 0.5])
    parser.add_argument("--spread", type=float, nargs="+", default=[10.0, 0.0])
    parser.add_argument("--watch", type=float, default=21.0)
    parser.add_argument("--output", type=Path, default=measure.RESULTS / "meeting.json")
    parser.add_argument("--host", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.host:
        host(*json.loads(options.host))
    if options.watch <= 3:
        parser.error("--watch: the first two seconds and the last do not count, so give more than 3")
    cases = [(nodes, share, spread) for nodes in options.nodes for share in options.share for spread in options.spread]
    rows = [measure_one(*case, options.watch) for case in cases]
    print(table([["nodes", "node 0 has", "starts", "met after", "watching: node 0", "another"], *(
        [str(row["nodes"]), f"{row['share']:.1f} core", f"over {row['spread_s']:.0f} s",
         f"{row['s_after_last_start']} s" if row["s_after_last_start"] is not None else f"only {row['met']} came",
         f"{100 * row['watch_node_0']:.1f} %", f"{100 * row['watch_alone']:.1f} %"] for row in rows
    )]))  # fmt: skip
    print(f"goal: met within {GOAL_S:.0f} s of the last start, watching within {100 * GOAL_SHARE:.0f} % of a core")
    measure.write_results(options.output, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
