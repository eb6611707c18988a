import pytest

from tests.unit.identity.federated import DOOR, THEIRS
from ztserve.errors import ConfigError
from ztserve.identity.federation.relationship import Relationship, read_relationships

WEB = {"trust_domain": THEIRS, "profile": "https_web", "url": "https://b.example/x"}
SPIFFE = {
    **WEB,
    "profile": "https_spiffe",
    "spiffe_id": DOOR,
    "bootstrap": "b.json",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "http://b.example/x"}, "the scheme must be https"),
        ({"url": "HTTP://b.example/x"}, "the scheme must be https"),
        ({"url": "file:///etc/passwd"}, "the scheme must be https"),
        ({"url": "https://user@b.example/"}, "user information is not allowed"),
        ({"url": "https://u:p@b.example/"}, "user information is not allowed"),
        ({"url": "https://@b.example/"}, "user information is not allowed"),
        ({"url": "https:///x"}, "expected https://host"),
        ({"url": "https://b.example:99999/"}, "Port out of range"),
        ({"url": "https://b.example:0/"}, "expected https://host"),
        ({"url": "https://b.example/\r\nX: y"}, "printable ASCII"),
        ({"url": "https://b.example/" + "x" * 2048}, "at most 2048"),
    ],
)
@pytest.mark.parametrize("profile", [WEB, SPIFFE], ids=["https_web", "https_spiffe"])
def test_f3_a_url_is_https_without_a_user(profile, changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read_relationships([profile | changes], tmp_path)


def test_f3_https_web_needs_no_further_parameter(tmp_path):
    (one,) = read_relationships([WEB], tmp_path)
    assert one == Relationship(THEIRS, "https_web", "https://b.example/x")
    assert one.endpoint_domain == ""


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({**WEB, "trust_domain": ""}, "expected a string, got ''"),
        ({k: v for k, v in WEB.items() if k != "trust_domain"}, "trust_domain is miss"),
        ({**WEB, "trust_domain": "spiffe://b.example"}, "lower-case letters"),
        ({**WEB, "trust_domain": "b.example/x"}, "bare name"),
    ],
)
def test_f7_the_trust_domains_name_is_known_beforehand(table, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read_relationships([table], tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {**WEB, "profile": "web"},
            "profile 'web', expected one of https_web, https_s",
        ),
        ({"trust_domain": THEIRS}, "profile is missing"),
        ({**WEB, "verify": "no"}, "'verify' is not a known key; expected one of boot"),
        ({**WEB, "url": 7}, "url: expected a string, got 7"),
        ({**WEB, "spiffe_id": DOOR}, "spiffe_id has no meaning here"),
        ({**WEB, "bootstrap": "b"}, "bootstrap has no meaning here"),
        ({**SPIFFE, "spiffe_id": "spiffe://b.example"}, "needs a path"),
        ({**SPIFFE, "file": "b.json"}, "file has no meaning here"),
        ({"trust_domain": THEIRS, "profile": "file"}, "profile file needs file"),
        ({**WEB, "profile": "https_spiffe"}, "profile https_spiffe needs spiffe_id"),
        (
            {k: v for k, v in SPIFFE.items() if k != "bootstrap"},
            "profile https_spiffe needs bootstrap",
        ),
        (
            {**SPIFFE, "spiffe_id": "spiffe://c.example/x"},
            "bootstrap has no meaning here",
        ),
        ("b.example", "expected a table"),
    ],
)
def test_a_table_that_is_not_understood_is_refused(table, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read_relationships([table], tmp_path)


def test_tables_are_refused_together(tmp_path):
    with pytest.raises(ConfigError, match="expected tables"):
        read_relationships({"b.example": WEB}, tmp_path)
    with pytest.raises(ConfigError, match="given twice"):
        read_relationships([WEB, SPIFFE], tmp_path)
    other = {**SPIFFE, "spiffe_id": "spiffe://c.example/x"}
    del other["bootstrap"]
    with pytest.raises(ConfigError, match="that we do not federate with"):
        read_relationships([other], tmp_path)
    many = [{**WEB, "trust_domain": f"b{n}.example"} for n in range(64)]
    with pytest.raises(ConfigError, match="64 trust domains, at most 63"):
        read_relationships(many, tmp_path)
    assert len(read_relationships(many[1:], tmp_path)) == 63


def test_paths_are_under_the_directory_of_the_configuration(tmp_path):
    (one,) = read_relationships([SPIFFE], tmp_path)
    assert one.bootstrap == tmp_path / "b.json"
