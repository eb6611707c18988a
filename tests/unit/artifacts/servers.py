"""Registry servers for tests: one that serves a layout honestly, and can be bent."""

import hashlib
import json
import re
import socket
import ssl
import threading
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from ztserve.artifacts.registry.layout import ALIASES, DIGEST, NAME, VERSION

BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"


def answer(body=b"", status=200, *, length=None, **headers):
    """Return an answer's bytes; `length` replaces the true Content-Length."""
    lines = [f"HTTP/1.1 {status} X"]
    lines.append(f"Content-Length: {len(body) if length is None else length}")
    lines += [f"{key.replace('_', '-')}: {value}" for key, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def ranged(content, headers):
    """Answer with the whole of it, or the range that was asked for."""
    match = re.match(r"bytes=(\d+)-(\d+)", headers.get("range", ""))
    if not match:
        return answer(content)
    first, last = int(match[1]), int(match[2])
    part = content[first : last + 1]
    said = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
    return answer(part, 206, Content_Range=said)


class HttpServer:
    """Answers what `respond` returns for (target, headers): bytes, or pieces of them.

    `requests` holds (verb, target, headers) of whatever was sent.
    """

    def __init__(self, respond, tls=None):
        self.respond = respond
        self._tls = tls
        self.requests = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open = {self._listener}
        self.port = self._listener.getsockname()[1]
        self.authority = f"127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._open.add(connection)
                connection.settimeout(30)
                threading.Thread(
                    target=self._serve, args=(connection,), daemon=True
                ).start()

    def _serve(self, connection):
        if self._tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._tls)
            try:
                connection = context.wrap_socket(connection, server_side=True)
            except OSError:
                return connection.close()
            self._open.add(connection)
        return self._answer(connection)

    def _answer(self, connection):
        with suppress(OSError), connection, connection.makefile("rb") as file:
            while line := file.readline():
                verb, target, _ = line.decode().split()
                headers = {}
                while (field := file.readline()) not in {b"\r\n", b""}:
                    key, _, value = field.decode().partition(":")
                    headers[key.lower()] = value.strip()
                file.read(int(headers.get("content-length", 0)))
                self.requests.append((verb, target, headers))
                said = self.respond(target, headers)
                if said is None:
                    return
                for piece in [said] if isinstance(said, bytes) else said:
                    connection.sendall(piece)
                if not isinstance(said, bytes):
                    return

    def close(self):
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


class LayoutServer(HttpServer):
    """Serves an OCI image layout as the distribution-spec says, beneath ``models``."""

    def __init__(self, root: Path, *, api=True, tls=None):
        super().__init__(self.honest, tls)
        self.root, self.api = root, api
        self.url = f"oci+http{'s' if tls else ''}://{self.authority}/models"
        self.referrers = {}

    def honest(self, target, headers):
        path = target.partition("?")[0]
        match = re.match(r"/v2/models/([^/]+)/(\w+)/(.+)", path)
        name, kind, reference = match.groups()
        if kind == "referrers":
            found = self.referrers.get(reference, [])
            return self._index(found) if self.api else answer(status=404)
        if kind == "manifests" and ":" not in reference:
            reference = self._tagged(name, reference)
            if isinstance(reference, bytes):
                return reference
        blob = self.blob(reference)
        return answer(status=404) if blob is None else ranged(blob, headers)

    def blob(self, digest):
        path = self.root / "blobs/sha256" / digest.removeprefix("sha256:")
        return path.read_bytes() if path.is_file() else None

    def put(self, content):
        digest = hashlib.sha256(content).hexdigest()
        (self.root / "blobs/sha256" / digest).write_bytes(content)
        return f"sha256:{digest}"

    def refer(self, image, title, content):
        """Attach a bundle to an image, as `oras attach` does."""
        layer = {"mediaType": BUNDLE, "digest": self.put(content), "size": len(content)}
        layer["annotations"] = {"org.opencontainers.image.title": title}
        manifest = {"schemaVersion": 2, "artifactType": BUNDLE, "layers": [layer]}
        digest = self.put(json.dumps(manifest).encode())
        node = {"digest": digest, "size": 1, "artifactType": BUNDLE}
        self.referrers.setdefault(image, []).append(node)

    def image(self, name, tag):
        found = self._tagged(name, tag)
        return None if isinstance(found, bytes) else found

    def _index(self, nodes):
        return answer(json.dumps({"schemaVersion": 2, "manifests": nodes}).encode())

    def _tagged(self, name, tag):
        if tag.startswith("sha256-"):
            nodes = self.referrers.get(tag.replace("-", ":", 1))
            return answer(status=404) if nodes is None else self._index(nodes)
        nodes = json.loads((self.root / "index.json").read_bytes())["manifests"]
        nodes = [n for n in nodes if n["annotations"].get(NAME) == name]
        for node in reversed(nodes):
            notes = node["annotations"]
            held = {notes[VERSION], "_latest", "_" + notes[DIGEST].replace(":", "-")}
            held |= {f"_{alias}" for alias in notes[ALIASES].split(",")}
            if tag in held:
                return node["digest"]
        return answer(status=404)


@contextmanager
def serving(server):
    """Hold a server open."""
    try:
        yield server
    finally:
        server.close()


def certificate(folder, name):
    """Write a self-signed certificate for an address, with its key.

    Return the path of the file, and the certificate as PEM.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "registry")])
    today = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - timedelta(hours=1))
        .not_valid_after(today + timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address(name))]), False
        )
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(Encoding.PEM)
    path = folder / "server.pem"
    path.write_bytes(
        pem + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    return path, pem.decode()
