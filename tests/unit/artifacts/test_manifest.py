import json

import pytest

from tests.unit.artifacts.workshop import signing_key
from ztserve.artifacts.publish import model_statement
from ztserve.artifacts.statements.envelope import parse_envelope
from ztserve.artifacts.statements.manifest import check_names, parse_manifest
from ztserve.artifacts.statements.strict import Malformed
from ztserve.errors import VerificationError

KEY = signing_key()
A, B = "a" * 64, "b" * 64


def manifest(payload):
    return parse_manifest(parse_envelope(KEY.envelope(payload), what="model.sig"))


def changed(change):
    node = json.loads(model_statement("m", {"a.json": A, "sub/b.json": B}))
    change(node["predicate"], node)
    return json.dumps(node).encode()


def test_a_manifest_lists_its_files_and_is_known_by_the_digest_of_its_statement():
    one = manifest(model_statement("m", {"a.json": A, "sub/b.json": B}))
    assert dict(one.files) == {"a.json": A, "sub/b.json": B}
    assert one.digest.startswith("sha256:")


def test_the_identity_covers_the_names_of_files_unlike_the_formats_root_digest():
    first, second = (model_statement("m", {n: A}) for n in ("a.json", "b.json"))
    root = [json.loads(s)["subject"][0]["digest"] for s in (first, second)]
    assert root[0] == root[1]
    assert manifest(first).digest != manifest(second).digest


def test_equal_files_give_an_equal_identity_whatever_their_order():
    first = model_statement("m", {"a.json": A, "sub/b.json": B})
    assert first == model_statement("m", {"sub/b.json": B, "a.json": A})


def set_in(*path):
    *parents, last, value = path

    def change(predicate, _):
        for parent in parents:
            predicate = predicate[parent]
        predicate[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in("serialization", "method", "shards"), "method 'shards' is not supp"),
        (set_in("serialization", "hash_type", "blake3"), "'blake3' is not supported"),
        (set_in("serialization", "allow_symlinks", True), "allow_symlinks must be"),
        (set_in("serialization", "shard_size", 1), "unknown field 'shard_size'"),
        (set_in("serialization", "ignore_paths", ["x.py"]), "leaves 'x.py' unsigned"),
        (set_in("resources", []), "no file is signed"),
        (set_in("resources", 0, "digest", "AB"), "not 64 lower-case hex digits"),
        (set_in("resources", 0, "digest", B), "not that of the resources"),
        (set_in("resources", 0, "algorithm", "md5"), "of 'a.json' is not sha256"),
        (set_in("resources", 0, "x", 1), "a resource has an unknown field 'x'"),
        (set_in("resources", 1, "name", "a.json"), "'a.json' is listed twice"),
        (lambda _, node: node.pop("subject"), "'subject' is missing"),
    ],
)
def test_a_manifest_that_leaves_the_strict_format_is_refused(change, message):
    with pytest.raises(VerificationError, match=r"model.sig: .*" + message):
        manifest(changed(change))


@pytest.mark.slow
def test_more_files_than_the_limit_are_refused():
    files = {f"f{n}.json": A for n in range(10_001)}
    with pytest.raises(VerificationError, match="10001 entries, the limit is 10000"):
        manifest(model_statement("m", files))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../b",
        "a//b",
        "./a",
        "a/",
        "a\\b",
        "a\0b",
        "a\nb",
        ".git/hook",
        "sub/.hidden",
        "mod\u0435l",
        "a:0:10",
        "x" * 300,
        "a/" * 16 + "b",
    ],
)
def test_a_name_that_is_not_plain_and_relative_is_refused(name):
    with pytest.raises(Malformed, match="is not canonical"):
        check_names([name])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "a/b"], "'a' is listed both as a file and as a folder"),
        (["model.sig"], "'model.sig' cannot be a file of the model"),
        ([], "no file is signed"),
    ],
)
def test_names_that_cannot_be_together_are_refused(names, message):
    with pytest.raises(Malformed, match=message):
        check_names(names)


def test_ordinary_names_pass():
    check_names(["model-00001-of-00002.safetensors", "1_Pooling/config.json", "a b+c"])
