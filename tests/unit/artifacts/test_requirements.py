import pytest

from ztserve.artifacts import verify_model
from ztserve.artifacts.publish import (
    attest_model,
    release_model,
    sign_model,
    verification_summary,
)
from ztserve.artifacts.statements.attestation import TEST_RESULT, VERIFICATION_SUMMARY
from ztserve.errors import ConfigError, VerificationError
from ztserve.types import now

NEEDS = f'[[require]]\npredicate = "{TEST_RESULT}"\nroles = ["evaluator"]\n'
SUMMARY = f'[[require]]\npredicate = "{VERIFICATION_SUMMARY}"\nroles = ["deployer"]\n'


def refused(root, trust, message, ref="digits", **more):
    with pytest.raises(VerificationError, match=message):
        verify_model(root, ref, trust, **more)


def test_a_required_evaluation_counts_and_is_told_with_its_rule(workshop):
    root = workshop.signed()
    trust = workshop.write_policy(tail=NEEDS + "minimum = { accuracy = 0.9 }\n")
    refused(
        root,
        trust,
        r"stage attest \(trust policy 1, \[\[require\]\] number 1\): .*none by any "
        r"evaluator; there is no other. Mend: `ztserve attest` with a key that the "
        "policy names as evaluator, then publish again",
    )
    workshop.evaluate(root, accuracy=0.9)
    model = verify_model(root, "digits", trust)
    assert [str(s.role) for s in model.signers] == ["trainer", "deployer", "evaluator"]
    told = [(c.stage, c.by and c.by.name) for c in model.checks]
    assert told == [
        ("sign", "trainer"),
        ("deploy", "deployer"),
        ("attest", "evaluator"),
    ]
    told = model.checks[-1]
    assert told.rule == "[[require]] number 1: 1 as evaluator, accuracy >= 0.9"
    assert told.checked == f"{TEST_RESULT} PASSED accuracy 0.9"


def test_a_requirement_may_be_for_some_models_only(workshop):
    root = workshop.signed()
    trust = workshop.write_policy(tail=NEEDS + 'models = ["fraud"]\n')
    assert verify_model(root, "digits", trust)
    trust = workshop.write_policy(tail=NEEDS + 'models = ["fraud", "digits"]\n')
    refused(root, trust, r"\[\[require\]\] number 1\): .* is not met")


def test_a_metric_that_was_not_measured_is_not_good_enough(workshop):
    root = workshop.signed()
    workshop.evaluate(root, recall=0.9, accuracy=0.2)
    trust = workshop.write_policy(tail=NEEDS + "minimum = { f1 = 0.9 }\n")
    refused(root, trust, r"no metric 'f1'; it has accuracy, recall")


def test_a_maximum_is_inclusive(workshop):
    root = workshop.signed()
    trust = workshop.write_policy(tail=NEEDS + "maximum = { toxicity = 0.01 }\n")
    workshop.evaluate(root, toxicity=0.011)
    refused(root, trust, r"toxicity is 0.011, above the maximum 0.01")
    workshop.evaluate(root, toxicity=0.01)
    assert verify_model(root, "digits", trust)


def test_other_predicates_need_only_be_signed_for_this_model(workshop):
    root = workshop.signed()
    uri = "https://slsa.dev/provenance/v1"
    trust = workshop.write_policy(
        tail=f'[[require]]\npredicate = "{uri}"\nroles = ["trainer"]\n'
    )
    workshop.evaluate(root)  # another predicate
    refused(root, trust, r"provenance/v1 is not met: none by any trainer")
    attest_model(
        root,
        workshop.keys["trainer"],
        name="provenance",
        predicate_type=uri,
        predicate={"buildDefinition": {}},
    )
    assert verify_model(root, "digits", trust)


def test_k_of_n_counts_different_signers(workshop):
    root = workshop.signed()
    roles = {role: [role] for role in ("trainer", "evaluator", "deployer")}
    roles["stranger"] = ["evaluator"]
    trust = workshop.write_policy(roles, tail=NEEDS + "signers = 2\n")
    workshop.evaluate(root)
    workshop.evaluate(root, name="again")  # the same signer twice
    refused(root, trust, r"not met: 1 of 2 different signers")
    workshop.evaluate(root, key=workshop.stranger, name="other")
    model = verify_model(root, "digits", trust)
    assert {s.name for s in model.signers if s.role == "evaluator"} == {
        "evaluator",
        "stranger",
    }


def test_two_roles_need_two_signers(workshop):
    root = workshop.signed()
    roles = {role: [role] for role in ("trainer", "deployer")}
    roles["evaluator"] = ["evaluator", "trainer"]
    both = NEEDS.replace('["evaluator"]', '["trainer", "evaluator"]')
    trust = workshop.write_policy(roles, tail=both)
    workshop.evaluate(root)
    refused(root, trust, r"need a signer each, and evaluator cannot fill them alone")
    workshop.evaluate(root, key=workshop.keys["trainer"], name="other")
    assert verify_model(root, "digits", trust)


def test_what_does_not_count_is_told_and_harms_nobody(workshop):
    root = workshop.signed()
    trust = workshop.write_policy(tail=NEEDS)
    workshop.evaluate(root, key=workshop.stranger, name="stray")
    (root / "attestations/broken.sig").write_bytes(b"{}")
    refused(root, trust, r"attestations/broken.sig: .*attestations/stray.sig: signed")
    workshop.evaluate(root)
    assert verify_model(root, "digits", trust)


def test_a_verification_summary_is_required_at_load_not_before(workshop):
    root = workshop.model()
    sign_model(root, workshop.keys["trainer"])
    trust = workshop.write_policy(tail=SUMMARY)
    looked_at = verify_model(root, "digits:1", trust, purpose="deploy")
    release_model(root, workshop.keys["deployer"], name="digits", version="1")
    refused(root, trust, "not met: none by any deployer")

    def summarise(version):
        attest_model(
            root,
            workshop.keys["deployer"],
            name="summary",
            predicate_type=VERIFICATION_SUMMARY,
            predicate=verification_summary(
                looked_at, trust, version=version, now=now()
            ),
        )

    summarise("2")
    refused(root, trust, r"summarises 'urn:ztserve:model:digits:2', not '.*digits:1'")
    summarise("1")
    assert verify_model(root, "digits", trust)


# --- versions and formats -------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "minimum", "message"),
    [
        ("2", "3", r"digits:2 is older than the trust policy's min_versions.digits"),
        ("1.9", "1.10", "is older"),
        ("3", "3", None),
        ("3.0", "3", None),
        ("10", "9.9.9", None),
        ("latest", "1", r"'latest' cannot be compared .* numbers with dots"),
        ("1.0rc1", "1", "cannot be compared"),
    ],
)
def test_versions_are_compared_as_numbers(workshop, version, minimum, message):
    root = workshop.signed(version=version)
    trust = workshop.write_policy(tail=f'[min_versions]\ndigits = "{minimum}"\n')
    if message:
        refused(
            root, trust, r"stage load \(trust policy 1, min_versions\): .*" + message
        )
    else:
        assert verify_model(root, "digits", trust).version == version
    assert verify_model(workshop.signed("fraud", "fraud", "0"), "fraud", trust)


def test_a_version_too_old_is_refused_before_it_is_released(workshop):
    root = workshop.signed()
    trust = workshop.write_policy(tail='[min_versions]\ndigits = "3"\n')
    refused(root, trust, "digits:2 is older", ref="digits:2", purpose="deploy")


def test_only_allowed_formats_are_loaded(workshop):
    root = workshop.signed(files={"LICENSE": b"free"})
    only = 'version = 1\nformats = ["safetensors", "json"]'
    refused(root, workshop.write_policy(head=only), r"'LICENSE' is of format 'unknown'")
    root = workshop.signed("other", files={"a.txt": b""})
    refused(root, workshop.write_policy(head=only), r"'a.txt' is of format 'txt', and")
    more = only.replace('"json"', '"json", "txt"')
    assert verify_model(root, "digits", workshop.write_policy(head=more))


def test_a_revoked_model_is_refused_with_the_reason(workshop):
    root = workshop.signed()
    digest = verify_model(root, "digits", workshop.trust).digest
    entry = f'{{ digest = "{digest}", reason = "poisoned data" }}'
    trust = workshop.write_policy(tail=f"[revoked]\nmanifests = [{entry}]\n")
    refused(
        root,
        trust,
        rf"stage load \(trust policy 1, \[revoked\]\): .* revokes the model {digest}: "
        "poisoned data; deploy another version",
    )


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ("[[require]]\n", "predicate must be the URI"),
        ('[[require]]\npredicate = "test-result"\n', "predicate must be the URI"),
        ('[[require]]\npredicate = "a:b"\n', "roles is .*expected at least one"),
        (NEEDS + "signers = 0\n", r"signers must be from 1 \(one a role\) to 32"),
        (NEEDS + "signers = 33\n", "signers must be from 1"),
        (NEEDS + "models = []\n", "models must list names; leave it out"),
        (NEEDS + 'minimum = { a = "1" }\n', "minimum.a must be a finite number"),
        (NEEDS + f"minimum = {{ a = 1{'0' * 400} }}\n", "must be a finite number"),
        (NEEDS + 'models = ["Digits"]\n', "models: 'Digits' is no name of a model"),
        (NEEDS + 'models = ["digits:1"]\n', "'digits:1' is no name of a model"),
        ('[min_versions]\n"digits " = "3"\n', "'digits ' is no name of a model"),
        (NEEDS + "maximum = { a = nan }\n", "maximum.a must be a finite number"),
        (NEEDS + "max = 1\n", "unknown key 'max'"),
        (SUMMARY + "minimum = { a = 1 }\n", "only .*test-result/v0.1 has metrics"),
        (NEEDS * 33, r"more than 32 \[\[require\]\] tables"),
        ("[min_versions]\na = 3\n", "min_versions.a is 3; expected text"),
        ('[min_versions]\na = "v3"\n', "min_versions.a is 'v3'; expected text"),
        ("[revoked]\nkeys = [1]\n", "keys holds 1; expected sha256"),
        ("[revoked]\nkeys = [{ reason = 'x' }]\n", "keys holds None; expected sha256"),
        ("[revoked]\nkeys = [{ why = 'x' }]\n", "unknown key 'why'"),
        (
            f"[revoked]\nkeys = [{{ digest = 'sha256:{'0' * 64}', reason = 1 }}]\n",
            "the reason must be text",
        ),
    ],
)
def test_a_policy_that_says_it_wrongly_is_refused(workshop, tail, message):
    with pytest.raises(ConfigError, match=rf"trust.toml: .*{message}"):
        workshop.write_policy(tail=tail)


def test_what_nobody_could_ever_sign_is_not_required(workshop):
    roles = {"trainer": ["trainer"], "deployer": ["deployer"]}
    with pytest.raises(
        ConfigError, match=r"wants the role evaluator, and no \[\[signers\]\]"
    ):
        workshop.write_policy(roles, tail=NEEDS)


@pytest.mark.parametrize("formats", ["[]", '[".json"]', "[1]", '"json"'])
def test_formats_are_suffixes_without_their_dot(workshop, formats):
    with pytest.raises(ConfigError, match="formats"):
        workshop.write_policy(head=f"version = 1\nformats = {formats}")
