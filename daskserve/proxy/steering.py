"""New connections go to other listeners of a shared port; on the transport loop. Linux.

Closing one of several listeners (``SO_REUSEPORT``) resets what the kernel has given it
and it has not accepted, and every handshake on the way to it. So the kernel is first
told to give it nothing more, by a filter that chooses among the listeners by their
numbers. That takes no privilege. A listener's own number is not to be had, so it is
found out: one connection of our own at a time is sent to each.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import socket
import struct
import sys

logger = logging.getLogger(__name__)

_ATTACH, _DETACH = 51, 68  # SO_ATTACH_REUSEPORT_CBPF, SO_DETACH_REUSEPORT_BPF
#: Classic BPF, as in ``linux/filter.h``: its instructions ...
_LOAD_WORD, _LOAD_HALF, _MODULO, _ADD = 0x20, 0x28, 0x94, 0x04
_IF_EQUAL, _IF_NOT_LESS, _RETURN, _RETURN_A = 0x15, 0x35, 0x06, 0x16
#: ... and where to load from: a random number, the IP header.
_RANDOM, _IP_HEADER = 0x100000000 - 0x1000 + 56, 0x100000000 - 0x100000
#: No listener has this number: the kernel chooses by itself.
_ANY = 0xFFFFFFFF
#: For connections to ourselves; they take no time unless a queue is full.
_CONNECT_TIMEOUT_S = 0.2

Instruction = tuple[int, int, int, int]


def steer_away(listener: socket.socket, others: int) -> list[socket.socket] | None:
    """Let the other listeners of the port get all new connections.

    Blocks for less than a millisecond for each of them.

    Parameters
    ----------
    listener
        One of them, in use by the loop.
    others
        The number of the others.

    Returns
    -------
    list of socket or None
        Connections of clients that were accepted meanwhile. None if it cannot be done.
    """
    if not sys.platform.startswith("linux") or others < 1:
        return None
    accepted: list[socket.socket] = []
    try:
        own = _own_number(listener, others + 1, accepted)
        if own is None:
            logger.info("the number of the listener %s is not to be found", listener)
            _detach(listener)
        else:
            _attach(
                listener,
                (_LOAD_WORD, 0, 0, _RANDOM),
                (_MODULO, 0, 0, others),
                (_IF_NOT_LESS, 0, 1, own),
                (_ADD, 0, 0, 1),
                (_RETURN_A, 0, 0, 0),
            )
    except OSError as err:
        logger.info("connections cannot be steered: %s", err)
    return accepted


def reset(listener: socket.socket) -> None:
    """Let the kernel choose again among the listeners of the port."""
    with contextlib.suppress(OSError):
        _detach(listener)


def accept_all(listener: socket.socket) -> list[socket.socket]:
    """Accept what has come already, before the loop does."""
    accepted = []
    with contextlib.suppress(BlockingIOError, OSError):
        while True:
            accepted.append(listener.accept()[0])
    return accepted


def _own_number(
    listener: socket.socket, count: int, accepted: list[socket.socket]
) -> int | None:
    target = listener.getsockname()[:2]
    if target[0] in ("0.0.0.0", "::"):
        target = ("127.0.0.1" if target[0] == "0.0.0.0" else "::1", target[1])
    port_at = _IP_HEADER + (20 if listener.family == socket.AF_INET else 40)
    for number in range(count):
        with socket.socket(listener.family, socket.SOCK_STREAM) as probe:
            probe.bind((target[0], 0))
            probe.settimeout(_CONNECT_TIMEOUT_S)
            own = probe.getsockname()
            _attach(
                listener,
                (_LOAD_HALF, 0, 0, port_at),
                (_IF_EQUAL, 0, 1, own[1]),
                (_RETURN, 0, 0, number),
                (_RETURN, 0, 0, _ANY),
            )
            with contextlib.suppress(TimeoutError):
                probe.connect(target)
            found = False
            for connection in accept_all(listener):
                if _peer(connection) == own[:2]:
                    found = True
                    connection.close()
                else:
                    accepted.append(connection)
        if found:
            return number
    return None


def _peer(connection: socket.socket) -> tuple[str, int] | None:
    try:
        host, port = connection.getpeername()[:2]
    except OSError:
        return None
    return host, port


def _attach(listener: socket.socket, *program: Instruction) -> None:
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)
    pointer = struct.pack("HP", len(program), ctypes.addressof(buffer))
    listener.setsockopt(socket.SOL_SOCKET, _ATTACH, pointer)


def _detach(listener: socket.socket) -> None:
    listener.setsockopt(socket.SOL_SOCKET, _DETACH, 0)
