"""Enumerate every listening socket of a running demonstration, and prove each.

Prints a line for each; exits with 1 if one is not accounted for.
"""

import json
import os
import socket
import ssl
import stat
import subprocess
import sys
from pathlib import Path

from examples.gateway_client import ssl_context
from ztserve import Client, config
from ztserve.identity import dns_name


def listening() -> list[tuple[str, int, int]]:
    """(bind address, port, pid) of each TCP socket."""
    lines = subprocess.run(
        ["ss", "-H", "-ltnp"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    found = []
    for line in lines:
        where = line.split()[3]
        host, _, port = where.rpartition(":")
        pid = int(line.partition("pid=")[2].partition(",")[0] or 0)
        found.append((host.strip("[]").removeprefix("::ffff:"), int(port), pid))
    return found


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()


def refuses_strangers(host: str, port: int) -> bool:
    """Is TLS without a certificate, and plain text, turned away?"""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), 10) as raw,
            context.wrap_socket(raw) as tls,
        ):
            assert tls.version() == "TLSv1.3"
            tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            if tls.recv(9):
                return False
    except (ssl.SSLError, ConnectionError):
        pass
    with socket.create_connection((host, port), 10) as raw:
        raw.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
        try:
            return not raw.recv(9)
        except ConnectionError:
            return True


def gateway_holds(settings: config.Settings, source) -> bool:
    """TLS 1.3; liveness for anyone; nothing else without a certificate."""
    where = (settings.gateway.host, settings.gateway.port)
    name = dns_name(settings.gateway_id)
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for root in source.current().bundles[settings.identity.trust_domain]:
        stranger.load_verify_locations(cadata=root)

    def ask(context: ssl.SSLContext, path: str) -> int:
        with (
            socket.create_connection(where, 10) as raw,
            context.wrap_socket(raw, server_hostname=name) as tls,
        ):
            assert tls.version() == "TLSv1.3"
            tls.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            return int(tls.recv(4096).split()[1])

    return (
        ask(stranger, "/v2/health/live") == 200
        and ask(stranger, "/v2/health/ready") == 401
        and ask(ssl_context(source.current()), "/v2/health/ready") == 200
    )


def main() -> int:
    settings = config.load()
    source = config.obtain_identity(settings)
    directory = f"{settings.directory.host}:{settings.directory.port}"
    doors = {}
    for service in ("inference-service", "chat"):
        with Client(
            f"ml-inference/{service}", source=source, directory=directory
        ) as client:
            client.ready()
            for address in client._route.addresses:
                doors[address] = service
    bad = 0
    for host, port, pid in listening():
        address, owner = f"{host}:{port}", command(pid) if pid else "?"
        if address in doors:
            kind, held = (
                f"mTLS replica of {doors[address]}",
                refuses_strangers(host, port),
            )
        elif address == directory:
            kind, held = "mTLS directory", refuses_strangers(host, port)
        elif port == settings.gateway.port:
            kind, held = "HTTPS gateway", gateway_holds(settings, source)
        else:
            # Every process of Ray has one, the driver that started it included.
            kind, held = "Ray's own", "ray" in owner or "examples.demonstr" in owner
        bad += not held
        print(f"{'ok ' if held else 'BAD'} {address:24} {kind:32} {owner[:60]}")
    folder = config.agent_directory(settings)
    for path in sorted(folder.iterdir()):
        if stat.S_ISSOCK(path.stat().st_mode):
            private = stat.S_IMODE(folder.stat().st_mode) == 0o700
            bad += not (private and folder.stat().st_uid == os.geteuid())
            print(f"{'ok ' if private else 'BAD'} {path} private unix socket")
    source.close()
    print(json.dumps({"bad": bad}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
