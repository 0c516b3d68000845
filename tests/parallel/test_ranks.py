"""The channel between ranks: meeting, agreement, losses and stops, ranks as threads."""

import concurrent.futures
import os
import queue
import signal
import socket
import threading
import time

import pytest

from kdjax.parallel import agreement, hub, link
from kdjax.parallel.wire import Connection, Rank
from kdjax.runtime import interrupts


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


_open: list["Ranks"] = []


@pytest.fixture(autouse=True)
def _closed(monkeypatch):
    monkeypatch.setattr(
        hub, "_DRAIN_SECONDS", 0.2
    )  # nobody leaves: all are one process
    yield
    for ranks in _open:
        for own in ranks.links.values():
            own._dismissed.set()
            own._forget()
    _open.clear()


class Ranks:
    """Ranks of one run, each with a link; `lost` has what their processes ended by."""

    def __init__(self, num, *, heartbeat=30.0, patience=10.0, present=None):
        self.num, self.port = num, free_port()
        self.options = {"heartbeat": heartbeat, "patience": patience}
        self.lost = [queue.Queue() for _ in range(num)]
        self.said: list[str] = []
        self.links = {}
        _open.append(self)
        indices = range(num) if present is None else present
        with concurrent.futures.ThreadPoolExecutor(num) as pool:
            self.links = dict(zip(indices, pool.map(self.join, indices), strict=True))

    def join(self, index, *, num=None):
        rank = Rank(index=index, num=num or self.num, host=f"h{index}", pid=100 + index)
        return link.meet(
            f"127.0.0.1:{self.port}",
            rank,
            lose=lambda text, code: self.lost[index].put((text, code)),
            say=self.said.append,
            **self.options,
        )

    def each(self, function):
        """Calls it with the link of each rank at once; results in order."""
        with concurrent.futures.ThreadPoolExecutor(self.num) as pool:
            return list(pool.map(function, self.links.values()))

    def end_of(self, index):
        return self.lost[index].get(timeout=20)

    def kill(self, index):
        """As kill -9 does: the system closes the socket."""
        self.links[index]._connection.socket.shutdown(socket.SHUT_RDWR)


def connect(port: int) -> socket.socket:
    """Connects as soon as somebody listens."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def answer(server: socket.socket) -> None:
    stream = server.accept()[0]
    with stream:
        stream.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def outcome(function):
    try:
        function()
    except agreement.RanksDiffer as error:
        return str(error)
    return ""


def test_ranks_agree_or_are_told_how_they_differ():
    ranks = Ranks(3)
    assert (
        ranks.each(lambda own: outcome(lambda: own.agree("a", {"x": "1"}))) == [""] * 3
    )
    ranks.each(lambda own: own.agree("a barrier", {}))

    def differ(own):
        fields = {"x": str(own.rank.index // 2), "y": "2"}
        return outcome(lambda: own.agree("b", fields, is_final=False))

    texts = ranks.each(differ)
    assert len(set(texts)) == 1
    assert "differ in x: 0 on ranks 0-1 (host h0, host h1), 1 on rank 2" in texts[0]
    assert ranks.each(differ) == texts  # they are still together


def test_a_barrier_waits_for_the_last():
    ranks, passed = Ranks(2), []

    def late(own):
        if own.rank.index:
            time.sleep(0.3)
            assert not passed
        own.agree("late", {})
        passed.append(own.rank.index)

    ranks.each(late)
    assert sorted(passed) == [0, 1]


def test_ranks_at_different_places_are_refused():
    ranks = Ranks(2)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for index, own in ranks.links.items():
            pool.submit(
                lambda own=own, i=index: outcome(lambda: own.agree(f"t{i}", {}))
            )
    for index in (0, 1):
        text, code = ranks.end_of(index)
        assert "rank 0 (h0) at 't0'; rank 1 (h1) at 't1'" in text
        assert code == interrupts.RANKS_DIFFER_CODE


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_killed_rank_is_named_at_once(dead):
    ranks = Ranks(3)
    ranks.kill(dead) if dead else [ranks.kill(0), ranks.links[0]._hub.forget()]
    for index in {0, 1, 2} - {dead}:
        text, code = ranks.end_of(index)
        assert f"rank {dead} of 3 (host h{dead}" in text and "was lost" in text
        assert code == interrupts.PEER_LOST_CODE


def test_a_silent_rank_is_named_after_the_heartbeat():
    ranks = Ranks(2, heartbeat=1.0, present=())
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        main = pool.submit(ranks.join, 0)
        silent = Connection(connect(ranks.port))
        silent.greet()
        silent.send("hello", index=1, num=2, host="h1", pid=7)
        ranks.links = {0: main.result()}
    text, code = ranks.end_of(0)
    silent.close()
    assert "rank 1 of 2 (host h1, pid 7) was lost: silent for" in text
    assert code == interrupts.PEER_LOST_CODE


def test_a_rank_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(hub, "_NOTICE_SECONDS", 0.2)
    ranks = Ranks(4, patience=1.0, heartbeat=1.0, present=(0, 2))
    for index in (0, 2):
        text, code = ranks.end_of(index)
        assert text.startswith("ranks 1, 3 of 4 did not come within 1 s")
        assert "there were: 0 (host h0), 2 (host h2)" in text
        assert code == interrupts.PEER_LOST_CODE
    assert any(s.startswith("waiting for ranks 1, 3 of 4 (") for s in ranks.said)


def test_without_rank_0_the_others_say_so(monkeypatch):
    monkeypatch.setattr(link, "_NOTICE_SECONDS", 0.2)
    ranks = Ranks(2, patience=1.0, present=())
    with pytest.raises(link.PeerLost, match="rank 0 of 2 did not come within 1 s"):
        ranks.join(1)
    assert ranks.said[0].startswith("rank 1: waiting for rank 0 of 2 at 127.0.0.1:")


def test_others_on_the_port_are_no_ranks(monkeypatch):
    """A scanner that speaks HTTP, and a server that is no hub."""
    ranks = Ranks(2, present=())
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        main = pool.submit(ranks.join, 0)
        with connect(ranks.port) as stream:
            stream.sendall(b"GET / HTTP/1.1\r\n\r\n")
            ranks.links = {1: pool.submit(ranks.join, 1).result(), 0: main.result()}
    ranks.each(lambda own: own.agree("met", {}))
    with socket.create_server(("127.0.0.1", 0)) as other:
        ranks.port, ranks.options["patience"] = other.getsockname()[1], 0.5
        threading.Thread(target=answer, args=(other,), daemon=True).start()
        with pytest.raises(link.PeerLost, match="another program answers there"):
            ranks.join(1)


@pytest.mark.parametrize(
    "index, num, reason, code",
    [
        (1, 4, "differ in the number of processes", interrupts.RANKS_DIFFER_CODE),
        (1, 3, "two processes are rank 1: rank 1", interrupts.PEER_LOST_CODE),
    ],
)
def test_a_wrong_number_of_rank_or_ranks_is_refused(index, num, reason, code):
    ranks = Ranks(3, present=())
    ranks.lost.append(queue.Queue())
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        present = [pool.submit(ranks.join, 0), pool.submit(ranks.join, 1)]
        time.sleep(0.3)
        present.append(pool.submit(ranks.join, index, num=num))
        ranks.links = {i: f.result() for i, f in enumerate(present)}
    text, given = ranks.end_of(0)
    assert reason in text and given == code
    assert ranks.end_of(1) == ranks.end_of(1) == (text, code)


@pytest.mark.parametrize("failed", [0, 1])
def test_the_last_words_of_a_rank_reach_the_others(failed):
    ranks = Ranks(3)
    ranks.links[failed].end(1, "data.path='x': no such\nfile")
    for index in {0, 1, 2} - {failed}:
        text, code = ranks.end_of(index)
        assert f"rank {failed} of 3 (host h{failed}, pid 10{failed}) failed: " in text
        assert "data.path='x': no such file" in text
        assert code == interrupts.PEER_LOST_CODE
    assert ranks.lost[failed].empty()


def test_sigterm_outside_of_a_loop_ends_all_with_its_code():
    ranks = Ranks(2)
    ranks.links[1].end(interrupts.SIGTERM_CODE, "label: ended by SIGTERM")
    text, code = ranks.end_of(0)
    assert "rank 1 of 2 (host h1, pid 101) ended by SIGTERM" in text
    assert code == interrupts.SIGTERM_CODE


def test_an_orderly_end_is_no_loss():
    ranks = Ranks(2, heartbeat=0.6)
    for index in (0, 1):
        ranks.links[index].end(0)
        ranks.kill(index) if index else None
    time.sleep(1.0)
    assert all(lost.empty() for lost in ranks.lost)


@pytest.mark.parametrize("signalled", [0, 1, 2])
def test_all_ranks_stop_after_the_same_step(signalled):
    ranks = Ranks(3)

    def loop(own):
        own.begin_steps()
        for step in range(1, 10_000):
            # Collectives keep ranks together, but for a step or two.
            time.sleep(0.002 * (1 + own.rank.index % 2))
            if own.rank.index == signalled and step == 20:
                own.request_stop(signal.SIGTERM)
            if own.reached(step):
                return step
        return 0

    steps = ranks.each(loop)
    assert len(set(steps)) == 1 and steps[0] >= 20
    assert {own.stop_signal for own in ranks.links.values()} == {signal.SIGTERM}


@pytest.mark.filterwarnings("ignore:os.fork")
def test_a_fork_keeps_no_connection():
    """A worker that outlives its rank must not hide its death."""
    ranks = Ranks(2)
    ends = [own._connection for own in ranks.links.values()]
    ends += ranks.links[0]._hub._members.values()
    child = os.fork()
    if child == 0:
        os._exit(sum(end.fileno() >= 0 for end in ends))
    assert os.waitpid(child, 0)[1] == 0
    assert all(end.fileno() >= 0 for end in ends) and len(ends) == 4
    ranks.each(lambda own: own.agree("still together", {}))
