"""What the template imports before it serves; importing this module anywhere else makes no sense."""

import gc
import os

from trainer.stop import FLAG
from trainer.template import KIND

FLAG.install()  # a rank is born with its handlers: no moment at which a stop request kills it

import torch.distributed.elastic.multiprocessing.errors  # noqa: E402  with torch itself, 1 s

if os.environ[KIND] == "task":
    import torch._dynamo  # noqa: F401  the first optimizer step would import it, in every rank: 1 s more

    import trainer.rank

import trainer.entry  # noqa: E402,F401

gc.collect()
gc.freeze()  # the collector of a rank leaves the shared pages alone
