"""`python -m tests.bench.control`: what a control call costs beside a bare gRPC echo of the same size.

The call is the open of a resident model of 338 tensors, over the Unix socket as a client makes it and over TCP with
mutual TLS as another host's pool does; the echo answers requests of the open's size with as many bytes as the open's
reply has, over the same kind of connection, by the same kind of server in a process of its own. Calls alternate one by
one; releases are outside of the clock. The figure is the ratio of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from tests.bench.launch import REPOSITORY, daemon
from tests.bench.make_checkpoint import make_checkpoint, shapes
from tests.certificates import Authority, Certificate
from tiermem.bench.samples import Samples
from tiermem.config import load_config
from tiermem.peer.tls import Tls, open_tls
from tiermem.rpc import messages as m
from tiermem.rpc import peer_messages as p
from tiermem.rpc.channel import Channel, PeerChannel
from tiermem.rpc.codec import decode_manifest, encode
from tiermem.rpc.descriptors import DescriptorClient
from tiermem.rpc.server import peer_credentials

MEMORY_BYTES = 256 << 20
SCALE = 0.05
TARGET = 2.0
WARM = 50


async def echo(unix: str, cert: str, key: str, ca: str) -> None:
    """A server that answers every call with as many bytes as the request's first eight bytes say."""

    class Service(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in its stubs alone
        def service(self, _details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
            return grpc.unary_unary_rpc_method_handler(self._answer)

        async def _answer(self, data: bytes, _context: object) -> bytes:
            return bytes(int.from_bytes(data[:8], "little"))

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Service(),))
    server.add_insecure_port(unix)
    tls = tls_of(Certificate(Path(cert), Path(key), Path(ca)))
    port = server.add_secure_port("127.0.0.1:0", peer_credentials(lambda: tls.pem))
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def tls_of(certificate: Certificate) -> Tls:
    tls = open_tls(load_config(certificate.options, {"HOME": "/"}, ()))
    assert tls is not None
    return tls


@contextmanager
def echo_server(unix: str, certificate: Certificate) -> Iterator[int]:
    arguments = [str(path) for path in (certificate.cert, certificate.key, certificate.ca)]
    command = [sys.executable, "-m", "tests.bench.control", "--echo", unix, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as server:
        try:
            assert server.stdout is not None
            yield int(server.stdout.readline())
        finally:
            server.kill()


class Pair:
    """An open and the echo beside it. `open_` returns the reply and how to release it."""

    def __init__(
        self, open_: Callable[[], Any], release: Callable[[Any], object], request: bytes, echo_channel: grpc.Channel
    ) -> None:
        self._open, self._release = open_, release
        reply = open_()
        release(reply)
        self.reply_bytes, self.request_bytes = len(encode(reply)), len(request)
        self.tensors = len(decode_manifest(reply.manifest).tensors)
        self._echo_request = self.reply_bytes.to_bytes(8, "little").ljust(self.request_bytes, b"\0")
        self._echo: Any = echo_channel.unary_unary("/echo/Echo")  # type: ignore[call-arg]
        self.took_s: dict[str, list[float]] = {"open": [], "echo": []}

    def turn(self) -> None:
        begin = time.perf_counter()
        reply = self._open()
        middle = time.perf_counter()
        self._release(reply)
        again = time.perf_counter()
        answer = self._echo(self._echo_request, timeout=30)
        end = time.perf_counter()
        assert len(answer) == self.reply_bytes
        self.took_s["open"].append(middle - begin)
        self.took_s["echo"].append(end - again)


def pairs(
    address: str, peer_port: int, echo_unix: str, echo_port: int, name: str, tls: Tls, ending: ExitStack
) -> dict[str, Pair]:
    descriptors = DescriptorClient(address.removeprefix("unix:") + ".fd")
    ending.callback(descriptors.close)
    local = Channel(address, lambda: descriptors.token)
    ending.callback(local.close)
    token = b""
    remote = PeerChannel(f"127.0.0.1:{peer_port}", lambda: token, tls.pem)
    ending.callback(remote.close)
    stream = remote.stream("PeerHello", p.HelloRequest(m.PROTOCOL))
    ending.callback(stream.cancel)
    token = next(stream).token
    credentials = grpc.ssl_channel_credentials(tls.pem.authority, tls.pem.key, tls.pem.certificate)
    plain, secure = grpc.insecure_channel(echo_unix), grpc.secure_channel(f"127.0.0.1:{echo_port}", credentials)
    ending.callback(plain.close)
    ending.callback(secure.close)
    ours, theirs = m.OpenRequest(name=name), p.OpenRequest(name=name)
    return {
        "Unix socket": Pair(
            lambda: local.call("Open", ours),
            lambda reply: local.call("Release", m.ReleaseRequest(reply.lease_id)),
            encode(ours),
            plain,
        ),
        "TCP, mutual TLS": Pair(
            lambda: remote.call("PeerOpen", theirs),
            lambda reply: remote.call("PeerRelease", m.ReleaseRequest(reply.lease_id)),
            encode(theirs),
            secure,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--echo", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.echo:
        asyncio.run(echo(*arguments.echo))
        return
    with ExitStack() as ending:
        place = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="tiermem-bench-")))
        make_checkpoint(place / "model", SCALE)
        certificate = Authority(place).issue("bench")
        tls, port = tls_of(certificate), free_port()
        flags = ("--listen", f"127.0.0.1:{port}", *certificate.flags)
        pool = ending.enter_context(daemon(MEMORY_BYTES, 0, *flags))
        name = pool.client.load(place / "model")
        unix = f"unix:{place}/echo"
        echo_port = ending.enter_context(echo_server(unix, certificate))
        found = pairs(pool.address, port, unix, echo_port, name, tls, ending)
        for _ in range(arguments.calls + WARM):
            for pair in found.values():
                pair.turn()
        for what, pair in found.items():
            assert pair.tensors == len(shapes(SCALE))
            opens, echoes = (Samples.of(pair.took_s[kind][WARM:]) for kind in ("open", "echo"))
            ratio = opens.median / echoes.median
            print(
                f"{what:16} {pair.tensors} tensors, {pair.reply_bytes} bytes: open {opens.median * 1e6:.0f} us, echo "
                f"{echoes.median * 1e6:.0f} us, ratio {ratio:.2f}, target {TARGET:g}: "
                f"{'met' if ratio <= TARGET else 'MISSED'}"
            )


if __name__ == "__main__":
    main()
