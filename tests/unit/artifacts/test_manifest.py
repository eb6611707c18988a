import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.artifacts.workshop import signing_key
from ztserve.artifacts.publish import model_statement
from ztserve.artifacts.statements.envelope import parse_envelope
from ztserve.artifacts.statements.manifest import (
    SignedFile,
    check_names,
    parse_manifest,
    root_digest,
)
from ztserve.artifacts.statements.serialization import Serialization, parse_shard_name
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
    assert dict(one.files) == {
        "a.json": SignedFile((A,), None),
        "sub/b.json": SignedFile((B,), None),
    }
    assert one.serialization == Serialization("sha256", None)
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
        (set_in("serialization", "method", "dirs"), "method 'dirs' is not supported"),
        (set_in("serialization", "hash_type", "blake2b"), "'blake2b' is not supported"),
        (set_in("serialization", "hash_type", "blake3"), "'a.json' is not blake3"),
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


# --- shards ---------------------------------------------------------------------

EIGHT = Serialization("sha256", 8)
SHARDS = {
    "b.json:0:8": A,
    "b.json:8:16": B,
    "b.json:16:17": A,
    "a/b.json:0:8": B,
    "c.json:0:1": A,
}


def sharded(change=None, resources=SHARDS, how=EIGHT):
    node = json.loads(model_statement("m", resources, serialization=how))
    if change:
        change(node["predicate"], node)
    return json.dumps(node).encode()


def test_shards_make_up_files_of_a_known_size():
    one = manifest(sharded())
    assert one.serialization == EIGHT
    assert dict(one.files) == {
        "a/b.json": SignedFile((B,), 8),
        "b.json": SignedFile((A, B, A), 17),
        "c.json": SignedFile((A,), 1),
    }


def test_shards_are_written_as_the_reference_writes_them_but_for_the_float():
    predicate = json.loads(sharded())["predicate"]
    assert predicate["serialization"]["shard_size"] == 8
    assert [r["name"] for r in predicate["resources"]] == [
        "a/b.json:0:8",
        "b.json:0:8",
        "b.json:8:16",
        "b.json:16:17",
        "c.json:0:1",
    ]
    assert {r["algorithm"] for r in predicate["resources"]} == {"sha256-sharded-8"}


@pytest.mark.parametrize("size", [8, 8.0])
@pytest.mark.parametrize("algorithm", ["sha256", "sha256-sharded-8"])
def test_both_ways_to_write_shards_are_read(size, algorithm):
    def change(predicate, _):
        predicate["serialization"]["shard_size"] = size
        for resource in predicate["resources"]:
            resource["algorithm"] = algorithm

    assert manifest(sharded(change)).files == manifest(sharded()).files


def test_hash_types_differ_in_what_is_signed():
    blake3 = sharded(how=Serialization("blake3", 8))
    assert b"blake3-sharded-8" in blake3
    assert manifest(blake3).digest != manifest(sharded()).digest


@pytest.mark.parametrize(
    "size", [0, -8, 8.5, True, "8", None, 1e300, (1 << 50) + 1, [8]], ids=str
)
def test_a_shard_size_that_is_no_whole_number_in_bounds_is_refused(size):
    change = set_in("serialization", "shard_size", size)
    with pytest.raises(VerificationError, match="expected a whole number of bytes"):
        manifest(sharded(change))


def test_an_infinite_shard_size_is_refused():
    """JSON has no infinity, but a large exponent becomes one."""
    endless = sharded().replace(b'"shard_size": 8', b'"shard_size": 1e999')
    with pytest.raises(VerificationError, match="shard_size is inf, expected a whole"):
        manifest(endless)


def test_a_missing_shard_size_is_refused():
    change = lambda predicate, _: predicate["serialization"].pop("shard_size")  # noqa: E731
    with pytest.raises(VerificationError, match="shard_size is None, expected a whole"):
        manifest(sharded(change))


def renamed(names):
    """The shards of one file under these names, as if signed so."""

    def change(predicate, node):
        first = predicate["resources"][0]
        predicate["resources"] = [{**first, "name": name} for name in names]
        digest = root_digest([first["digest"]] * len(names))
        node["subject"][0]["digest"]["sha256"] = digest

    return change


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["f:8:16"], "'f:8:16' leaves a gap, overlaps .* end at byte 0, each has 8"),
        (["f:0:8", "f:16:24"], "'f:16:24' leaves a gap, .* end at byte 8"),
        (["f:0:8", "f:4:12"], "'f:4:12' leaves a gap, overlaps"),
        (["f:0:8", "f:0:7"], "'f:0:7' leaves a gap, overlaps"),
        (["f:8:16", "f:0:8"], "'f:8:16' leaves a gap, .* end at byte 0"),
        (["f:0:4", "f:4:12"], "'f:4:12' leaves a gap, .* follows a short one"),
        (["f:0:9"], "'f:0:9' has not 1 to 8 bytes"),
        (["f:0:8", "f:8:8"], "'f:8:8' has not 1 to 8 bytes"),
        (["f:0:8", "f:8:4"], "'f:8:4' has not 1 to 8 bytes"),
        (["f:0:0"], "'f:0:0' is not named path:start:end"),
        (["f:0:8", "g:0:8", "f:8:16"], "the shards of 'f' do not stand together"),
        (["f"], "'f' is not named path:start:end"),
        (["f:0"], "'f:0' is not named"),
        (["f:0:8:16"], "'f:0:8:16' is not named"),
        ([":0:8"], "':0:8' is not named"),
        (["f:+0:8"], "is not named"),
        (["f:00:8"], "is not named"),
        (["f:0:8_0"], "is not named"),
        (["f: 0:8"], "is not named"),
        (["f:-8:0"], "is not named"),
        (["f:0:0x8"], "is not named"),
        (["f:0:8\n"], "is not named"),
        (["f:0:\u0668"], "is not named"),
        (["f:0:99999999999999999"], "is not named"),
        (["../f:0:8"], "the file name '../f' is not canonical"),
        (["f:0:8", "f/g:0:8"], "'f' is listed both as a file and as a folder"),
        (["model.sig:0:8"], "'model.sig' cannot be a file of the model"),
        ([], "no file is signed"),
    ],
)
def test_shards_that_do_not_tile_their_files_are_refused(names, message):
    with pytest.raises(VerificationError, match=r"model.sig: .*" + message):
        manifest(sharded(renamed(names)))


@pytest.mark.parametrize(
    "algorithm", ["sha256-sharded-9", "sha256-sharded-8.0", "sha512", "blake3"]
)
def test_a_shard_hashed_in_another_way_than_declared_is_refused(algorithm):
    change = set_in("resources", 0, "algorithm", algorithm)
    with pytest.raises(VerificationError, match="is not sha256-sharded-8 or sha256"):
        manifest(sharded(change))


@pytest.mark.slow
def test_more_shards_than_the_limit_are_refused():
    many = {f"f:{n}:{n + 1}": A for n in range((1 << 16) + 1)}
    with pytest.raises(VerificationError, match="65537 entries, the limit is 65536"):
        manifest(sharded(resources=many, how=Serialization("sha256", 1)))


@pytest.mark.slow
def test_more_files_than_the_limit_are_refused_also_in_shards():
    many = {f"f{n}:0:1": A for n in range(10_001)}
    with pytest.raises(VerificationError, match="10001 files; the limit is 10000"):
        manifest(sharded(resources=many))


def hexadecimal(text):
    return hashlib.sha256(text.encode()).hexdigest()


MODELS = st.dictionaries(
    st.sampled_from(["a", "a-b", "a/b", "b.json", "b/c/d", "z z"]),
    st.integers(1, 40),
    min_size=1,
).filter(lambda files: not {"a", "a/b"} <= files.keys())


def resources_of(sizes, how):
    return {
        how.resource(file, span): hexadecimal(f"{file} {span}")
        for file, size in sizes.items()
        for span in how.spans(size)
    }


@pytest.mark.slow
@settings(deadline=None)
@given(MODELS, st.integers(1, 20), st.sampled_from(["sha256", "blake3"]))
def test_whatever_is_cut_into_shards_is_read_as_it_was_written(sizes, step, hash_type):
    how = Serialization(hash_type, step)
    read = manifest(sharded(resources=resources_of(sizes, how), how=how))
    assert read.serialization == how
    assert read.files == {
        file: SignedFile(
            tuple(hexadecimal(f"{file} {span}") for span in how.spans(size)), size
        )
        for file, size in sizes.items()
    }


@pytest.mark.slow
@settings(deadline=None)
@given(MODELS, st.integers(1, 20), st.data())
def test_no_list_with_a_hole_or_an_overlap_makes_up_the_same_files(sizes, step, data):
    """A shard less, twice, elsewhere or of another extent: refused, or other files."""
    how = Serialization("sha256", step)
    sound = sharded(resources=resources_of(sizes, how), how=how)
    listed = json.loads(sound)["predicate"]["resources"]
    place = data.draw(st.integers(0, len(listed) - 1))
    shard = listed.pop(place)
    file, (start, end) = parse_shard_name(shard["name"])
    by = data.draw(st.sampled_from([None, (0, 1), (1, 0), (1, 1), (0, -1), (-1, 0)]))
    if by is not None:
        span = (start + by[0], end + by[1])
        changed = {**shard, "name": how.resource(file, span)}
        listed.insert(data.draw(st.integers(0, len(listed))), changed)

    def relist(predicate, node):
        predicate["resources"] = listed
        root = root_digest(r["digest"] for r in listed)
        node["subject"][0]["digest"]["sha256"] = root

    try:
        files = manifest(sharded(relist, resources_of(sizes, how), how)).files
    except VerificationError:
        return
    assert files != manifest(sound).files
    for signed in files.values():
        assert len(signed.digests) == len(how.spans(signed.size))


# --- names ----------------------------------------------------------------------


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
