"""nginx with one canned answer, behind mutual TLS: what a transport in C takes.

One process on loopback, without root; all of its files are in one folder.
"""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bench.generators import LoadError
from bench.session import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

INSTALL = "On Debian or Ubuntu: apt-get install nginx-light"
START_S = 10.0
_CONFIG = """
daemon off; master_process off; worker_processes 1;
pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; scgi_temp_path {folder}/scgi;
  uwsgi_temp_path {folder}/uwsgi;
  keepalive_requests 1000000000; keepalive_timeout 600s;
  server {{
    listen {address} ssl http2;
    ssl_protocols TLSv1.3; ssl_session_tickets off; ssl_session_cache off;
    ssl_certificate {chain}; ssl_certificate_key {key};
    ssl_client_certificate {roots}; ssl_verify_client on; ssl_verify_depth 8;
    location / {{ default_type application/grpc; return 200 "{answer}"; }}
  }}
}}
"""
"""keepalive_requests: by default a connection is ended after 1000."""


def is_installed() -> bool:
    """Return whether there is an nginx to run."""
    return shutil.which("nginx") is not None


@contextmanager
def serving(
    folder: Path, *, chain: str, key: str, roots: Sequence[bytes], answer: int
) -> Iterator[tuple[int, str]]:
    """Run nginx with an answer of so many bytes; yield its process id and address.

    `roots` (DER) are those of clients. Raises LoadError where it does not start.
    """
    address = f"127.0.0.1:{free_port()}"
    trusted = folder / "nginx-roots.pem"
    trusted.write_text("".join(map(ssl.DER_cert_to_PEM_cert, roots)))
    config = folder / "nginx.conf"
    config.write_text(
        _CONFIG.format(
            folder=folder,
            address=address,
            chain=chain,
            key=key,
            roots=trusted,
            answer="x" * answer,
        )
    )
    errors = folder / "error.log"
    command = ["nginx", "-p", str(folder), "-e", str(errors), "-c", str(config)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            _await(process, address, errors)
            yield process.pid, address
        finally:
            process.terminate()


def _await(process: subprocess.Popen[bytes], address: str, errors: Path) -> None:
    host, _, port = address.rpartition(":")
    until = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < until:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    said = errors.read_text()[-2000:] if errors.exists() else ""
    raise LoadError(f"nginx did not start:\n{said}")
