"""`python -m tests.bench.peer`: bytes from pool to pool over TCP on loopback, beside iperf3 in the same run.

A process sends 3 GB of segments (tmpfs, 2 MiB pages, all faulted in) and this one receives them into segments of its
own, by 1, 2 and 4 connections. Each round measures everything once, in turn; figures are medians of the rounds, and
of ratios within a round. "in": BLAKE3 of each part by the thread that received it; "beside": by threads of their own.
Targets, for the best way of each kind: 0.8 of iperf3 without digests, 0.45 with them, and with them 1.5 times
Mooncake's transfer engine, where `--mooncake` names a Python that has it. What arrived is digested after every
measurement, and must be what was sent. "pools": a model of as many bytes from daemon to daemon, digests on.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from blake3 import blake3

from tests.bench import mooncake
from tests.bench.launch import REPOSITORY, environment
from tests.bench.pools import Pools
from tests.certificates import Authority, Certificate
from tiermem import _native
from tiermem.peer.address import Address
from tiermem.peer.grants import Grant, Grants
from tiermem.peer.receiver import DataConnection, Want
from tiermem.peer.sender import DataServer

SEGMENT_BYTES = 256 << 20
HOST, PEER = "127.0.0.1", "receiver"
PLAIN_TARGET, DIGEST_TARGET, MOONCAKE_TARGET = 0.8, 0.45, 1.5

Samples = dict[str, list[tuple[float, float]]]
Measurement = Callable[[], tuple[float, float]]
"""Moves all bytes once; seconds, and CPU seconds of both ends."""


def context_of(certificate: Certificate, side: ssl._SSLMethod) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.load_cert_chain(certificate.cert, certificate.key)
    context.load_verify_locations(certificate.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def segments(count: int) -> list[_native.Segment]:
    directory = _native.tmpfs_detached((count + 1) * SEGMENT_BYTES)
    made = [_native.Segment.create(directory, str(number), SEGMENT_BYTES) for number in range(count)]
    for segment in made:
        segment.prefault(threads=2)
    return made


def cpu_s(who: int = resource.RUSAGE_SELF) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def send(count: int, cert: str, key: str, ca: str) -> None:
    """The sender's process. Each line on stdin asks for so many tokens, and is answered with them and the CPU time."""
    held = segments(count)
    noise = random.Random(6)
    for segment in held:
        with segment.buffer() as memory:
            for at in range(0, SEGMENT_BYTES, 1 << 20):
                memory[at : at + (1 << 20)] = noise.randbytes(1 << 20)
    grants = Grants()

    def descriptor(grant: Grant, number: int) -> int:
        return held[number].share()

    tls = context_of(Certificate(Path(cert), Path(key), Path(ca)), ssl.PROTOCOL_TLS_SERVER)
    servers = [DataServer(grants, descriptor, lambda *_: True, context) for context in (None, lambda: tls)]
    ports = [server.start(HOST, 0) for server in servers]
    digests = [blake3(segment.buffer()).hexdigest() for segment in held]
    print(json.dumps({"ports": ports, "digests": digests}), flush=True)
    lengths = dict.fromkeys(range(count), SEGMENT_BYTES)
    for line in sys.stdin:
        name, wanted = line.split(":")
        tokens = [grants.issue("bench", lengths, name, 60.0).hex() for _ in range(int(wanted))]
        print(json.dumps({"tokens": tokens, "cpu_s": cpu_s()}), flush=True)
    for server in servers:
        server.stop()


class Sender:
    """The sender's process, seen from here."""

    def __init__(self, count: int, certificate: Certificate) -> None:
        files = (str(certificate.cert), str(certificate.key), str(certificate.ca))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.peer", "--send", str(count), *files], cwd=REPOSITORY,
            env=environment(""), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        ready = self._receive()
        self.digests: list[str] = ready["digests"]
        self._ports: list[int] = ready["ports"]

    def connect(self, count: int, tls: ssl.SSLContext | None) -> list[DataConnection]:
        address = Address(HOST, self._ports[tls is not None])
        tokens = self._ask(PEER if tls else "", count)["tokens"]
        return [DataConnection(address, bytes.fromhex(token), tls, 30.0) for token in tokens]

    def cpu_s(self) -> float:
        return float(self._ask("", 0)["cpu_s"])

    def end(self) -> None:
        self._process.communicate()

    def _ask(self, name: str, count: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name}:{count}\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


@dataclass(frozen=True, slots=True)
class Way:
    """How the bytes are fetched. `hashers`: threads that only digest; None: no digests; 0: who receives does it."""

    label: str
    connections: int
    part_bytes: int
    hashers: int | None = None
    tls: bool = False


class Receiver:
    """Our end: the segments that are filled, and what is measured."""

    def __init__(self, sender: Sender, count: int, tls: ssl.SSLContext) -> None:
        self._sender, self._tls = sender, tls
        self._segments = segments(count)
        self._memory = [segment.buffer() for segment in self._segments]
        self._zeros = bytes(SEGMENT_BYTES)

    def measure(self, way: Way) -> tuple[float, float]:
        for memory in self._memory:
            memory[:] = self._zeros
        wants = [
            (number, at, memory[at : at + way.part_bytes])
            for number, memory in enumerate(self._memory)
            for at in range(0, SEGMENT_BYTES, way.part_bytes)
        ]
        connections = self._sender.connect(way.connections, self._tls if way.tls else None)
        cpu = self._sender.cpu_s() + cpu_s()
        begin = time.perf_counter()
        digested = self._fetch(connections, wants, way.hashers)
        elapsed = time.perf_counter() - begin
        cpu = self._sender.cpu_s() + cpu_s() - cpu
        for connection in connections:
            connection.close()
        if digested != (0 if way.hashers is None else len(wants)):
            raise RuntimeError(f"{way.label}: {digested} of {len(wants)} parts were digested")
        self.verify(way.label)
        return elapsed, cpu

    def verify(self, label: str) -> None:
        for number, memory in enumerate(self._memory):
            if blake3(memory).hexdigest() != self._sender.digests[number]:
                raise RuntimeError(f"{label}: segment {number} is not what was sent")

    def _fetch(self, connections: Sequence[DataConnection], wants: list[Want], hashers: int | None) -> int:
        """Fetch all, each connection taking what is next; how many parts were digested."""
        shared, queue = iter(wants), SimpleQueue[memoryview | None]()
        digests: list[bytes] = []

        def receive(connection: DataConnection) -> None:
            taken: list[memoryview] = []

            def mine() -> Iterator[Want]:
                for want in shared:
                    taken.append(want[2])
                    yield want

            for number in connection.fetch_many(mine()):
                if hashers == 0:
                    digests.append(blake3(taken[number]).digest())
                elif hashers:
                    queue.put(taken[number])

        def digest() -> None:
            while (part := queue.get()) is not None:
                digests.append(blake3(part).digest())

        receiving = [threading.Thread(target=receive, args=(connection,)) for connection in connections]
        digesting = [threading.Thread(target=digest) for _ in range(hashers or 0)]
        for thread in (*receiving, *digesting):
            thread.start()
        for thread in receiving:
            thread.join()
        for _ in digesting:
            queue.put(None)
        for thread in digesting:
            thread.join()
        return len(digests)


@contextmanager
def free_port() -> Iterator[int]:
    with socket.create_server((HOST, 0)) as probe:
        port = int(probe.getsockname()[1])
    yield port


def iperf3(nbytes: int) -> tuple[float, float]:
    """One stream from client to server, in writes of 1 MiB."""
    with free_port() as port:
        server = subprocess.Popen(["iperf3", "-s", "-1", "-B", HOST, "-p", str(port)], stdout=subprocess.DEVNULL)
        before = cpu_s(resource.RUSAGE_CHILDREN)
        client = ["iperf3", "-c", HOST, "-p", str(port), "-l", "1M", "-n", str(nbytes), "-J"]
        for _ in range(100):
            answer = json.loads(subprocess.run(client, capture_output=True, text=True).stdout)
            if "error" not in answer:
                break
            time.sleep(0.02)
        server.wait()
    received = answer["end"]["sum_received"]
    rate = received["bits_per_second"] / 8
    return nbytes / rate, cpu_s(resource.RUSAGE_CHILDREN) - before


def ways() -> list[Way]:
    mib = 1 << 20
    return [
        *(Way(f"no digests, {n} conn", n, 16 * mib) for n in (1, 2, 4)),
        *(Way(f"digests in, {p} MiB, {n} conn", n, p * mib, 0) for p in (4, 16, 64) for n in (1, 2, 4)),
        *(Way(f"digests beside ({h}), 16 MiB, {n} conn", n, 16 * mib, h) for h, n in ((1, 1), (2, 1), (1, 2), (2, 2))),
        *(Way(f"TLS, no digests, {n} conn", n, 16 * mib, None, True) for n in (1, 2)),
        Way("TLS, digests in, 16 MiB, 2 conn", 2, 16 * mib, 0, True),
    ]


def report(samples: Samples, nbytes: int) -> None:
    """A row for each subject. Ratios are of what was measured in the same round."""
    print(f"{'':38} {'GB/s':>6} {'min':>6} {'max':>6} {'of iperf3':>10} {'CPU s/GB':>9}")
    for label, runs in samples.items():
        rates = sorted(nbytes / taken / 1e9 for taken, _ in runs)
        cpu = statistics.median(cpu for _, cpu in runs) / nbytes * 1e9
        middle, times = statistics.median(rates), ratio(samples, label, "iperf3")
        print(f"{label:38} {middle:6.2f} {rates[0]:6.2f} {rates[-1]:6.2f} {times:10.2f} {cpu:9.2f}")


def ratio(samples: Samples, label: str, base: str) -> float:
    """How many times as fast, by the median of the rounds."""
    return statistics.median(other / mine for (mine, _), (other, _) in zip(samples[label], samples[base], strict=True))


def judge(samples: Samples, chosen: Sequence[Way]) -> None:
    """The best way of each kind beside its target."""
    kinds = [("no digests", [way for way in chosen if way.hashers is None and not way.tls]),
             ("digests on", [way for way in chosen if way.hashers is not None and not way.tls])]  # fmt: skip
    targets = [(kinds[0], "iperf3", PLAIN_TARGET), (kinds[1], "iperf3", DIGEST_TARGET),
               (kinds[1], "mooncake", MOONCAKE_TARGET)]  # fmt: skip
    for (kind, of_kind), base, target in targets:
        if of_kind and base in samples:
            times, label = max((ratio(samples, way.label, base), way.label) for way in of_kind)
            print(f"{kind}: {times:.2f} of {base} ({label}), target {target}: {'met' if times >= target else 'MISSED'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=3.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="", help="measure only what has this in its name")
    parser.add_argument("--mooncake", help="a Python that has mooncake-transfer-engine-non-cuda")
    parser.add_argument("--send", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.send:
        count, cert, key, ca = asked.send
        return send(int(count), cert, key, ca)
    count = max(1, round(asked.gb * 1e9 / SEGMENT_BYTES))
    nbytes = count * SEGMENT_BYTES
    with tempfile.TemporaryDirectory(prefix="tiermem-bench-") as place, ExitStack() as stack:
        authority = Authority(Path(place))
        sender = Sender(count, authority.issue("sender"))
        stack.callback(sender.end)
        receiver = Receiver(sender, count, context_of(authority.issue(PEER), ssl.PROTOCOL_TLS_CLIENT))
        chosen = [way for way in ways() if asked.only in way.label]
        subjects: dict[str, Measurement] = {"iperf3": lambda: iperf3(nbytes)}
        subjects |= {way.label: (lambda way=way: receiver.measure(way)) for way in chosen}  # type: ignore[misc]
        if asked.only in "pools":
            daemons = Pools(Path(place), nbytes)
            flags = authority.issue("pool", alternatives=f"IP:{HOST}").flags
            subjects |= {"pools": lambda: daemons.measure([]), "pools, TLS": lambda: daemons.measure(flags)}
        if asked.mooncake:
            subjects["mooncake"] = stack.enter_context(mooncake.engine(asked.mooncake, nbytes))
        samples: Samples = {label: [] for label in subjects}
        for _ in range(asked.runs):
            for label, measure in subjects.items():
                samples[label].append(measure())
        staging_bytes = daemons.staging_bytes if asked.only in "pools" else 0
    report(samples, nbytes)
    if staging_bytes:
        print(f"staging memory of a daemon, clear or TLS: {staging_bytes >> 20} MiB, target at most 64")
    judge(samples, chosen)


if __name__ == "__main__":
    main()
