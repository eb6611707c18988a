import time
from unittest.mock import Mock

import pytest

from tests.unit.identity.federated import (
    THEIRS,
    Endpoint,
    federated,
    saved,
    spiffe,
    throw_away,
    until,
)
from ztserve.errors import ConfigError, VerificationError
from ztserve.identity.federation.relationship_file import RelationshipFile

WEB = """
[[federation]]
trust_domain = "b.example"
profile = "https_web"
url = "https://127.0.0.1:1/"
"""
FILE = """
[[federation]]
trust_domain = "c.example"
profile = "file"
file = "c.example.json"
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "federation.toml"


def write(path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    new.chmod(0o600)
    new.replace(path)


def test_the_file_says_with_whom_we_federate(path):
    write(path, WEB + FILE)
    web, file = RelationshipFile(path).relationships
    assert (web.trust_domain, web.profile) == (THEIRS, "https_web")
    assert file.file == path.parent / "c.example.json"
    write(path, "federation = []")
    assert RelationshipFile(path).relationships == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected \[\[federation\]\] tables, or federation = \[\]; got nothing"),
        ("[[federated]]", "got 'federated'"),
        (WEB + "[more]", "got 'federation', 'more'"),
        ("[federation]", "expected tables"),
        ("federation = [", "is not valid TOML"),
        ("federation = " + "[" * 9999, "is not valid TOML"),
        ("\x00", "is not valid TOML"),
        (WEB.replace("https:", "http:"), "federation.toml: federation with .*https"),
        (WEB + WEB, "given twice"),
        (WEB + "x = 1", "'x' is not a known key"),
        ("#" * (256 * 1024 + 1), "over 262144 bytes"),
    ],
)
def test_a_file_that_is_not_understood_is_refused(path, text, message):
    write(path, text)
    with pytest.raises(ConfigError, match=message):
        RelationshipFile(path)


def refuse(raw):
    raise VerificationError(f"{len(raw)} bytes that nobody signed")


def test_bytes_that_are_refused_are_not_parsed(path):
    write(path, "not even TOML")
    with pytest.raises(VerificationError, match="13 bytes that nobody signed"):
        RelationshipFile(path, check=refuse)


def test_a_file_that_others_can_change_or_that_is_not_there_is_refused(path):
    with pytest.raises(ConfigError, match="No such file"):
        RelationshipFile(path)
    write(path, WEB)
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="others can change it"):
        RelationshipFile(path)


@pytest.mark.slow
def test_an_edit_takes_effect_within_a_second(path, tmp_path):
    theirs, other = throw_away(), throw_away("c.example")
    saved(tmp_path, other.trust_bundle())
    with Endpoint(theirs) as endpoint:
        one = spiffe(endpoint, tmp_path, theirs)
        text = f"""
            [[federation]]
            trust_domain = "b.example"
            profile = "https_spiffe"
            url = "{one.url}"
            spiffe_id = "{one.spiffe_id}"
            bootstrap = "{one.bootstrap.name}"
        """
        write(path, text + FILE)
        events = []
        file = RelationshipFile(path, on_event=lambda *told: events.append(told))
        with federated(*file.relationships) as federation:
            file.follow(federation)
            assert set(federation.bundles()) == {THEIRS, "c.example"}
            write(path, text)
            took_s = until(lambda: set(federation.bundles()) == {THEIRS})
            assert took_s < 1
            until(lambda: events)
            assert events == [("relationships-loaded", {"trust_domains": [THEIRS]})]
            for count, bad in enumerate(
                (text.replace("https_spiffe", "none"), "", text + FILE * 2), 2
            ):
                write(path, bad)
                until(lambda count=count: len(events) == count)
                assert events[-1][0] == "relationships-refused"
                assert set(federation.bundles()) == {THEIRS}
            path.unlink()
            until(lambda: len(events) == 5)
            assert "No such file" in events[-1][1]["reason"]
            assert set(federation.bundles()) == {THEIRS}
            write(path, "federation = []")
            assert until(lambda: not federation.bundles()) < 1
            file.close()


def refused_reasons(events):
    return [told[1]["reason"] for told in events if told[0] == "relationships-refused"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "bad",
    [
        FILE.replace("c.example.json", "c\\u0000.json"),  # a NUL in a path
        "[[federation]]\ntrust_domain = 0x" + "F" * 4000,
    ],
    ids=["nul", "integer"],
)
def test_no_edit_ends_the_follower(path, tmp_path, bad):
    saved(tmp_path, throw_away("c.example").trust_bundle())
    write(path, FILE)
    events = []
    file = RelationshipFile(path, on_event=lambda *told: events.append(told))
    with federated(*file.relationships) as federation:
        file.follow(federation)
        write(path, bad)
        until(lambda: events)
        assert set(federation.bundles()) == {"c.example"}
        write(path, "federation = []")
        until(lambda: not federation.bundles())
        assert len(refused_reasons(events)) == 1
        file.close()


@pytest.mark.slow
def test_whatever_an_edit_raises_is_told_and_the_next_one_counts(path):
    write(path, WEB)
    events = []
    file = RelationshipFile(path, on_event=lambda *told: events.append(told))
    federation = Mock()
    federation.set_relationships.side_effect = [RuntimeError("odd"), None]
    file.follow(federation)
    write(path, "federation = []")
    until(lambda: len(events) == 2)
    assert [name for name, _ in events] == [
        "relationships-refused",
        "relationships-loaded",
    ]
    assert "RuntimeError('odd')" in refused_reasons(events)[0]
    file.close()


@pytest.mark.slow
def test_a_refused_edit_is_tried_again_and_told_once(path, tmp_path):
    other = throw_away("c.example")
    write(path, WEB)
    events = []
    file = RelationshipFile(path, on_event=lambda *told: events.append(told))
    with federated(*file.relationships) as federation:
        file.follow(federation)
        write(path, FILE)  # whose bundle comes later
        until(lambda: events)
        time.sleep(0.7)
        assert len(events) == 1
        saved(tmp_path, other.trust_bundle())
        until(lambda: set(federation.bundles()) == {"c.example"})
        until(lambda: len(events) == 2)
        assert events[1] == ("relationships-loaded", {"trust_domains": ["c.example"]})
        file.close()
