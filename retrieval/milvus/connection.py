"""Connections to Milvus: to a server by its address, to Milvus Lite by a path; errors in one line."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from pymilvus import MilvusClient
from pymilvus.exceptions import MilvusException

from ...configuration_mome import quoted, shortened
from ...errors import RetrievalError, first_line

CONNECT_SECONDS = 10

open_lite: dict[str, int] = {}  # path → number of open clients in this process


def is_lite(uri: str) -> bool:
    """Whether `uri` is a path of Milvus Lite, not the address of a server."""
    return "://" not in uri


def checked_uri(uri: str | Path) -> str:
    """The URI as Milvus takes it; a path is made absolute.

    Raises:
        RetrievalError: neither the path of a Milvus Lite index nor the address of a server.
    """
    text = str(uri)
    if text.startswith(("http://", "https://", "tcp://")):
        return text
    if "://" in text or not text.endswith(".db"):
        raise RetrievalError(
            f"uri={quoted(text)}: pass a path that ends in .db for Milvus Lite, or http://host:port of a Milvus server"
        )
    path = Path(text).expanduser().absolute()
    if not os.path.isdir(path.parent):
        raise RetrievalError(f"uri={quoted(text)}: there is no folder {quoted(str(path.parent))}")
    if os.path.isfile(path):
        raise RetrievalError(f"uri={quoted(text)} is a file: Milvus Lite 3 keeps a folder; choose another name")
    return str(path)


def checked_collection(name: str) -> str:
    """A name that Milvus allows for a collection; Milvus Lite would take any.

    Raises:
        RetrievalError: the name is not allowed.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w{0,254}", name, re.ASCII):
        raise RetrievalError(f"collection={quoted(name)}: use letters, digits and underscores, and no digit first")
    return name


def connect(uri: str, token: str | None = None) -> MilvusClient:
    """A client for a checked URI.

    Raises:
        RetrievalError: no server there, or a Milvus Lite file that is damaged or open in another process.
    """
    # A server closes a connection that was idle for some 40 s, and a new client that shares it fails once.
    for attempts_left in (0,) if is_lite(uri) else (1, 0):
        try:
            with quiet_logs():
                client = MilvusClient(uri, token=token or "", timeout=CONNECT_SECONDS)
            break
        except (MilvusException, grpc.RpcError, OSError, ValueError) as error:
            if not attempts_left:
                raise RetrievalError(_why_not(uri, reason_of(error))) from None
    if is_lite(uri):
        open_lite[uri] = open_lite.get(uri, 0) + 1
    return client


def reason_of(error: Exception) -> str:
    """The message of a Milvus error, in one line."""
    text = str(getattr(error, "message", "") or error)
    return first_line(ValueError(text))


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Without the tracebacks that Milvus' packages log for errors that they also raise."""
    loggers = [logging.getLogger(name) for name in ("milvus_lite", "pymilvus", "grpc")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels):
            each.setLevel(level)


def _why_not(uri: str, reason: str) -> str:
    place, uri = uri, shortened(uri)
    if not is_lite(place):
        return f"no Milvus server answers at {uri}: start one there, or use Milvus Lite, uri='index.db' ({reason})"
    if _is_locked(Path(place) / "LOCK"):
        return (
            f"{uri} is open in another process, and Milvus Lite serves only one: close it there, or serve it to all "
            f"with `milvus-lite server --data-dir {uri}` and pass that server's address"
        )
    return f"Milvus Lite can't open {uri}, it may be damaged: delete it, and it is built again ({reason})"


def _is_locked(path: Path) -> bool:
    try:
        import fcntl
    except ImportError:  # no POSIX
        return path.exists()
    if not os.path.exists(path):
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def disconnect(client: MilvusClient, uri: str):
    """Closes a client of `connect`, and Milvus Lite with the last client of its path."""
    client.close()
    if is_lite(uri):
        from milvus_lite.server_manager import server_manager_instance

        open_lite[uri] -= 1
        if not open_lite[uri]:
            server_manager_instance.release_server(uri)


__all__ = ["checked_collection", "checked_uri", "connect", "disconnect", "is_lite", "quiet_logs", "reason_of"]
