"""What the fork server imports before it serves; importing this module anywhere else makes no sense."""

import contextlib
import gc
import importlib
import os
import signal

from trainer.agent.fork_server import KIND
from trainer.signals import FLAG, set_parent_death_signal


def load(*names: str, compiler: bool = False) -> None:
    """Import modules, without a collector that would look again and again, in vain, through all that they make."""
    gc.disable()
    if compiler:
        importlib.import_module("torch").compiler.disable(print)  # a public call that imports it
    for name in names:
        with contextlib.suppress(ImportError):  # a rank that needs it will say so
            importlib.import_module(name)
    gc.freeze()  # the collector of a rank leaves the shared pages alone
    gc.enable()


FLAG.install()  # a rank is born with these handlers: there is no moment at which a stop request kills it
kind, _, agent = os.environ[KIND].partition(" ")
set_parent_death_signal(int(agent), signal.SIGKILL)  # also in the middle of an import

load("torch", "torch.distributed.elastic.multiprocessing.errors")
load("trainer.agent.rank_process", "trainer.agent.rank_store")
# DDP and the first optimizer step import torch's compiler, which takes 1 s. The steps of a task wait for it. A script
# may communicate long before it trains, so its ranks start at once, and the compiler is imported here a moment later,
# for the ranks that follow a failure. A timer does it while this process waits for requests: its handler runs
# in the main thread, so there is still only one.
if kind == "task":
    load("trainer.training.rank", compiler=True)
else:
    signal.signal(signal.SIGALRM, lambda *_: load(compiler=True))
    signal.setitimer(signal.ITIMER_REAL, 2.0)  # until then the ranks begin undisturbed
