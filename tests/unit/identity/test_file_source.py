import os
import shutil
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity import FileSource, FolderSource
from ztserve.identity.svid import pem
from ztserve.testing import ThrowAwayAuthority

ME = "spiffe://td.example/ns/a/sa/b"
OTHER = "spiffe://td.example/ns/a/sa/other"
FOREIGN = ThrowAwayAuthority("b.example")
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change owners")


def until(fact, within_s=5.0):
    deadline = time.monotonic() + within_s
    while not fact():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def write(path, data, mode=0o600):
    """Replace a file atomically."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(data)
    fresh.chmod(mode)
    fresh.replace(path)


class Files:
    """What spiffe-helper writes."""

    def __init__(self, folder, authority):
        self.folder, self.authority = folder, authority
        self.certificate, self.key = folder / "svid.pem", folder / "svid_key.pem"
        self.bundle, self.foreign = folder / "bundle.pem", folder / "b.pem"
        write(self.bundle, pem(authority.bundle), 0o644)
        write(self.foreign, pem(FOREIGN.bundle), 0o644)
        self.svid = self.renew()

    def renew(self, spiffe_id=ME, **how):
        self.svid = self.authority.issue(spiffe_id, **how)
        write(self.key, self.svid.key_pem())
        write(self.certificate, self.svid.chain_pem(), 0o644)
        return self.svid

    def open(self, **how):
        how = {"trust_domain": "td.example", "interval_s": 0.05} | how
        return FileSource(self.certificate, self.key, self.bundle, **how)


@pytest.fixture
def files(private, authority):
    return Files(private, authority)


def has_serial(source, svid):
    return source._identity is not None and source._identity.svid.serial == svid.serial


def refused(files, message, **how):
    with pytest.raises(IdentityError, match=message):
        files.open(**how)


def test_the_identity_is_that_of_the_files(files, authority):
    with files.open(federated={"b.example": files.foreign}) as source:
        identity = source.current()
        assert identity.svid.chain_der == files.svid.chain_der
        assert identity.bundles == authority.bundles | FOREIGN.bundles


@pytest.mark.slow
def test_a_replaced_pair_is_taken_and_told(files):
    with files.open() as source:
        for _ in range(3):
            told = threading.Event()
            unsubscribe = source.subscribe(told.set)
            fresh = files.renew()
            assert told.wait(3)
            until(lambda fresh=fresh: has_serial(source, fresh))
            unsubscribe()


@pytest.mark.slow
def test_what_did_not_change_is_not_told(files):
    with files.open() as source:
        unsubscribe = source.subscribe(lambda: pytest.fail("nothing changed"))
        before = source.current()
        write(files.certificate, files.certificate.read_bytes(), 0o644)
        time.sleep(0.6)
        assert source.current() is before
        unsubscribe()


@pytest.mark.slow
def test_a_pair_in_the_middle_of_a_change_is_not_believed(files, caplog):
    with files.open() as source:
        before, fresh = source.current(), files.authority.issue(ME)
        write(files.key, fresh.key_pem())
        until(lambda: "the private key is not the certificate's" in caplog.text)
        assert source.current() is before
        write(files.certificate, fresh.chain_pem(), 0o644)
        until(lambda: has_serial(source, fresh))


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["half", "empty", "text"])
def test_a_file_that_is_half_written_leaves_the_old_identity(files, caplog, broken):
    with files.open() as source:
        before, whole = source.current(), files.certificate.read_bytes()
        caplog.clear()
        with files.certificate.open("wb") as file:  # in place, as a bad writer would
            file.write({"half": whole[:200], "empty": b"", "text": b"x"}[broken])
            file.flush()
            until(lambda: "svid.pem: " in caplog.text)
            assert source.current() is before
        files.certificate.write_bytes(whole)
        fresh = files.renew()
        until(lambda: has_serial(source, fresh))


@pytest.mark.slow
def test_the_old_identity_ends_when_it_expires_whatever_lies_there(files):
    files.renew(ttl_s=1)
    with files.open() as source:
        told = threading.Event()
        source.subscribe(told.set)
        write(files.key, files.authority.issue(ME).key_pem())
        assert told.wait(4)
        with pytest.raises(IdentityError, match=r"no identity .* expired"):
            source.current()
        fresh = files.renew()
        until(lambda: has_serial(source, fresh))


@pytest.mark.slow
def test_files_that_are_gone_are_a_withdrawal(files):
    with files.open() as source:
        told = threading.Event()
        source.subscribe(told.set)
        files.certificate.unlink()
        assert told.wait(2)
        with pytest.raises(IdentityError, match=r"its files are gone: .*svid\.pem"):
            source.current()
        fresh = files.renew()
        until(lambda: has_serial(source, fresh))


@pytest.mark.slow
def test_a_file_that_is_missing_for_a_moment_is_none(files):
    with files.open(interval_s=0.5) as source:
        unsubscribe = source.subscribe(lambda: pytest.fail("it was missing too long"))
        moved = files.key.rename(files.folder / "aside")
        time.sleep(0.2)
        moved.rename(files.key)
        time.sleep(1.2)
        assert source.current().svid.id == ME
        unsubscribe()


@pytest.mark.slow
def test_a_federated_bundle_that_is_gone_is_no_longer_trusted(files):
    with files.open(federated={"b.example": files.foreign}) as source:
        files.foreign.unlink()
        until(lambda: "b.example" not in source.current().bundles)
        write(files.foreign, pem(FOREIGN.bundle), 0o644)
        until(lambda: "b.example" in source.current().bundles)


@pytest.mark.slow
def test_a_root_that_is_replaced_is_taken_with_the_new_pair(files):
    fresh = ThrowAwayAuthority("td.example")
    with files.open() as source:
        write(files.bundle, pem((*files.authority.bundle, *fresh.bundle)), 0o644)
        until(lambda: len(source.current().bundles["td.example"]) == 2)
        files.authority = fresh
        renewed = files.renew()
        until(lambda: has_serial(source, renewed))
        write(files.bundle, pem(fresh.bundle), 0o644)
        until(lambda: source.current().bundles["td.example"] == fresh.bundle)


@pytest.mark.slow
def test_files_that_come_late_are_waited_for(files):
    aside = files.key.rename(files.folder / "aside")
    timer = threading.Timer(0.2, lambda: aside.rename(files.key))
    timer.start()
    with files.open(timeout_s=10) as source:
        assert source.current().svid.id == ME
    timer.join()


def test_files_that_are_not_there_are_named(files):
    files.key.unlink()
    refused(files, r"svid_key\.pem: No such file or directory")


@pytest.mark.slow
def test_a_process_does_not_change_its_name(files, caplog):
    with files.open() as source:
        files.renew(OTHER)
        until(lambda: f"this process is {ME} and is now called {OTHER}" in caplog.text)
        assert source.current().svid.id == ME


def test_a_closed_source_has_no_identity(files):
    source = files.open()
    source.close()
    source.close()
    with pytest.raises(IdentityError, match="this source is closed"):
        source.current()
    assert not source._keeper.is_alive()


def test_an_svid_of_another_trust_domain_is_refused(files):
    refused(files, "expected one of other.example", trust_domain="other.example")


def test_our_own_domain_is_no_federated_one(files):
    refused(files, "our own domain", federated={"td.example": files.foreign})


def test_an_svid_that_is_expired_is_refused(files):
    later = types.now() + timedelta(days=2)
    refused(files, "would be refused", clock=lambda: later)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "found nothing"),
        (b"x", "expected a PEM block"),
        (pem([b"0\0"]), "malformed certificate"),
        (None, "No such file"),
    ],
)
@pytest.mark.parametrize("layout", ["files", "folder"])
def test_a_partners_broken_bundle_takes_its_own_domain_away_and_nobody_elses(
    files, caplog, layout, content, problem
):
    old = ThrowAwayAuthority("td.example")  # which we withdraw
    own, foreign, opened = files.bundle, files.foreign, files.open
    renew = files.renew
    if layout == "folder":
        path = files.folder / "credential-bundle.private-key.pem"
        own = files.folder / "td.example.spiffe-trust-bundle.pem"
        foreign = files.folder / "b.example.spiffe-trust-bundle.pem"

        def renew():
            svid = files.authority.issue(ME)
            write(path, svid.key_pem() + svid.chain_pem())
            return svid

        def opened(**_):
            return FolderSource(
                files.folder, trust_domain="td.example", interval_s=0.05
            )

        renew()
    write(own, pem((*old.bundle, *files.authority.bundle)), 0o644)
    write(foreign, pem(FOREIGN.bundle), 0o644)
    with opened(federated={"b.example": foreign}) as source:
        assert set(source.current().bundles) == {"td.example", "b.example"}
        if content is None:
            foreign.unlink()
        else:
            write(foreign, content, 0o644)
        until(lambda: set(source.current().bundles) == {"td.example"})
        write(own, pem(files.authority.bundle), 0o644)
        until(lambda: source.current().bundles == files.authority.bundles)
        fresh = renew()
        until(lambda: has_serial(source, fresh))
        if layout == "folder" and content is None:  # not there, so not announced
            assert problem not in caplog.text
        elif content == pem([b"0\0"]):
            assert problem in caplog.text
        else:  # of the same contents it is told once
            assert caplog.text.count(problem) == 1
        write(foreign, pem(FOREIGN.bundle), 0o644)
        until(lambda: "b.example" in source.current().bundles)


@pytest.mark.slow
def test_our_own_bundle_that_is_broken_is_an_error_as_before(files, caplog):
    with files.open() as source:
        before = source.current()
        write(files.bundle, b"", 0o644)
        until(lambda: "bundle.pem: expected PEM blocks CERTIFICATE" in caplog.text)
        assert source.current() is before


@pytest.mark.slow
def test_a_certificate_of_an_unknown_version_does_not_end_the_source(files, caplog):
    with files.open() as source:
        before, der = source.current(), files.svid.chain_der[0]
        at = der.index(bytes.fromhex("a003020102")) + 4
        bad = der[:at] + b"\x05" + der[at + 1 :]
        write(files.certificate, pem([bad]), 0o644)
        until(lambda: "the certificate on disk is no SVID: " in caplog.text)
        assert source.current() is before
        fresh = files.renew()
        until(lambda: has_serial(source, fresh))


# --- PEM ----------------------------------------------------------------------------


def traditional(key):
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )


def encrypted(key):
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (traditional, "EC PRIVATE KEY"),
        (encrypted, "ENCRYPTED PRIVATE KEY"),
        (lambda _: b"", "nothing"),
    ],
)
def test_w9_a_key_in_another_form_is_refused(files, made, found):
    write(files.key, made(files.svid.key))
    refused(files, rf"expected one PEM block PRIVATE KEY \(PKCS#8.*found {found}$")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: b"# ours\n" + text, "byte 0: expected a PEM block"),
        (lambda text: text + b"and more", "expected a PEM block"),
        (lambda text: text.replace(b"CATE-----\n", b"CATE-----\nA: b\n", 1), "byte 0"),
        (lambda text: text.replace(b"\nM", b"\n=M", 1), "no base64"),
        (lambda text: text[:-10], "byte 0: expected a PEM block"),
        (lambda _: b"", "found nothing"),
    ],
)
def test_a_certificate_file_with_anything_else_is_refused(files, change, message):
    write(files.certificate, change(files.svid.chain_pem()), 0o644)
    refused(files, message)


def test_lines_may_end_as_on_windows(files):
    write(files.certificate, files.svid.chain_pem().replace(b"\n", b"\r\n"), 0o644)
    files.open().close()


def test_files_are_read_within_bounds(files):
    write(files.key, files.svid.key_pem() + b"\n" * 40_000)
    refused(files, r"svid_key\.pem: over 32768 bytes")


# --- the volume of Kubernetes, and the credential folder ----------------------------


class Volume:
    """A projected volume: links into a directory that is swapped as a whole."""

    def __init__(self, folder):
        self.folder, self.turn = folder, 0

    def publish(self, contents):
        self.turn += 1
        fresh = self.folder / f"..2026_01_01_00_00_{self.turn:02}.123456789"
        fresh.mkdir(mode=0o755)
        for name, data in contents.items():
            write(fresh / name, data, 0o640)
        link = self.folder / "..data_tmp"
        link.symlink_to(fresh.name)
        old = (self.folder / "..data").resolve() if self.turn > 1 else None
        link.replace(self.folder / "..data")
        for name in contents:
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(f"..data/{name}")
        for entry in self.folder.iterdir():
            if not entry.name.startswith("..") and entry.name not in contents:
                entry.unlink()
        if old is not None:
            shutil.rmtree(old)


def credentials(authority, svid, *others):
    return {
        "credential-bundle.private-key.pem": svid.key_pem() + svid.chain_pem(),
        **{
            f"{one.trust_domain}.spiffe-trust-bundle.pem": pem(one.bundle)
            for one in (authority, *others)
        },
    }


@pytest.fixture
def folder(private):
    private.chmod(0o1777)  # as the kubelet mounts it
    return private


@pytest.mark.slow
def test_a_kubernetes_volume_is_followed_through_its_swaps(folder, authority):
    volume = Volume(folder)

    def publish():
        svid = authority.issue(ME)
        volume.publish(
            {
                "tls.crt": svid.chain_pem(),
                "tls.key": svid.key_pem(),
                "ca.crt": pem(authority.bundle),
            }
        )
        return svid

    publish()
    names = (folder / name for name in ("tls.crt", "tls.key", "ca.crt"))
    with FileSource(*names, trust_domain="td.example", interval_s=0.05) as source:
        for _ in range(5):
            svid = publish()
            until(lambda svid=svid: has_serial(source, svid))


@pytest.mark.slow
def test_a_credential_folder_is_followed(folder, authority):
    volume = Volume(folder)
    svid = authority.issue(ME)
    volume.publish(credentials(authority, svid, FOREIGN))
    with FolderSource(folder, trust_domain="td.example", interval_s=0.05) as source:
        assert source.current().bundles == authority.bundles | FOREIGN.bundles
        fresh = authority.issue(ME)
        volume.publish(credentials(authority, fresh))
        until(lambda: has_serial(source, fresh))
        until(lambda: "b.example" not in source.current().bundles)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda all_: all_.pop("td.example.spiffe-trust-bundle.pem"),
            "no trust bundle",
        ),
        (lambda all_: all_.pop("credential-bundle.private-key.pem"), "No such file"),
        (
            lambda all_: all_.update({"Td.spiffe-trust-bundle.pem": b"x"}),
            "trust domain",
        ),
    ],
)
def test_a_credential_folder_that_lacks_something_is_refused(
    folder, authority, change, message
):
    contents = credentials(authority, authority.issue(ME))
    change(contents)
    Volume(folder).publish(contents)
    with pytest.raises(IdentityError, match=message):
        FolderSource(folder, trust_domain="td.example")


def test_the_key_comes_first_in_a_credential_bundle(folder, authority):
    svid = authority.issue(ME)
    contents = credentials(authority, svid)
    contents["credential-bundle.private-key.pem"] = svid.chain_pem() + svid.key_pem()
    Volume(folder).publish(contents)
    with pytest.raises(
        IdentityError, match="expected PEM blocks CERTIFICATE, found PRIV"
    ):
        FolderSource(folder, trust_domain="td.example")


def test_a_folder_of_too_many_bundles_is_refused(folder, authority):
    contents = credentials(authority, authority.issue(ME))
    contents |= {f"d{n}.spiffe-trust-bundle.pem": b"" for n in range(64)}
    Volume(folder).publish(contents)
    with pytest.raises(IdentityError, match="65 trust bundles, at most 64"):
        FolderSource(folder, trust_domain="td.example")


@pytest.mark.slow
def test_a_folder_of_too_many_entries_is_refused(folder, authority):
    Volume(folder).publish(credentials(authority, authority.issue(ME)))
    for n in range(1100):
        (folder / str(n)).touch()
    with pytest.raises(IdentityError, match="over 1024 entries"):
        FolderSource(folder, trust_domain="td.example")


# --- who else could change it -------------------------------------------------------


def test_a_key_that_others_can_read_is_refused(files):
    files.key.chmod(0o644)
    refused(files, r"svid_key\.pem has mode 0644: others can change it or read it")
    files.key.chmod(0o640)  # a group may: Kubernetes' fsGroup
    files.open().close()


@pytest.mark.parametrize("name", ["certificate", "key", "bundle"])
@pytest.mark.parametrize("mode", [0o602, 0o620])
def test_a_file_that_others_can_write_is_refused(files, name, mode):
    getattr(files, name).chmod(mode)
    refused(files, f"has mode {mode:04o}: others can change it")


@ROOT_ONLY
@pytest.mark.parametrize("name", ["certificate", "key", "bundle"])
def test_a_file_of_somebody_else_is_refused(files, name):
    os.chown(getattr(files, name), 12345, 0)
    refused(files, "belongs to uid 12345, expected 0 or root")


def test_a_directory_that_others_can_write_is_refused(files):
    files.folder.chmod(0o777)
    refused(files, "has mode 0777: others can change it")
    files.folder.chmod(0o1777)  # sticky: what is ours is ours
    files.open().close()


@ROOT_ONLY
def test_a_directory_above_that_is_somebody_elses_is_refused(private, authority):
    inner = private / "inner"
    inner.mkdir(mode=0o700)
    files = Files(inner, authority)
    os.chown(private, 12345, 0)
    refused(files, "belongs to uid 12345")


def test_a_link_to_the_directory_is_followed_and_both_ways_are_judged(
    private, authority
):
    real = private / "real"
    real.mkdir(mode=0o700)
    files = Files(real, authority)
    (private / "link").symlink_to(real)
    files.certificate = private / "link" / files.certificate.name
    files.open().close()
    private.chmod(0o777)
    refused(files, "has mode 0777")


@pytest.mark.parametrize("name", ["certificate", "key", "bundle"])
def test_a_link_to_elsewhere_is_not_followed(files, name):
    path = getattr(files, name)
    elsewhere = path.rename(files.folder / "elsewhere")
    path.symlink_to(elsewhere)
    refused(files, "only those of a Kubernetes volume are followed")


@pytest.mark.parametrize("target", ["/etc", "../..x", "..", ".hidden", "..a/../.."])
def test_a_version_of_a_volume_that_lies_elsewhere_is_not_followed(files, target):
    (files.folder / "..data").symlink_to(target)
    files.key.unlink()
    files.key.symlink_to(f"..data/{files.key.name}")
    refused(files, "is a link to '.*'; only those of a Kubernetes volume")


def test_a_pipe_is_no_file_and_nobody_waits_for_it(files):
    files.key.unlink()
    os.mkfifo(files.key, 0o600)
    refused(files, "is not a regular file")


def test_a_directory_that_cannot_be_entered_is_named(files):
    files.certificate = Path("/proc/self/mem/x")
    refused(files, "/proc/self/mem/x: ")
