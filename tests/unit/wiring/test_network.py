"""At which addresses node 0 listens, by what its name leads to on its own host."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from trainer.wiring import network
from trainer.wiring.network import listening_addresses

OWN = ("127.0.0.1", "127.0.1.1", "::1", "10.1.2.3", "192.168.7.3", "fd00::3")


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What names lead to, on a host with the addresses `OWN`, that is called pod-0."""
    known: dict[str, list[str]] = {}

    def resolve(name: str, port: int, **options: Any) -> list[tuple[Any, ...]]:
        if name not in known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        families = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(families[":" in item], socket.SOCK_STREAM, 6, "", (item, port)) for item in known[name]]

    class Probe:
        def __init__(self, family: int, kind: int) -> None:
            pass

        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def bind(self, target: tuple[str, int]) -> None:
            if target[0] not in OWN:
                raise OSError("Cannot assign requested address")

    monkeypatch.setattr(network.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(network.socket, "socket", Probe)
    monkeypatch.setattr(network.socket, "gethostname", lambda: "pod-0")
    return known


@pytest.mark.parametrize(
    ("leads_to", "expected", "why"),
    [
        (["10.1.2.3"], ["10.1.2.3"], ""),
        (["10.1.2.3", "10.1.2.3", "fd00::3"], ["10.1.2.3", "fd00::3"], ""),  # each kind of socket, and both families
        (["127.0.1.1", "10.1.2.3"], ["10.1.2.3"], ""),  # the loopback is for nobody else
        (["192.168.7.3", "203.0.113.9"], ["192.168.7.3"], ""),  # where a Service or NAT has an address too
        (["127.0.1.1"], [""], "node-0 leads to 127.0.1.1 here: the agents listen on all interfaces"),  # Debian's own
        (["::1", "127.0.0.1"], [""], "node-0 leads to ::1, 127.0.0.1 here"),
        (["203.0.113.9"], [""], "node-0 leads to no address of this host here"),
    ],
)
def test_by_what_the_name_leads_to(
    hosts: dict[str, list[str]], leads_to: list[str], expected: list[str], why: str
) -> None:
    hosts["node-0"] = leads_to
    addresses, said = listening_addresses("node-0")
    assert addresses == expected and said.startswith(why) and bool(said) == bool(why)


def test_a_pod_knows_its_own_address_before_its_name_is_known(hosts: dict[str, list[str]]) -> None:
    hosts["pod-0"] = ["10.1.2.3"]
    assert listening_addresses("pod-0.digits") == (["10.1.2.3"], "")
    addresses, why = listening_addresses("node-0.digits")
    assert addresses == [""] and why.startswith("node-0.digits does not resolve here yet (Name or service not known)")
