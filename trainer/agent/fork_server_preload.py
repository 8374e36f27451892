"""What the template imports before it serves; importing this module anywhere else makes no sense."""

import ctypes
import gc
import os
import signal

from trainer.agent import fork_server as template
from trainer.signals import FLAG

FLAG.install()  # a rank is born with its handlers: no moment at which a stop request kills it
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2): gone with the agent, even in mid-import
template.PID = os.getpid()

import torch.distributed.elastic.multiprocessing.errors  # noqa: E402  with torch itself, 1 s

import trainer.agent.rank_process  # noqa: E402

# DDP and the first optimizer step import torch._dynamo, in every rank: 1 s.
if os.environ[template.KIND] == "task":
    import torch._dynamo  # noqa: F401

    import trainer.training.rank  # noqa: F401
else:
    # A script may communicate long before it trains, so it begins at once, with as much of it as was imported by then.
    template.import_when_idle(
        ["sympy", "torch.fx.experimental.symbolic_shapes", "torch.distributed.tensor", "torch.distributed.fsdp"],
        "torch._dynamo",
    )

gc.freeze()  # the collector of a rank leaves the shared pages alone
gc.enable()
