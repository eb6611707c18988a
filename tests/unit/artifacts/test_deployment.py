"""The deployment bundle's statement, and the code that it is held against."""

import dataclasses
import json
import os
import sys

import pytest

from tests.unit.artifacts.studio import Studio
from ztserve.artifacts import (
    Code,
    Deployment,
    DeploymentFloor,
    Part,
    canonical,
    is_found,
    load_class,
    measure_packages,
    measure_tree,
    publish,
    root_of,
    verify_deployment,
)
from ztserve.artifacts.deployment import importing, measuring
from ztserve.artifacts.deployment.judging import read_deployment
from ztserve.artifacts.statements.deployment import digest_of
from ztserve.artifacts.statements.strict import Malformed
from ztserve.errors import ConfigError, VerificationError

ZERO = "sha256:" + "0" * 64
FILES = {"shop.py": ZERO}
PART = Part(
    name="Price",
    target="shop:Price",
    service="price",
    models={"": f"digits:1@{ZERO}"},
    options={"max_ongoing": 32},
    tree=digest_of(FILES),
)
DEPLOYMENT = Deployment(
    application="shop:app",
    sequence=7,
    trust_root="",
    trust_version=1,
    settings={"gateway.port": 8443, "transport.max_call_s": 60.0, "x.on": True},
    files={"policies/a.yaml": ZERO},
    parts={"Price": PART},
    code=Code("3.11.7", "0.1.0", {"numpy": (ZERO,)}, {digest_of(FILES): FILES}),
)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "made/deployment.sig"


# --- the statement ----------------------------------------------------------------


def test_what_is_signed_is_what_is_read(workshop, out):
    made = publish.sign_deployment(
        DEPLOYMENT, workshop.keys["deployer"], out, trust=workshop.trust
    )
    read = verify_deployment(out.read_bytes(), workshop.trust, what="it")
    assert read.signed == made.signed
    assert dataclasses.replace(read.signed, digest="") == DEPLOYMENT
    assert str(read.signer).startswith("deployer as deployer (sha256:")
    assert out.stat().st_mode & 0o777 == 0o644


def test_what_would_be_refused_is_not_written(workshop, out):
    with pytest.raises(VerificationError, match="trusted as trainer, not as deployer"):
        publish.sign_deployment(
            DEPLOYMENT, workshop.keys["trainer"], out, trust=workshop.trust
        )
    assert not out.exists()


def test_an_expired_svid_with_a_timestamp_may_have_signed(tmp_path, out):
    """As for models: who signed a year ago, with an SVID of an hour."""
    studio = Studio(tmp_path)
    policy = studio.policy_path
    policy.write_text(policy.read_text().replace('["trainer"]', '["deployer"]', 1))
    made = publish.sign_deployment(DEPLOYMENT, studio.signer(), out, trust=studio.trust)
    assert made.signer.spiffe == "spiffe://example.test/ns/ml/sa/trainer"
    assert made.signer.signed_at is not None
    with pytest.raises(VerificationError, match=r"deployment bundle .*Mend: sign it"):
        publish.sign_deployment(
            DEPLOYMENT, studio.signer(at=None), out, trust=studio.trust
        )


def changed(**changes):
    predicate = json.loads(publish.deployment_statement(DEPLOYMENT))
    node = predicate["predicate"]
    for path, value in changes.items():
        at = node
        *folders, last = path.split("__")
        for folder in folders:
            at = at[int(folder) if isinstance(at, list) else folder]
        if value is None:
            del at[last]
        else:
            at[last] = value
    return json.dumps(predicate).encode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more": 1}, "predicate has an unknown field 'more'"),
        ({"sequence": None}, "field 'sequence' is missing"),
        ({"sequence": True}, "field 'sequence' is of kind bool, not int"),
        ({"sequence": -1}, "sequence is -1, expected 0 to"),
        ({"sequence": 2**60}, "sequence is 1152921504606846976"),
        ({"trustPolicy__version": "1"}, "'version' is of kind str"),
        ({"settings": []}, "'settings' is of kind list"),
        ({"settings": {str(n): n for n in range(513)}}, "'settings' has 513 entries"),
        ({"files__policies/a.yaml": "sha256:0"}, "'sha256:0' is not sha256:<64 hex"),
        ({"deployments": []}, "deployments is empty, or names one twice"),
        ({"deployments__0__more": 1}, "a deployment has an unknown field 'more'"),
        ({"deployments__0__models": {"": "digits:1"}}, "is not pinned: expected name:"),
        ({"deployments__0__models": {"": "No"}}, "model reference 'No'"),
        ({"deployments__0__labels": {"a": 1}}, "field 'a' is of kind int"),
        ({"deployments__0__options": {"a": -1}}, "a is -1"),
        ({"code__python": None}, "field 'python' is missing"),
        ({"code__python": "3.12.0"}, "the subject's digest is not that of the code"),
        ({"code__packages": {"a": []}}, "package 'a' has no list of digests"),
        ({"code__packages": {"a": [1]}}, "package 'a': 1 is not sha256"),
        ({"code__trees": {ZERO: {}}}, f"the tree '{ZERO}' is not the digest of its"),
    ],
)
def test_a_malformed_statement_is_refused(workshop, changes, message):
    bundle = workshop.keys["deployer"].envelope(changed(**changes))
    with pytest.raises(VerificationError, match=message):
        verify_deployment(bundle, workshop.trust, what="it")


def test_one_deployment_named_twice_is_refused(workshop):
    node = json.loads(publish.deployment_statement(DEPLOYMENT))
    node["predicate"]["deployments"] *= 2
    with pytest.raises(VerificationError, match="names one twice"):
        read_deployment(
            workshop.keys["deployer"].envelope(json.dumps(node).encode()), ""
        )


@pytest.mark.parametrize(
    "value", [float("nan"), {1: 2}, (1,), [(1,)], object(), {"a": b"b"}]
)
def test_what_json_changes_cannot_be_signed(value):
    with pytest.raises(Malformed, match=r"not JSON|JSON gives back"):
        canonical(value)


def test_equal_values_give_equal_text():
    assert canonical({"b": 1, "a": [1.0, "ü"]}) == canonical({"a": [1.0, "ü"], "b": 1})


# --- code -------------------------------------------------------------------------


def lay(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def written(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


def test_a_tree_has_each_file_but_those_left_out(tmp_path):
    written(tmp_path, "a.py", "b/c.txt", ".git/x", "b/__pycache__/a.pyc", ".venv/y.py")
    written(tmp_path, "state/s", "z.toml")
    left = [tmp_path / "state", tmp_path / "z.toml"]
    tree = measure_tree(tmp_path, leave_out=left)
    assert set(tree.files) == {"a.py", "b/c.txt"}
    again = measure_tree(tmp_path, leave_out=left)
    assert tree.digest == again.digest
    (tmp_path / "b/c.txt").write_text("other")
    assert measure_tree(tmp_path, leave_out=left).digest != tree.digest


def test_a_link_to_a_file_counts_as_what_it_leads_to(tmp_path):
    written(tmp_path, "tree/a.py", "elsewhere.py")
    (tmp_path / "tree/b.py").symlink_to(tmp_path / "elsewhere.py")
    before = measure_tree(tmp_path / "tree").files["b.py"]
    (tmp_path / "elsewhere.py").write_text("changed")
    assert measure_tree(tmp_path / "tree").files["b.py"] != before


def test_a_link_to_a_folder_is_refused(tmp_path):
    written(tmp_path, "tree/a.py", "other/b.py")
    (tmp_path / "tree/linked").symlink_to(tmp_path / "other")
    with pytest.raises(ConfigError, match="linked is a link to a folder"):
        measure_tree(tmp_path / "tree")


def test_a_pipe_neither_hangs_nor_passes(tmp_path):
    os.mkfifo(tmp_path / "a.py")
    with pytest.raises(ConfigError, match=r"a.py is no plain file"):
        measure_tree(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.py").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"a.py: cannot be read: No such file"):
        measure_tree(tmp_path)


@pytest.mark.parametrize(
    ("limit", "value"), [("MAX_TREE_FILES", 1), ("MAX_TREE_BYTES", 5)]
)
def test_more_code_than_there_may_be_is_refused(tmp_path, monkeypatch, limit, value):
    written(tmp_path, "a.py", "b.py")
    monkeypatch.setattr(measuring, limit, value)
    with pytest.raises(ConfigError, match=r"is more code than .* keep data and models"):
        measure_tree(tmp_path)


def test_measuring_has_an_end(tmp_path):
    written(tmp_path, "a.py")
    with pytest.raises(ConfigError, match="or 0 s: keep data"):
        measure_tree(tmp_path, timeout_s=0)


def test_folders_too_deep_are_refused(tmp_path):
    written(tmp_path, "/".join(["d"] * 70) + "/a.py")
    with pytest.raises(ConfigError, match="64 folders deep"):
        measure_tree(tmp_path)


def test_packages_are_whatever_can_be_imported(tmp_path):
    written(tmp_path, "a/__init__.py", "b.py", "c.so", "d.pth", "a.libs/f.so.1")
    written(tmp_path, ".hidden/e.py", "__pycache__/b.pyc", "README")
    written(tmp_path, "a-1.dist-info/METADATA", "a-1.dist-info/RECORD")
    found = measure_packages(path=[str(tmp_path)])
    assert set(found) == {"a", "a.libs", "b.py", "c.so", "d.pth", "a-1.dist-info"}
    (tmp_path / "a-1.dist-info/RECORD").write_text("as another installer wrote it")
    assert measure_packages(path=[str(tmp_path)]) == found
    (tmp_path / "a/new.py").write_text("")
    assert measure_packages(path=[str(tmp_path)])["a"] != found["a"]


def test_one_name_in_two_places_has_two_digests(tmp_path):
    roots = [written(tmp_path / "x", "a.py"), lay(tmp_path / "y", a="")]
    (roots[1] / "a").rename(roots[1] / "a.py")
    assert len(measure_packages(path=map(str, roots))["a.py"]) == 2


def test_a_zip_file_on_sys_path_is_measured(tmp_path):
    written(tmp_path, "torch.zip")
    assert set(measure_packages(path=[str(tmp_path / "torch.zip")])) == {"torch.zip"}


def test_an_editable_package_is_refused(tmp_path):
    written(tmp_path, "__editable___shop_1_0_finder.py")
    with pytest.raises(ConfigError, match="installed as editable, so its code lies"):
        measure_packages(path=[str(tmp_path)])


def test_too_many_packages_are_refused(tmp_path, monkeypatch):
    written(tmp_path, "a.py", "b.py")
    monkeypatch.setattr(measuring, "MAX_PACKAGES", 1)
    with pytest.raises(ConfigError, match="2 packages can be imported, the limit is 1"):
        measure_packages(path=[str(tmp_path)])


def test_which_folders_are_measured(tmp_path):
    site = tmp_path / "tree/.venv/lib/site-packages"
    for folder in (site / "ray/thirdparty", tmp_path / "lib", tmp_path / "lib/bin-x"):
        folder.mkdir(parents=True)
    path = [
        str(tmp_path / "tree"),
        str(tmp_path / "tree/inner"),
        *(str(site), str(site / "ray/thirdparty"), str(site)),
        *(str(tmp_path / "lib"), str(tmp_path / "lib/bin-x")),
        str(tmp_path / "gone.zip"),
        os.path.dirname(os.__file__),  # noqa: PTH120
    ]
    assert measuring.import_roots(path, [tmp_path / "tree"]) == [
        site,  # in the tree's folder, and no part of it
        tmp_path / "lib",
        tmp_path / "lib/bin-x",  # no name that could be imported from lib
    ]


def test_where_a_module_lies_is_found_without_importing_it(tmp_path, monkeypatch):
    written(tmp_path, "plain_one.py", "packed_one/__init__.py", "spaced_one/inner.py")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in ("plain_one", "packed_one.inner", "spaced_one.inner"):
        assert root_of(name) == tmp_path
        assert name.partition(".")[0] not in sys.modules
    assert root_of("numpy") is root_of("json") is None
    assert not is_found("nowhere_at_all")
    with pytest.raises(ConfigError, match=r"no module 'nowhere_at_all' on sys.path"):
        root_of("nowhere_at_all")


# --- importing --------------------------------------------------------------------


@pytest.fixture
def guarded(tmp_path, monkeypatch):
    lay(tmp_path, **{"guarded_one.py": "class A:\n  class B:\n    value = 1\nx = 1\n"})
    lay(tmp_path, **{"guarded_pack__inner.py": "import guarded_one\nvalue = 2\n"})
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importing.guard(measure_tree(tmp_path))
    yield tmp_path
    importing.release(tmp_path)
    assert not {name for name in sys.modules if name.startswith("guarded_")}


def test_measured_modules_are_imported(guarded):
    assert load_class("guarded_one:A.B").value == 1
    assert importing.import_module("guarded_pack.inner").value == 2
    assert not list(guarded.rglob("__pycache__"))


def test_a_module_that_was_not_measured_is_refused(guarded):
    (guarded / "guarded_new.py").write_text("")
    with pytest.raises(VerificationError, match=r"guarded_new.py is .* was not there"):
        importing.import_module("guarded_new")


def test_a_linked_module_counts_as_what_was_measured(tmp_path, monkeypatch):
    lay(tmp_path, **{"elsewhere.txt": "value = 1", "tree__guarded_x.py": ""})
    link = tmp_path / "tree/guarded_linked.py"
    link.symlink_to(tmp_path / "elsewhere.txt")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "tree"), *sys.path])
    importing.guard(measure_tree(tmp_path / "tree"))
    assert importing.import_module("guarded_linked").value == 1
    del sys.modules["guarded_linked"]
    (tmp_path / "elsewhere.txt").write_text("value = 2")
    with pytest.raises(
        VerificationError, match=r"guarded_linked.py is .*changed since"
    ):
        importing.import_module("guarded_linked")
    importing.release(tmp_path / "tree")


def test_bytes_of_no_measured_tree_are_refused(tmp_path):
    with pytest.raises(VerificationError, match="lies in no tree that was measured"):
        importing.check_bytes(tmp_path / "a.py", b"")


def test_what_was_imported_before_is_imported_anew(tmp_path, monkeypatch):
    lay(tmp_path, **{"guarded_old.py": "value = 1"})
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    old = importing.import_module("guarded_old")
    importing.guard(measure_tree(tmp_path))
    assert importing.import_module("guarded_old") is not old
    importing.release(tmp_path)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("guarded_none:A", "cannot be imported: No module named"),
        ("guarded_one:None_", "cannot be imported: "),
        ("guarded_one:x", "'guarded_one:x' is no class"),
        ("guarded_one:", "cannot be imported"),
    ],
)
def test_what_is_no_class_is_refused(guarded, target, message):
    with pytest.raises(ConfigError, match=message):
        load_class(target)


# --- the floor --------------------------------------------------------------------


def test_applications_have_floors_of_their_own(tmp_path):
    kept = DeploymentFloor(tmp_path)
    assert kept.newest("shop:app") == 0
    kept.keep(dataclasses.replace(DEPLOYMENT, digest=ZERO))
    kept.keep(dataclasses.replace(DEPLOYMENT, application="b:app", sequence=2))
    assert (kept.newest("shop:app"), kept.newest("b:app")) == (7, 2)
    with pytest.raises(VerificationError, match="is number 6, and this node has seen"):
        kept.check(dataclasses.replace(DEPLOYMENT, sequence=6))
    kept.check(dataclasses.replace(DEPLOYMENT, application="b:app", sequence=3))


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a": {"sequence": "1"}}'])
def test_a_floor_that_cannot_be_read_is_no_floor_of_zero(tmp_path, text):
    kept = DeploymentFloor(tmp_path)
    kept.path.write_text(text)
    kept.path.chmod(0o600)
    with pytest.raises(ConfigError, match="which deployment bundles were seen: put it"):
        kept.keep(DEPLOYMENT)


def test_a_floor_has_no_end_of_applications(tmp_path, monkeypatch):
    from ztserve.artifacts.deployment import floor

    monkeypatch.setattr(floor, "MAX_APPLICATIONS", 0)
    with pytest.raises(ConfigError, match="knows 0 applications"):
        DeploymentFloor(tmp_path).keep(DEPLOYMENT)
