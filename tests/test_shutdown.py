"""A job ends when its server does."""

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from sdxl import settings, shutdown
from sdxl.shutdown import stops_with_server


class Cancelled(BaseException):
    """As Cog's."""


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A listening socket of this process, which stands for the server."""
    settings.set_behind_server(True)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening
    settings.set_behind_server(False)


def work_until_cancelled() -> None:
    while True:
        sum(range(100))


def test_a_job_ends_when_the_server_takes_no_more_connections(server: socket.socket):
    with (
        pytest.raises(Cancelled),
        stops_with_server(Cancelled, server=os.getpid()),
        socket.create_connection(server.getsockname()),
    ):
        server.close()
        work_until_cancelled()


def test_a_job_that_ends_anyway_is_left_alone(server: socket.socket):
    with stops_with_server(Cancelled, server=os.getpid()):
        watch = shutdown._here.watch
        assert watch is not None
        shutdown.hold()
        server.close()
        shutdown.end_watch()
        shutdown.release()
        watch.join()
    assert shutdown._here.watch is None


@pytest.mark.usefixtures("server")
def test_the_watch_ends_with_the_job():
    with stops_with_server(Cancelled, server=os.getpid()):
        watch = shutdown._here.watch
    assert watch is not None
    watch.join()


def test_without_a_server_nothing_looks(server: socket.socket):
    before = threading.active_count()
    with stops_with_server(Cancelled, server=1 if os.getuid() else 2**22):  # not ours, or there is none
        shutdown.hold()
        shutdown.release()
        assert threading.active_count() == before
    settings.set_behind_server(False)
    with stops_with_server(Cancelled, server=os.getpid()):
        server.close()
        assert threading.active_count() == before
