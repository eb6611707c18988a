"""Attacks on what else decides what runs: each works where its control is out."""

import importlib.util
import json
import os
import py_compile
import shutil
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.artifacts.workshop import Workshop, pem, signing_key
from tests.unit.serving.shop import DOMAIN, MODULE, PAIR, POLICY, private, shop
from ztserve import artifacts, config
from ztserve.artifacts import TrustPolicy, VerifiedDeployment, publish
from ztserve.artifacts.deployment import anchor, floor, importing, judging
from ztserve.cli import main
from ztserve.errors import ConfigError, Denied, VerificationError
from ztserve.serving import parts
from ztserve.types import ModelRef

pytestmark = pytest.mark.slow
__all__ = ["shop"]


@pytest.fixture
def without(monkeypatch):
    """Take a check of the bundle out: `without("check_file")`."""

    def take_out(*names, of=VerifiedDeployment):
        for name in names:
            monkeypatch.setattr(of, name, lambda *_, **__: None)

    return take_out


@pytest.fixture
def anywhere(monkeypatch):
    """Have classes imported from wherever Python finds them, measured or not."""

    def take_out():
        load = importing.load_class
        monkeypatch.setattr(parts, "load_class", lambda target, tree: load(target))

    return take_out


def refused(shop, message, kind=VerificationError, **changes):
    with pytest.raises(kind, match=message):
        shop.make(**changes)[0].start()


def stranger_gets_in(shop, replica):
    with pytest.raises(Denied):
        shop.call(replica)
    return shop.call(replica, caller="stranger") == 2.0


# --- configuration and policies ---------------------------------------------------


def test_an_edited_istio_policy_is_refused(shop, without):
    shop.write("policies/callers.yaml", POLICY.format(caller="stranger"))
    refused(shop, r"the file policies/callers.yaml is sha256:\w+, signed as sha256:")
    without("check_file")
    with shop.replica(name="r2") as replica:
        assert stranger_gets_in(shop, replica)


def test_no_door_forgets_the_bundle_when_it_reads_policies(shop):
    settings = config.load()
    asked = {"service": "new", "namespace": "ztserve", "operations": None}
    with pytest.raises(ConfigError, match="without the deployment bundle, which"):
        config.load_policies(settings, **asked)
    signed = config.load_deployment(settings)
    assert config.load_policies(settings, **asked, signed=signed)


def test_an_edited_federation_file_is_refused(shop, without):
    """It says whose identities policies may name: here those of one more domain."""
    toml = shop.folder / config.FILE
    toml.write_text(
        toml.read_text().replace("[artifacts]", 'federation = "with.toml"\n[artifacts]')
    )
    shop.write("with.toml", "federation = []\n")
    shop.sign()
    with shop.replica():
        pass
    shop.write("with.toml", "federation = [] # and more\n")
    refused(shop, "the file with.toml is sha256:", name="r2")
    without("check_file")
    with shop.replica(name="r3"):
        pass


def test_a_policy_swapped_after_it_was_checked_changes_nothing(shop, monkeypatch):
    """The bytes that are hashed are those that are parsed: there is no second read."""
    path = shop.folder / "policies/callers.yaml"
    check = VerifiedDeployment.check_file

    def check_and_swap(self, name, raw):
        check(self, name, raw)
        path.write_text(POLICY.format(caller="stranger"))

    monkeypatch.setattr(VerifiedDeployment, "check_file", check_and_swap)
    with shop.replica() as replica:
        assert shop.call(replica) == 2.0
        with pytest.raises(Denied):
            shop.call(replica, caller="stranger")


@pytest.mark.parametrize(
    ("table", "values", "key"),
    [
        ("validation", {"max_rows": 9}, r"key \[validation\] max_rows is 9, signed as"),
        (
            "authorization",
            {"delegates": ("spiffe://shop.example/ns/dev/sa/stranger",)},
            r"key \[authorization\] delegates is \['spiffe",
        ),
        ("transport", {"host": "127.0.0.2"}, r"\[transport\] host is '127.0.0.2'"),
    ],
)
def test_a_key_changed_in_the_plan_is_refused(shop, without, table, values, key):
    changed = {"settings": {table: values}}
    refused(shop, f"ztserve.toml differs from what was signed: .*{key}", **changed)
    without("check_settings")
    with shop.replica(name="r2", **changed) as replica:
        assert shop.call(replica) == 2.0


def test_another_folder_has_no_other_floors_and_quarantine(
    shop, without, anywhere, tmp_path
):
    """A copy of the project, all signed: but its node has seen nothing there."""
    old = shop.bundle.read_bytes()
    shop.sign()
    with shop.replica():
        pass
    copy = tmp_path / "copy"
    shutil.copytree(shop.folder, copy, ignore=shutil.ignore_patterns("*floor*"))
    (copy / ".ztserve/deployment.sig").write_bytes(old)
    plan, args, kwargs = shop.plan()
    moved = config.load(copy / config.FILE)
    planned = replace(plan, settings=moved), args, kwargs
    refused(shop, "key folder is .*copy', signed as '.*project'", planned=planned)
    without("check_settings", "check_tree")
    anywhere()
    shutil.rmtree(copy / ".ztserve/audit")
    shop.forget()
    with shop.replica(planned=planned, name="r2") as replica:
        assert replica.signed.signed.sequence == 1


def test_a_trust_policy_swapped_for_an_older_one_is_refused(shop, monkeypatch):
    """Between the bundle's verification and the judging of models it is read again."""
    older = shop.workshop.policy_path.read_bytes()
    sig = shop.workshop.policy_path.with_name("trust.toml.sig")
    old_sig = sig.read_bytes()
    shop.write_policy(head="version = 2")
    shop.sign()
    follow = config.follow_trust

    def swap_and_follow(settings):
        (shop.folder / ".ztserve/trust-floor.json").unlink(missing_ok=True)
        shop.workshop.policy_path.write_bytes(older)
        sig.write_bytes(old_sig)
        return follow(settings)

    monkeypatch.setattr(config, "follow_trust", swap_and_follow)
    refused(shop, "the trust policy is version 1, signed as at least 2")


def test_an_edited_ztserve_toml_is_refused_by_name(shop):
    toml = shop.folder / config.FILE
    toml.write_text(toml.read_text().replace("[gateway]", "[gateway]\nport = 9443"))
    refused(shop, r"\[gateway\] port is 9443, signed as 8443.*bundle sign")
    (told,) = [r for r in shop.records() if r.get("activity_name") != "log-opened"]
    assert told["activity_name"] == "deployment-refused"
    assert "[gateway] port is 9443" in told["unmapped"]["reason"]


# --- the root of it all -----------------------------------------------------------


@pytest.fixture
def takeover(shop, tmp_path):
    """Settings of one who deploys, under a trust root and a deployer of its own."""
    made = tmp_path / "evil"
    made.mkdir()
    evil, root = Workshop(made), signing_key()
    evil.registry = shop.workshop.registry
    keys = {role: shop.workshop.keys[role] for role in ("trainer", "evaluator")}
    evil.keys |= keys
    evil.published("evil-model", version="2", fill=9.0)
    evil.write_policy(head=f'version = 1\ntrust_domain = "{DOMAIN}"')
    publish.sign_policy(evil.policy_path, root)
    (made / "root.pub").write_text(pem(root))
    (made / "deployer.pem").write_bytes(private(evil.keys["deployer"]))
    (made / "deployer.pem").chmod(0o600)
    toml = shop.folder / config.FILE
    good = toml.read_text()
    toml.write_text(
        good.replace("../work/trust.toml", "../evil/trust.toml")
        .replace('"root.pub"', '"../evil/root.pub"')
        .replace("wait_s = 1\n[auth", 'deployment_bundle = "evil.sig"\n[auth')
    )
    shop.write("shopping.py", MODULE.replace("production", "x").replace("@x", ":2"))
    shop.key = made / "deployer.pem"
    shop.sign()
    planned = shop.plan()
    toml.write_text(good)
    return planned


@pytest.fixture
def anchored(tmp_path, monkeypatch):
    """Place the node's own trust root, as its owner would under /etc."""

    def place(text, mode=0o644, owner=None):
        path = tmp_path / "anchor.pem"
        path.write_text(text)
        path.chmod(mode)
        monkeypatch.setattr(anchor, "ANCHOR", path)
        monkeypatch.setattr(anchor, "OWNER", os.geteuid() if owner is None else owner)
        return path

    return place


def test_another_trust_root_is_refused_where_the_node_has_its_own(
    shop, takeover, anchored
):
    with shop.replica(planned=takeover) as replica:  # no anchor: settings decide
        assert shop.call(replica) == 18.0
    anchored(pem(shop.root))
    shop.forget()
    message = r"this node's trust root is sha256:.*the node's counts, whatever"
    refused(shop, message, ConfigError, planned=takeover, name="r2")


def test_profile_development_in_the_plan_does_not_switch_the_bundle_off(shop, anchored):
    shop.write("shopping.py", MODULE.replace("factor=2.0", "factor=3.0"))
    settings = {"profile": "development"}
    bundle = shop.bundle.rename(shop.folder / "away.sig")
    with shop.replica(settings=settings) as replica:  # no anchor: settings decide
        assert shop.call(replica) == 3.0
    anchored(pem(shop.root))
    message = "there is no deployment bundle"
    refused(shop, message, ConfigError, settings=settings, name="r2")
    bundle.rename(shop.bundle)
    message = r"key profile is 'development', signed as 'production'"
    refused(shop, message, settings=settings, name="r3")


def test_an_anchor_that_others_could_have_written_is_refused(shop, anchored):
    anchored(pem(shop.root), mode=0o666)
    refused(shop, "others can change it", ConfigError)
    anchored(pem(shop.root), owner=os.geteuid() + 1)
    refused(shop, "belongs to uid .*chown root", ConfigError, name="r2")
    anchored("nonsense")
    refused(shop, "the node's trust root .* is not a PEM", ConfigError, name="r3")
    anchored(pem(shop.root))
    with shop.replica(name="r4") as replica:
        assert shop.call(replica) == 2.0


def test_a_running_process_keeps_its_trust_root(shop):
    followed = config.follow_trust(config.load())
    stranger = signing_key()
    shop.write("root.pub", pem(stranger))
    newer = "version = 2"
    shop.write_policy(stranger, head=newer)
    with pytest.raises(ConfigError, match="what runs keeps its trust root"):
        followed.look()
    assert (
        TrustPolicy.load(
            shop.workshop.policy_path, root=shop.folder / "root.pub"
        ).version
        == 2
    )  # by itself it is a policy


# --- who signed, and which --------------------------------------------------------


@pytest.mark.parametrize("role", ["trainer", "evaluator"])
def test_a_bundle_signed_in_another_role_is_refused(shop, role):
    signed = shop.bundle.read_bytes()
    payload = artifacts.deployment.judging.parse_envelope(signed, what="x").payload
    shop.bundle.write_bytes(shop.workshop.keys[role].envelope(payload))
    refused(shop, f"trusted as {role}, not as deployer. Mend: sign it with a deployer")
    shop.write_policy(head="version = 2", roles={role: ["trainer", "deployer"]})


def test_a_bundle_signed_by_a_stranger_is_refused(shop):
    payload = judging.parse_envelope(shop.bundle.read_bytes(), what="x").payload
    shop.bundle.write_bytes(shop.workshop.stranger.envelope(payload))
    refused(shop, "the deployment bundle .*none of the trust policy's signers")


def test_an_edited_bundle_is_refused(shop, without):
    def edit(raw):
        import base64

        node = json.loads(raw)
        payload = base64.b64decode(node["dsseEnvelope"]["payload"])
        payload = payload.replace(b'max_rows": 1024', b'max_rows": 9')
        node["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
        return json.dumps(node).encode()

    shop.bundle.write_bytes(edit(shop.bundle.read_bytes()))
    changed = {"settings": {"validation": {"max_rows": 9}}}
    refused(shop, "the signature does not hold", **changed)
    from ztserve.artifacts.trust import policy

    without("check_signature", of=policy)
    with shop.replica(name="r2", **changed) as replica:
        assert shop.call(replica) == 2.0


def test_an_older_bundle_is_not_taken_back(shop, without):
    old = shop.bundle.read_bytes()
    with shop.replica():
        pass
    shop.sign()
    with shop.replica(name="r2"):
        pass
    shop.bundle.write_bytes(old)
    refused(shop, r"is number 1, and this node has seen number 2.*not taken back")
    without("_check", of=floor.DeploymentFloor)
    with shop.replica(name="r3") as replica:
        assert shop.call(replica) == 2.0


def test_two_bundles_of_one_number_are_not_both_taken(shop):
    with shop.replica():
        pass
    shop.write("shopping.py", MODULE.replace("factor=2.0", "factor=3.0"))
    shop.sign("shopping:app", "--sequence", "1")
    refused(shop, "two deployment bundles of shopping:app are number 1")


def test_a_revoked_bundle_is_refused_on_a_node_that_has_seen_none(shop):
    raw = shop.bundle.read_bytes()
    digest = judging.read_deployment(raw, "x").digest
    tail = f'[revoked]\nmanifests = [{{ digest = "{digest}", reason = "leaks" }}]\n'
    shop.write_policy(head="version = 2", tail=tail)
    refused(shop, rf"revokes the deployment bundle {digest}: leaks")
    shop.write_policy(head="version = 3")
    with shop.replica(name="r2"):
        pass


def test_an_older_trust_policy_than_at_the_signing_is_refused(shop, without):
    shop.write_policy(head="version = 2")
    shop.sign()
    (shop.folder / ".ztserve/trust-floor.json").unlink(missing_ok=True)
    shop.write_policy(head="version = 1")
    refused(shop, "the trust policy is version 1, signed as at least 2")
    without("check_trust")
    with shop.replica(name="r2"):
        pass


def test_the_bundle_of_another_application_is_refused(shop, without):
    other = MODULE.replace("Price", "Other")
    shop.write("others.py", other)
    shop.sign("others:app")
    shop.forget()
    message = r"it has no deployment 'Price' \(it has Other\): it is of another"
    refused(shop, message)


# --- code -------------------------------------------------------------------------


def test_a_changed_module_on_the_node_is_refused(shop, without, anywhere):
    shop.write("shopping.py", MODULE.replace("self.weight *", "666 *"))
    refused(shop, "the code differs from what was signed: shopping.py is sha256:")
    without("check_tree")
    anywhere()
    shop.forget()
    with shop.replica(name="r2") as replica:
        assert shop.call(replica) == 1332.0


def test_a_module_added_on_the_node_is_refused(shop, without):
    shop.write("numpy.py", "raise SystemExit")
    refused(shop, "the code differs .*numpy.py is sha256:.*, signed as absent")


def test_a_module_changed_between_check_and_import_is_refused(
    shop, monkeypatch, anywhere
):
    admit = config.check_code

    def admit_and_swap(*given):
        admit(*given)
        shop.write("shopping.py", MODULE.replace("self.weight *", "666 *"))

    monkeypatch.setattr(config.deployment, "check_code", admit_and_swap)
    refused(shop, r"shopping.py is sha256:.*was changed since")
    shop.write("shopping.py", MODULE)
    monkeypatch.setattr(artifacts, "guard", lambda _tree: None)
    anywhere()
    shop.forget()
    with shop.replica(name="r2") as replica:  # without the guard it is imported
        assert shop.call(replica) == 1332.0


@pytest.mark.parametrize("guarded", [True, False])
def test_a_planted_pyc_does_not_stand_in_for_its_source(
    shop, monkeypatch, anywhere, guarded
):
    path = shop.folder / "shopping.py"
    found = path.stat()
    evil = shop.folder.parent / "evil.py"
    evil.write_text(
        MODULE.replace("self.weight * self.factor", "666 * self.factor        ")
    )
    assert evil.stat().st_size == found.st_size
    os.utime(evil, ns=(found.st_atime_ns, found.st_mtime_ns))
    cached = importlib.util.cache_from_source(str(path))
    Path(cached).parent.mkdir(exist_ok=True)
    py_compile.compile(str(evil), cached, dfile=str(path))
    planned = shop.plan()  # imported here from the pyc, as anywhere else
    if not guarded:
        monkeypatch.setattr(artifacts, "guard", lambda _tree: None)
        anywhere()
    with shop.replica(planned=planned) as replica:
        assert shop.call(replica) == (2.0 if guarded else 1332.0)


def test_another_class_of_the_same_name_is_refused(shop, without):
    shop.write("evil.py", MODULE.replace("self.weight *", "666 *"))
    shop.sign()
    planned = shop.plan("evil:app")
    assert planned[0].name == "Price"
    message = "deployment Price: class 'evil:Price', signed as 'shopping:Price'"
    refused(shop, message, planned=planned)
    without("check_target", "part")
    with shop.replica(planned=planned, name="r2") as replica:
        assert shop.call(replica) == 1332.0


def test_the_identity_of_another_service_is_refused(shop, without):
    message = "deployment Price: service 'payments', signed as 'price'"
    refused(shop, message, service="payments")
    without("check_target")
    with shop.replica(service="payments", name="r2") as replica:
        assert str(replica.source.current().svid.id).endswith("/sa/payments")


def test_other_arguments_are_refused(shop, without):
    plan, args, _ = shop.plan()
    planned = plan, args, {"factor": 9.0}
    message = r"""arguments '\[\[\],{"factor":9.0}\]', signed as .*2.0"""
    refused(shop, message, planned=planned)
    without("part")
    with shop.replica(planned=planned, name="r2") as replica:
        assert shop.call(replica) == 9.0


def test_more_calls_at_once_than_signed_are_refused(shop):
    refused(shop, "options {'max_ongoing': 999", max_ongoing=999)


def test_a_class_that_came_by_value_is_refused(shop, monkeypatch):
    from ztserve.serving import replica as replicas

    planned = shop.plan()
    cls = importing.load_class("shopping:Price")
    cls.predict = lambda self, x: x * 666
    message = "the code of shopping:Price came by value, and only a name can be signed"
    refused(shop, message, planned=planned, cls=cls)
    monkeypatch.setattr(replicas, "admitted_class", lambda cls, *_: (cls, None))
    with shop.replica(planned=planned, cls=cls, name="r2") as replica:
        assert shop.call(replica) == 666.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("dependency.py", "'dependency.py' on sys.path is sha256:.*, signed as sha256"),
        ("torch.py", "'torch.py' on sys.path is sha256:.*signed as no part of it"),
        ("start.pth", "'start.pth' on sys.path is .*take away what was not"),
    ],
)
def test_a_package_changed_or_planted_is_refused(shop, without, change, message):
    (shop.packages / change).write_text("import os")
    refused(shop, message)
    without("check_runtime")
    shop.forget()
    with shop.replica(name="r2") as replica:
        assert shop.call(replica) == 2.0


def test_another_python_is_refused(shop, monkeypatch):
    monkeypatch.setattr("platform.python_version", lambda: "3.11.0")
    refused(shop, "Python is 3.11.0, signed as")


# --- models -----------------------------------------------------------------------


def test_an_alias_that_moved_is_refused(shop, without):
    shop.workshop.published("newer", version="2", fill=9.0)
    publish.set_alias(
        shop.workshop.registry, name="digits", alias="production", version="2"
    )
    refused(
        shop, r"digits@production of deployment Price resolved to sha256:.*digits:1@"
    )
    without("check_model")
    shop.forget()
    with shop.replica(name="r2") as replica:
        assert shop.call(replica) == 18.0


def test_another_model_in_the_plan_is_refused(shop, without):
    shop.workshop.published("newer", version="2", fill=9.0)
    models = {"": ModelRef("digits:2")}
    refused(
        shop, "deployment Price asks for digits:2, signed as digits:1@", models=models
    )
    without("check_model")
    shop.forget()
    with shop.replica(name="r2", models=models) as replica:
        assert shop.call(replica) == 18.0


def test_models_swapped_between_parts_are_refused(shop, without):
    shop.workshop.published("other", name="other", fill=9.0)
    shop.write("pair.py", PAIR)
    shop.sign("pair:app")
    planned = shop.plan("pair:app")
    large, small = planned[0].models["large"], planned[0].models["small"]
    plan = replace(planned[0], models={"large": small, "small": large})
    swapped = (plan, *planned[1:])
    refused(
        shop, "asks for other:1 as its part 'large', signed as digits", planned=swapped
    )
    without("check_model")
    shop.forget()
    with shop.replica(planned=swapped, name="r2") as replica:
        assert shop.call(replica) == 9.0


# --- what is carried --------------------------------------------------------------


def bind(source, shop, name="carried"):
    shop.write(f"{name}.py", source)
    with pytest.raises(ConfigError) as refused:
        importing.load_class(f"{name}:app")
    sys.modules.pop(name, None)
    return str(refused.value)


def test_no_code_travels_by_value_in_production(shop):
    local = (
        MODULE.replace("class Price", "def made():\n  class Price")
        .replace("\n    ", "\n      ")
        .replace("app = Price", "  return Price\napp = made()")
    )
    assert "is defined within a function: in production no code" in bind(local, shop)
    main = MODULE.replace("app =", "Price.__module__ = '__main__'\napp =")
    assert "which replicas do not have: in production no code" in bind(main, shop)
    other = MODULE.replace("app =", "Found = Price\nclass Price: pass\napp =").replace(
        "Price.bind", "Found.bind"
    )
    assert "is not what carried:Price names" in bind(other, shop)
    by_value = MODULE.replace(
        "app =",
        "import sys\nfrom ray import cloudpickle\n"
        "cloudpickle.register_pickle_by_value(sys.modules[__name__])\napp =",
    )
    from ray import cloudpickle

    try:
        assert "is registered to be pickled by value" in bind(by_value, shop)
    finally:
        cloudpickle.unregister_pickle_by_value(types.ModuleType("carried"))


def test_arguments_and_environments_that_cannot_be_signed_are_refused(shop):
    odd = MODULE.replace("factor=2.0", "factor=object()")
    assert "the arguments of the constructor cannot be signed" in bind(odd, shop)
    env = MODULE.replace(
        "app = Price",
        'app = Price.options(ray_actor_options={"runtime_env": {"env_vars": {}}})',
    )
    assert "which brings code and variables that nobody signed" in bind(env, shop)


def test_what_ray_carries_names_the_class_and_holds_none_of_its_code(shop):
    import ray.cloudpickle

    from ztserve.serving import ray_private
    from ztserve.serving.shell import Shell

    app = importing.import_module("shopping").app
    carried = ray_private.deployment_of(app)
    assert carried.func_or_class is Shell
    raw = ray.cloudpickle.dumps((carried.func_or_class, carried.init_args))
    assert b"predict" not in raw
    assert b"shopping:Price" in raw
    cls = importing.load_class("shopping:Price")
    subclass = type("Price", (Shell,), {"answer": cls.predict})
    assert b"answer" in ray.cloudpickle.dumps(subclass)  # by value, as before


# --- doors and the gateway --------------------------------------------------------


def svid_files(shop, spiffe_id):
    svid = shop.authority.issue(spiffe_id)
    for name, raw in (("svid.pem", svid.chain_pem()), ("key.pem", svid.key_pem())):
        shop.write(name, raw.decode()).chmod(0o600)
    from ztserve.identity.svid import pem as roots

    shop.write("bundle.pem", roots(shop.authority.bundle).decode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("policies/callers.yaml", "the file policies/callers.yaml is"),
        ("shopping.py", "the code differs"),
        (".ztserve/deployment.sig", "not JSON"),
    ],
)
def test_directory_and_gateway_refuse_what_was_not_signed(
    shop, capsys, change, message
):
    from ztserve.serving.actors import DirectoryActor

    settings = config.load()
    shop.write(change, (shop.folder / change).read_text() + "\n# x")
    shop.forget()
    svid_files(shop, settings.directory_id)
    with pytest.raises(VerificationError, match=message):
        DirectoryActor(settings)
    svid_files(shop, settings.gateway_id)
    capsys.readouterr()
    assert main(["gateway"]) == 2
    assert message in capsys.readouterr().err


def test_the_registry_door_refuses_what_was_not_signed(shop, capsys):
    svid_files(shop, config.load().registry_id)
    shop.write("policies/callers.yaml", POLICY.format(caller="stranger"))
    assert main(["registry", "serve", "--from", str(shop.workshop.registry)]) == 2
    assert "the file policies/callers.yaml is sha256" in capsys.readouterr().err


def test_the_gateway_refuses_another_port_than_was_signed(shop, capsys):
    svid_files(shop, config.load().gateway_id)
    assert main(["gateway", "--port", "9443"]) == 2
    assert "[gateway] port is 9443, signed as 8443" in capsys.readouterr().err


# --- while it runs ----------------------------------------------------------------


def test_a_running_replica_does_not_outlive_its_bundles_revocation(shop, without):
    digest = judging.read_deployment(shop.bundle.read_bytes(), "x").digest
    tail = f'[revoked]\nmanifests = ["{digest}"]\n'
    with shop.replica() as replica:
        shop.write_policy(head="version = 2", tail=tail)
        until = time.monotonic() + 10
        while not replica._withdrawn and time.monotonic() < until:
            time.sleep(0.1)
        with pytest.raises(VerificationError, match="revokes the deployment bundle"):
            replica.check_health()
