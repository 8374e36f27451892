"""What the template imports before it serves; importing this module anywhere else makes no sense."""

import ctypes
import gc
import os
import signal

from trainer import template
from trainer.stop import FLAG

FLAG.install()  # a rank is born with its handlers: no moment at which a stop request kills it
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2): gone with the agent, even in mid-import
template.PID = os.getpid()

import torch.distributed.elastic.multiprocessing.errors  # noqa: E402  with torch itself, 1 s

if os.environ[template.KIND] == "task":
    import torch._dynamo  # noqa: F401  the first optimizer step would import it, in every rank: 1 s more

    import trainer.rank

import trainer.entry  # noqa: E402,F401

gc.collect()
gc.freeze()  # the collector of a rank leaves the shared pages alone
