"""What the fork server imports before it serves; importing this module anywhere else makes no sense."""

import contextlib
import gc
import importlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

from trainer.agent.fork_server import KIND, PRELOAD, REFUSED
from trainer.errors import JobError
from trainer.signals import FLAG, set_parent_death_signal


def load(*names: str, compiler: bool = False, users: bool = False) -> None:
    """Import modules, without a collector that would look again and again, in vain, through all that they make.

    `users`: the job names them.
    """
    gc.disable()
    if compiler:
        importlib.import_module("torch").compiler.disable(print)  # a public call that imports it
    for name in names:
        with refuse(name) if users else contextlib.suppress(ImportError):  # a rank that needs it will say so
            importlib.import_module(name)
    gc.freeze()  # the collector of a rank leaves the shared pages alone
    gc.enable()


@contextlib.contextmanager
def refuse(name: str) -> Iterator[None]:
    """Note why a module of the job's cannot be imported here: each rank says so and ends."""
    missing = f"is not installed on {socket.gethostname()}, nor in PYTHONPATH"
    install = "Install it, or remove it: what lies beside the script is imported by each rank"
    leave = "Remove it: the ranks import it themselves"
    try:
        yield
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            raise RuntimeError("it uses the GPU, which forked processes could not do after it")
        # Threads of native libraries, such as pyarrow's, stand a fork: every loader with workers relies on that.
        if threading.active_count() > 1:
            raise RuntimeError("it starts threads, and what they hold would be locked for ever in a forked process")
    except ModuleNotFoundError as error:
        known = f"{name}.".startswith(f"{error.name}.")
        REFUSED.append(JobError("preload", name, missing if known else f"needs {error.name}, which {missing}", install))
    except BaseException as error:
        problem = f"cannot be imported once for all ranks: {type(error).__name__}: {error}"
        REFUSED.append(JobError("preload", name, problem, leave))


FLAG.install()  # a rank is born with these handlers: there is no moment at which a stop request kills it
kind, _, agent = os.environ[KIND].partition(" ")
set_parent_death_signal(int(agent), signal.SIGKILL)  # also in the middle of an import

load("torch", "torch.distributed.elastic.multiprocessing.errors")
load("trainer.agent.rank_process", "trainer.agent.rank_store", "trainer.checkpoint.writer")
load(*filter(None, os.environ[PRELOAD].split(",")), users=True)
# DDP and the first optimizer step import torch's compiler, which takes 1 s. The steps of a task wait for it. A script
# may communicate long before it trains, so its ranks start at once, and the compiler is imported here a moment later,
# for the ranks that follow a failure; so is the session, which they may stand on. A timer does it while this process
# waits for requests: its handler runs in the main thread, so there is still only one.
if kind == "task":
    load("trainer.training.rank", compiler=True)
else:
    session = ("trainer.training.session", "trainer.parallel.ddp")
    signal.signal(signal.SIGALRM, lambda *_: load(*session, compiler=True))
    signal.setitimer(signal.ITIMER_REAL, 2.0)  # until then the ranks begin undisturbed
