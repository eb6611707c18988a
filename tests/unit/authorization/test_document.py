import pytest

from ztserve.authorization.document import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_DOCUMENTS,
    MAX_NODES,
    read,
)
from ztserve.errors import ConfigError


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        list(read(text, "file.yaml"))
    return str(caught.value)


def test_values_keep_their_line_and_path():
    (document,) = read("a:\n  b:\n    - c: one\n", "file.yaml")
    node = document.mapping()["a"].mapping()["b"].sequence()[0].mapping()["c"]
    assert (node.text(), node.line, node.path) == ("one", 3, "a.b[0].c")
    assert str(node.error("wrong")) == "file.yaml, line 3: a.b[0].c: wrong"


def test_empty_documents_are_left_out():
    assert len(list(read("---\n# nothing\n---\na: b\n---\n", "x"))) == 1
    assert list(read("", "x")) == []


def test_a_duplicate_key_is_refused():
    assert "line 2: a: the field 'b'" not in refusal("a: {b: c}\na: {b: d}\n")
    assert refusal("a: x\na: y\n") == (
        "file.yaml, line 2: the field 'a' stands here twice"
    )


def test_anchors_and_aliases_are_refused():
    bomb = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
    assert "line 1: a: anchors and aliases" in refusal(bomb)
    assert "undefined alias" not in refusal("a: *nowhere\n")


@pytest.mark.parametrize(
    "text", ["a: !!python/object/apply:os.system [id]", "a: !own x", "a: !!str 1"]
)
def test_tags_are_refused(text):
    assert "tag" in refusal(text)


def test_keys_that_are_not_strings_are_refused():
    assert "plain string" in refusal("true: x\n")
    assert "plain string" in refusal("<<: {a: b}\n")
    assert "plain string" in refusal("? [a]\n: b\n")


@pytest.mark.slow
def test_more_bytes_documents_values_or_levels_than_allowed_are_refused():
    assert "larger than" in refusal("#" * (MAX_BYTES + 1))
    assert "larger than" in refusal("#" + "é" * (MAX_BYTES // 2))
    assert "documents" in refusal("---\na: b\n" * (MAX_DOCUMENTS + 1))
    assert "values" in refusal("[" + "x," * (MAX_NODES + 1) + "]")
    assert "levels" in refusal("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2))


def test_text_that_is_not_yaml_is_refused_with_its_line():
    assert refusal("a: b\nc: [d\n").startswith("file.yaml, line 3: not YAML: ")
    assert "not YAML" in refusal("a: \x07")


@pytest.mark.parametrize(
    ("value", "kind"), [("8080", "int"), ("yes", "bool"), ("1.5", "float")]
)
def test_a_value_that_yaml_does_not_read_as_a_string_is_refused(value, kind):
    (document,) = read(f"a: {value}", "x")
    with pytest.raises(ConfigError, match=rf"found a YAML {kind}; write it in quotes"):
        document.mapping()["a"].text()


def test_values_of_another_shape_are_refused_by_name():
    (document,) = read("a: [x]\nb: {c: d}\ne: ''\nf: []\ng:\n", "x")
    fields = document.mapping()
    for name, ask, message in [
        ("a", "mapping", "expected a mapping, found a list"),
        ("b", "sequence", "expected a list, found a mapping"),
        ("b", "text", "expected a string, found a mapping"),
        ("e", "text", "an empty string is not allowed"),
        ("f", "sequence", "an empty list means nothing"),
        ("g", "mapping", "expected a mapping, found empty"),
    ]:
        with pytest.raises(ConfigError, match=message):
            getattr(fields[name], ask)()


def test_an_unknown_field_is_refused_with_what_was_meant_and_what_is_allowed():
    (document,) = read("path: x", "x")
    with pytest.raises(
        ConfigError, match=r"did you mean 'paths'\?\); allowed here: hosts, paths"
    ):
        document.fields(("hosts", "paths"))
