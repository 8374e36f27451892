"""`kubectl exec` for the cluster in memory: a WebSocket (RFC 6455) whose messages begin with the number of a channel.

The channels are those of v5.channel.k8s.io (kubernetes.io, reference/using-api/api-concepts; since kubectl 1.31 the
default): 0 standard input, 1 output, 2 errors, 3 how it ended, 255 closes one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

PROTOCOL = "v5.channel.k8s.io"
MARK = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
CLOSE = 255


def serve(request: BaseHTTPRequestHandler, process: subprocess.Popen[bytes]) -> None:
    """Give a process to who asked for it, until one of both ends."""
    key = request.headers["Sec-WebSocket-Key"]
    request.send_response(101)
    request.send_header("Upgrade", "websocket")
    request.send_header("Connection", "Upgrade")
    request.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1((key + MARK).encode()).digest()).decode())
    request.send_header("Sec-WebSocket-Protocol", PROTOCOL)
    request.end_headers()
    request.close_connection = True
    lock = threading.Lock()

    def send(channel: int, data: bytes) -> None:
        length = len(data) + 1
        size = struct.pack("!B", length) if length < 126 else struct.pack("!BH", 126, length)
        with lock:
            request.wfile.write(b"\x82" + size + bytes([channel]) + data)
            request.wfile.flush()

    def copy(channel: int) -> None:
        file = process.stdout if channel == 1 else process.stderr
        try:
            while block := file.read1(32000):
                send(channel, block)
        except OSError:  # who asked for it is gone
            process.kill()

    def feed() -> None:
        try:
            for channel, data in _messages(request):
                if channel == 0:
                    process.stdin.write(data)
                    process.stdin.flush()
                elif channel == CLOSE and data == b"\0":
                    process.stdin.close()
        except (OSError, ValueError):  # it has ended, or does not listen
            pass
        process.kill()

    threads = [threading.Thread(target=copy, args=(channel,)) for channel in (1, 2)]
    threading.Thread(target=feed, daemon=True).start()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        code = process.wait()
        ended = {"metadata": {}, "status": "Success"}
        if code:
            cause = {"reason": "ExitCode", "message": str(code)}
            ended = {"metadata": {}, "status": "Failure", "reason": "NonZeroExitCode", "details": {"causes": [cause]},
                     "message": f"command terminated with non-zero exit code {code}"}  # fmt: skip
        send(3, json.dumps(ended).encode())
        with lock:
            request.wfile.write(b"\x88\x02\x03\xe8")
    except OSError:
        process.kill()


def _messages(request: BaseHTTPRequestHandler) -> Iterator[tuple[int, bytes]]:
    """What comes, as channel and bytes; a message may come in parts, of which the first names the channel."""
    channel = None
    while len(head := request.rfile.read(2)) == 2:
        kind, length = head[0] & 15, head[1] & 127
        if length > 125:
            length = int.from_bytes(request.rfile.read(2 if length == 126 else 8), "big")
        mask = request.rfile.read(4)
        data = request.rfile.read(length)
        number = int.from_bytes(data, "big") ^ int.from_bytes((mask * (length // 4 + 1))[:length], "big")
        data = number.to_bytes(length, "big")
        if kind == 8:
            return
        if kind in (0, 2) and data:
            if channel is None:
                channel, data = data[0], data[1:]
            yield channel, data
        channel = None if head[0] & 128 and kind in (0, 2) else channel
