"""Redis and sentinels behind TLS: real, where the engine was built with it, else a front before real ones; and files.

with redis_tls.server("redis", redis_tls.Files(folder, authority)) as server:
    ...  # f"rediss://127.0.0.1:{server.port}?ssl_ca_certs={files.authority}"
"""

import contextlib
import functools
import select
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import sentinels
import servers
import trustme


class Files:
    """Files of certificates in a folder: the authority's, a server's, and a client's."""

    def __init__(self, folder: Path, authority: trustme.CA, name: str = "127.0.0.1", **options: Any) -> None:
        """The server's certificate is for `name`; `options` are trustme's."""
        self.authority = folder / "authority.pem"
        authority.cert_pem.write_to_path(str(self.authority))
        self.server = self._issue(folder, "server", authority.issue_cert(name, **options))
        self.client = self._issue(folder, "client", authority.issue_cert("verve.example"))

    @staticmethod
    def _issue(folder: Path, name: str, issued: trustme.LeafCert) -> tuple[Path, Path]:
        certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
        issued.cert_chain_pems[0].write_to_path(str(certificate))
        issued.private_key_pem.write_to_path(str(key))
        return certificate, key


class Server(NamedTuple):
    """A Redis that listens on two ports."""

    plain: servers.Redis
    port: int  # with TLS


@contextlib.contextmanager
def server(engine: str, files: Files, *, ask_clients: bool = False) -> Iterator[Server]:
    """Run a Redis that is reached with TLS; with `ask_clients`, only by clients with a certificate of the authority."""
    if not has_tls(engine):
        with servers.Redis(engine) as plain, front(plain.port, files, ask_clients=ask_clients) as port:
            yield Server(plain, port)
        return
    port = servers.free_port()
    with servers.Redis(engine, *options(port, files, ask_clients=ask_clients)) as plain:
        yield Server(plain, port)


@contextlib.contextmanager
def sentinel(engine: str, files: Files, primary: int, *, ask_clients: bool = False) -> Iterator[int]:
    """Run a sentinel that is reached with TLS, and reaches the primary so; gives its port."""
    if not has_tls(engine):
        with (
            sentinels.Sentinel(engine, primary) as plain,
            front(plain.port, files, ask_clients=ask_clients) as port,
        ):
            yield port
        return
    port = servers.free_port()
    told = options(port, files, ask_clients=ask_clients)
    with sentinels.Sentinel(engine, primary, *told, "--tls-replication", "yes"):
        yield port


def options(port: int, files: Files, *, ask_clients: bool) -> tuple[str, ...]:
    """Return what tells an engine to listen with TLS."""
    certificate, key = map(str, files.server)
    clients = "--tls-ca-cert-file", str(files.authority), "--tls-auth-clients", "yes" if ask_clients else "no"
    return "--tls-port", str(port), "--tls-cert-file", certificate, "--tls-key-file", key, *clients


@functools.cache
def has_tls(engine: str) -> bool:
    """Whether an engine was built with TLS: it then says that it lacks a certificate."""
    lacking = "--port", "0", "--tls-port", str(servers.free_port()), "--save", ""
    run = subprocess.run(
        [servers.ENGINES[engine], *lacking], capture_output=True, text=True, timeout=servers.DEADLINE, check=False
    )
    return "tls-cert-file" in run.stdout


class FrontSocket(ssl.SSLSocket):
    """Closes itself: `wrap_socket` lets one go open if the connection is reset while it makes it."""

    def __del__(self) -> None:
        self.close()


@contextlib.contextmanager
def front(port: int, files: Files, *, ask_clients: bool) -> Iterator[int]:
    """Listen with TLS, and pass on to a port of this machine what is said; gives the port to connect to."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(files.authority))
    context.sslsocket_class = FrontSocket
    context.load_cert_chain(*files.server)
    context.verify_mode = ssl.CERT_REQUIRED if ask_clients else ssl.CERT_NONE
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def serve(client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            client.settimeout(servers.DEADLINE)
            with (
                context.wrap_socket(client, server_side=True) as near,
                socket.create_connection(("127.0.0.1", port), servers.DEADLINE) as far,
            ):
                while True:
                    readable = [near] if near.pending() else select.select([near, far], [], [], servers.DEADLINE)[0]
                    for sock in readable:
                        if not (data := sock.recv(65536)):
                            return
                        (far if sock is near else near).sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threads.append(threading.Thread(target=serve, args=(client,), daemon=True))
                threads[-1].start()

    threads.append(threading.Thread(target=accept, daemon=True))
    threads[0].start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
