import json

import pytest

from tests.unit.artifacts.workshop import signing_key
from ztserve.artifacts.publish import release_statement
from ztserve.artifacts.statements.envelope import parse_envelope
from ztserve.artifacts.statements.release import check_release, parse_release
from ztserve.errors import VerificationError
from ztserve.types import ModelRef

KEY = signing_key()
DIGEST = "sha256:" + "a" * 64


def release(payload):
    return parse_release(parse_envelope(KEY.envelope(payload), what="release.sig"))


def test_a_release_binds_name_version_and_digest():
    got = release(release_statement("digits", "3", DIGEST))
    assert (got.name, got.version, got.digest) == ("digits", "3", DIGEST)
    check_release(got, ModelRef("digits"), DIGEST)
    check_release(got, ModelRef("digits:3"), DIGEST)


@pytest.mark.parametrize(
    ("ref", "digest", "message"),
    [
        ("fraud", DIGEST, "asked for model 'fraud'.* signed as 'digits' version '3'"),
        ("digits:4", DIGEST, "asked for digits:4, .* signed as version '3'"),
        ("digits", "sha256:" + "b" * 64, "but the manifest is sha256:bbb"),
    ],
)
def test_a_release_of_something_else_is_refused(ref, digest, message):
    got = release(release_statement("digits", "3", DIGEST))
    with pytest.raises(VerificationError, match=message):
        check_release(got, ModelRef(ref), digest)


@pytest.mark.parametrize(
    ("predicate", "message"),
    [
        ({"name": "digits"}, "'version' is missing"),
        ({"name": "digits", "version": 3}, "'version' is of kind int"),
        ({"name": "digits", "version": "3", "x": 1}, "unknown field 'x'"),
        ({"name": "fraud", "version": "3"}, "subject's name is not the released"),
    ],
)
def test_a_release_of_another_shape_is_refused(predicate, message):
    node = json.loads(release_statement("digits", "3", DIGEST))
    node["predicate"] = predicate
    with pytest.raises(VerificationError, match=r"release.sig: .*" + message):
        release(json.dumps(node).encode())


@pytest.mark.parametrize(
    ("name", "version"),
    [("Digits", "1"), ("digits", ""), ("digits", "1@production"), ("a:b", "1")],
)
def test_a_name_that_nobody_could_ask_for_is_refused(name, version):
    with pytest.raises(VerificationError, match="is no model name and version"):
        release(release_statement(name, version, DIGEST))
