"""A node that looks for node 0 where nobody listens yet, as often as it likes."""

from __future__ import annotations

import os
import socket

import pytest

from trainer.agent.kv_client import KeyValueClient
from trainer.agent.proof import Membership


def test_tries_that_fail_leave_no_open_file() -> None:
    with socket.socket() as bound:  # which does not listen
        bound.bind(("127.0.0.1", 0))
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            with pytest.raises(ConnectionRefusedError):
                KeyValueClient("127.0.0.1", bound.getsockname()[1], Membership("job/0", b"0" * 64), 1)
        assert len(os.listdir("/proc/self/fd")) == before
