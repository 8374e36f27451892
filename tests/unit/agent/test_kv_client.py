"""A node that looks for node 0 where somebody else listens, as often as it likes."""

from __future__ import annotations

import os
import socket

import pytest

from trainer.agent.kv_client import KeyValueClient
from trainer.agent.proof import Membership

TRIES = 20
"""Enough that a file which each of them leaves is not taken for one that a thread of an earlier test opens."""


def test_tries_that_fail_leave_no_open_file() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(TRIES):
            connection = socket.create_connection(server.getsockname())
            server.accept()[0].close()
            with pytest.raises(OSError):
                KeyValueClient(connection, Membership("job/0", b"0" * 64), 1)
            assert connection.fileno() == -1
        assert len(os.listdir("/proc/self/fd")) - before < TRIES
