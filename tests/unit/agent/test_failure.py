"""The class of a failure, and which of several came first."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trainer.agent.diagnosis import Frame, where, without_traceback
from trainer.agent.failure import KINDS, Failure, classify, describe_exit, first_failure, paragraph

NO_ROUTE = "makeDeviceForInterface(): unsupported gloo device"


@pytest.mark.parametrize(
    ("code", "exception", "message", "log", "kind"),
    [
        (64, "JobError", "train.lr=x", "", "config"),
        (1, "OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB", "", "out of memory"),
        (1, "RuntimeError", "DefaultCPUAllocator: can't allocate memory", "", "out of memory"),
        (1, "RuntimeError", "DataLoader worker (pid 7) is killed by signal: Bus error", "", "shm"),
        (1, "RuntimeError", "unable to open shared memory object </torch_7>", "", "shm"),
        (-7, "", "", "", "shm"),
        (1, "DistNetworkError", "The server socket has failed to bind to port 29500: EADDRINUSE", "", "port"),
        (1, "gaierror", "[Errno -2] Name or service not known", "", "DNS"),
        (1, "URLError", "<urlopen error [Errno -2] Name or service not known>", "", "download"),
        (1, "ConnectionError", "HTTPSConnectionPool(host='hub', port=443): Max retries exceeded", "", "download"),
        (1, "RuntimeError", NO_ROUTE, "", "interface"),
        (1, "DistBackendError", "NCCL error: Bootstrap : no socket interface found", "", "interface"),
        (1, "RuntimeError", "Connection closed by peer [10.0.0.2]:5000", "", "peer lost"),
        (1, "DistBackendError", "ncclRemoteError: A call failed possibly due to a network error", "", "peer lost"),
        (1, "OSError", "[Errno 28] No space left on device: 'runs/x'", "", "disk full"),
        (1, "OSError", "[Errno 5] Input/output error: 'runs/x/model.pt'", "", "disk failed"),
        (1, "OSError", "[Errno 116] Stale file handle", "", "disk failed"),
        (1, "NonFiniteLoss", "the loss of step 3 is nan", "", "loss"),
        (1, "FileNotFoundError", "images/7.png", "", "data"),
        (1, "KeyError", "'no such digit'", "", "user code"),
        (1, "ValueError", "the port of Rotterdam", "", "user code"),
        (3, "", "", "torch.OutOfMemoryError: CUDA out of memory", "out of memory"),
        (-9, "", "", "", "killed"),
        (137, "", "", "", "killed"),
        (-11, "", "", "", "crashed"),
        (134, "", "", "", "crashed"),
        (255, "", "ended with exit code 255", "", "user code"),
        (-6, "", "", "gloo::EnforceNotMet: op.preamble.length <= op.nbytes. 8 vs 4.", "collectives"),
        (1, "RuntimeError", "Detected mismatch between collectives on ranks.", "", "collectives"),
        (-15, "", "", "", "preempted"),
    ],
)
def test_classes(code: int, exception: str, message: str, log: str, kind: str) -> None:
    assert classify(code, exception, message, log, oom_killed=False) == kind
    assert KINDS[kind]


def test_of_a_loader_workers_message_its_own_exception_counts() -> None:
    text = (
        "Caught IndexError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File ...\n"
    )
    assert without_traceback(f"{text}IndexError: list index out of range\n") == (
        "list index out of range (in a loader worker)"
    )
    assert without_traceback(f"{text}KeyError\n") == "KeyError (in a loader worker)"
    assert without_traceback("bad sample\nof two lines") == "bad sample\nof two lines"


def test_a_stack_tells_where_a_rank_hangs() -> None:
    torch, own = "/lib/torch/distributed/distributed_c10d.py", "/home/cells/task.py"
    reduce = [Frame(torch, "3252", "all_reduce"), Frame(own, "60", "metrics")]
    assert where([]) == "" and where(reduce[1:]) == ", in metrics (task.py:60)"
    assert where(reduce) == ", in all_reduce (distributed_c10d.py:3252), called in metrics (task.py:60)"
    loader = Frame("/lib/torch/utils/data/dataloader.py", "1330", "_try_get_data")
    assert "it waits for a loader worker" in where([Frame("/lib/selectors.py", "415", "select"), loader])


def test_the_kernels_own_count_tells_a_kill_for_memory_from_any_other() -> None:
    assert classify(-9, "", "", "", oom_killed=True) == "out of memory"


def failure(rank: int, kind: str, time: float, waiting: bool = False) -> Failure:
    return Failure(rank // 2, f"host{rank // 2}", rank, time, 1, kind, f"of rank {rank}", "runs/x/rank.log", waiting)


LOST_NODE = Failure(1, "host1", None, 9.0, 1, "peer lost", "its agent is gone", "logs")


@pytest.mark.parametrize(
    ("failures", "first"),
    [
        ([failure(0, "user code", 5.0), failure(1, "user code", 4.0)], 1),
        ([failure(0, "peer lost", 1.0), failure(3, "killed", 2.0)], 3),
        ([failure(0, "hung", 1.0, waiting=True), failure(1, "hung", 2.0)], 1),
        ([failure(0, "peer lost", 2.0), failure(1, "peer lost", 1.0)], 1),
        ([failure(0, "peer lost", 1.0), LOST_NODE], None),
        ([LOST_NODE, failure(3, "user code", 9.5)], 3),
    ],
    ids=[
        "the earlier",
        "a cause before its consequence",
        "who is waited for",
        "of consequences the earlier",
        "a lost node before ranks that lost a peer",
        "what fails by itself before a lost node",
    ],
)
def test_the_first_failure(failures: list[Failure], first: int | None) -> None:
    found = first_failure(failures)
    assert found is not None and found.rank == first


def test_one_paragraph_says_who_why_and_what_to_do() -> None:
    text = paragraph(failure(3, "out of memory", 1.0), "Then it was tried again.")
    expected = ["rank 3 on node 1 (host1)", "[out of memory]", "of rank 3", "train.batch_size"]
    assert [part for part in expected if part not in text] == []
    assert "\n" not in text and text.count("runs/x") == 1
    assert text.endswith("Then it was tried again. Logs: runs/x/rank.log")


def test_a_refusal_is_its_own_remedy() -> None:
    wrong = "train.lr=-1: must be more than 0. Give a rate"
    text = paragraph(replace(failure(0, "config", 1.0), code=64, message=wrong), "It is not retried.")
    assert text == f"rank 0 on node 0 (host0) failed first [config]: {wrong}. It is not retried. Logs: runs/x/rank.log"


@pytest.mark.parametrize(
    ("code", "text"), [(-9, "ended by SIGKILL"), (-64, "ended by SIGRTMAX"), (3, "ended with exit code 3")]
)
def test_exit_codes_in_words(code: int, text: str) -> None:
    assert describe_exit(code) == text
