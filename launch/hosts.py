"""The hosts of one run: how many, where their launchers meet, which address is ours."""

import fcntl
import os
import socket
import struct
import uuid
from dataclasses import dataclass
from functools import cached_property
from typing import Self

DEFAULT_PORT = 29400
MOST_PORT = 65535
_SIOCGIFADDR = 0x8915  # of an interface: man 7 netdevice


@dataclass(frozen=True)
class Hosts:
    """`minimum` to `maximum` hosts whose launchers meet at `endpoint`."""

    minimum: int = 1
    maximum: int = 1
    endpoint: str = "localhost:0"
    run_id: str = ""
    wait_s: float = 1800.0
    """For hosts that are missing."""

    @classmethod
    def alone(cls) -> Self:
        """This machine."""
        return cls(run_id=uuid.uuid4().hex)

    @classmethod
    def parse(cls, hosts: str, endpoint: str, run_id: str, wait_s: float) -> Self:
        """From `--nnodes 4` or `2:4` and `--rdzv-endpoint HOST[:PORT]`; ValueError for others."""
        words = hosts.split(":")
        if len(words) > 2 or not all(word.isdigit() and int(word) > 0 for word in words):
            raise ValueError(f"--nnodes={hosts}: give a number of hosts, or MIN:MAX, e.g. 2:4")
        least, most = int(words[0]), int(words[-1])
        if least > most:
            raise ValueError(f"--nnodes={hosts}: MIN is more than MAX")
        if most == 1:
            return cls.alone()
        host, _, port = endpoint.partition(":")
        if not host or (port and not (port.isdecimal() and 0 < int(port) <= MOST_PORT)):
            raise ValueError(
                f"--nnodes={hosts} needs --rdzv-endpoint HOST:PORT (got {endpoint!r}), the same on "
                "every host: the name or IPv4 address of one of them, and a free port there"
            )
        try:
            socket.gethostbyname(host)
        except OSError as error:
            raise ValueError(
                f"--rdzv-endpoint={endpoint}: {host} is not known here ({error.strerror}): give "
                "the name or IPv4 address by which every host knows one of them"
            ) from None
        return cls(least, most, f"{host}:{port or DEFAULT_PORT}", run_id, wait_s)

    @property
    def is_alone(self) -> bool:
        """True for a run on one machine."""
        return self.maximum == 1

    @cached_property
    def own_address(self) -> str | None:
        """This host's address on the way to the endpoint; None for a run on one machine."""
        if self.is_alone:
            return None
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
            probe.connect((self._host_address(), 9))
            return str(probe.getsockname()[0])

    @property
    def is_here(self) -> bool:
        """Whether the endpoint is an address of this host."""
        return self.is_alone or self._host_address() == self.own_address

    def _host_address(self) -> str:
        return socket.gethostbyname(self.endpoint.partition(":")[0])

    def interface(self) -> str:
        """Name of the interface with `own_address`, for gloo and NCCL; "" where none has it."""
        for _, name in socket.if_nameindex():
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                request = struct.pack("256s", os.fsencode(name)[:15])
                try:
                    answer = fcntl.ioctl(probe, _SIOCGIFADDR, request)
                except OSError:  # it has no address
                    continue
            if socket.inet_ntoa(answer[20:24]) == self.own_address:
                return name
        return ""
