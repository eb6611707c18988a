"""``ztserve bundle``, in a project of profile production."""

import json

import pytest

from tests.unit.serving.shop import MODULE, Shop, shop
from ztserve.artifacts.deployment.judging import read_deployment
from ztserve.cli import main

pytestmark = pytest.mark.slow
__all__ = ["shop"]


@pytest.fixture
def say(capsys):
    def run(*words):
        capsys.readouterr()
        code = main(["bundle", *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_sign_and_verify_say_what_is_signed(shop, say):
    code, out, _ = say("verify", "shopping:app", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["application"] == "shopping:app"
    assert told["sequence"] == 1
    assert told["digest"] == read_deployment(shop.bundle.read_bytes(), "").digest
    rows = {(row["part"], row["what"]) for row in told["parts"]}
    assert ("file", "policies/callers.yaml") in rows
    assert ("deployment Price", "shopping:Price") in rows
    assert ("  model", "digits:1") in rows
    assert ("  arguments", '[[],{"factor":2.0}]') in rows
    code, out, _ = say("verify")
    assert "left out of code\t.git, .venv, .ztserve, __pycache__\n" in out
    assert "deployment Price\tshopping:Price\tsha256:" in out


def test_each_bundle_has_the_next_number(shop, say):
    def signed(*words):
        shop.forget()
        code, out, _ = say("sign", "shopping:app", "--key", shop.key, "--json", *words)
        assert code == 0
        return json.loads(out)["sequence"]

    assert signed() == 2
    assert signed("--sequence", "9") == 9
    assert signed() == 10
    shop.bundle.unlink()
    assert signed() == 1
    elsewhere = shop.folder.parent / "elsewhere.sig"
    assert signed("--out", elsewhere) == 1
    assert elsewhere.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sign",), "name the application: ztserve bundle sign module:app"),
        (("sign", "shopping"), "expected module:app"),
        (("sign", "shopping:Price"), "expected what `bind` of a ZTDeployment returns"),
        (("sign", "shopping:app", "--sequence", "0"), "--sequence 0: expected 1 or"),
        (("sign", "shopping:app"), "deployer.pem: cannot be read"),
        (("verify", "others:app"), "is that of shopping:app, and others:app is about"),
    ],
)
def test_wrong_use_gives_a_sentence(shop, say, words, message):
    code, _, err = say(*words)
    assert code == 2
    assert message in err


def test_verify_names_what_differs(shop, say):
    shop.write("shopping.py", MODULE + "\n# later\n")
    code, _, err = say("verify")
    assert code == 2
    assert "the code differs from what was signed: shopping.py is sha256:" in err
    shop.bundle.unlink()
    assert "there is no deployment bundle" in say("verify")[2]


def test_what_a_trainer_signs_is_not_written(shop, say, tmp_path):
    from tests.unit.serving.shop import private

    before = shop.bundle.read_bytes()
    shop.key.write_bytes(private(shop.workshop.keys["trainer"]))
    shop.forget()
    code, _, err = say("sign", "shopping:app", "--key", shop.key)
    assert code == 2
    assert "trusted as trainer, not as deployer" in err
    assert shop.bundle.read_bytes() == before


def test_a_model_that_does_not_verify_is_not_signed(shop, say):
    for blob in (shop.workshop.registry / "blobs/sha256").iterdir():
        blob.write_bytes(blob.read_bytes().replace(b"\0\0\x80?", b"\0\0\0\0"))
    shop.forget()
    code, _, err = say("sign", "shopping:app", "--key", shop.key)
    assert code == 2
    assert "'model.safetensors' was changed after signing" in err


def test_run_refuses_before_it_starts_ray(shop, capsys):
    shop.write("shopping.py", "raise SystemExit('imported')\n")
    assert main(["run", "shopping:app"]) == 2
    said = capsys.readouterr()
    assert "the code differs from what was signed: shopping.py" in said.err
    assert "starting Ray" not in said.out


def test_the_whole_of_sys_path_is_signed_and_verified(tmp_path, monkeypatch, say):
    """As in production: nothing of what is measured is left out here."""
    from ztserve import artifacts
    from ztserve.artifacts.deployment.measuring import measure_packages

    made = Shop(tmp_path, monkeypatch)
    monkeypatch.setattr(artifacts, "measure_packages", measure_packages)
    made.sign()
    made.forget()
    code, _, _ = say("verify", "shopping:app")
    assert code == 0
    names = read_deployment(made.bundle.read_bytes(), "").code.packages
    assert {"numpy", "torch", "ray"} <= set(names)
    (made.folder.parent / "planted").mkdir()
    (made.folder.parent / "planted/sitecustomize.py").write_text("")
    monkeypatch.syspath_prepend(str(made.folder.parent / "planted"))
    made.forget()
    code, _, err = say("verify")
    assert code == 2
    assert "'sitecustomize.py' on sys.path is sha256:" in err
    made.forget()
