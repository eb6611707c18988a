import grpc
import pytest

from ztserve import errors
from ztserve.transport import http_status, status

KINDS = [
    errors.Unauthenticated,
    errors.Denied,
    errors.InvalidInput,
    errors.NotFound,
    errors.Overloaded,
    errors.DeadlineExceeded,
    errors.Cancelled,
    errors.Unavailable,
    errors.Interrupted,
    errors.Withheld,
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_typed_error_comes_back_as_itself_with_the_public_sentence(kind) -> None:
    error = kind("what all may know", "what none may know")
    code, told = status.status(error).code, status.sentence(error, "c1")
    back = status.translated(code, told, status.trailers(error, "c1"), "spiffe://td/s")
    assert type(back) is kind
    assert back.public == "what all may know"
    assert "c1" in back.reason
    assert "none" not in repr(back)


def test_every_call_error_has_its_own_row() -> None:
    assert {*KINDS, errors.InferenceError} == set(status.TABLE)
    codes = [row.code for row in status.TABLE.values()]
    assert len(codes) == len(set(codes))


def test_the_models_failure_is_told_by_the_call_id_only() -> None:
    error = errors.InferenceError("weights of the secret model")
    assert status.sentence(error, "c1") == "the model failed on this request (call c1)"
    back = status.translated(
        grpc.StatusCode.INTERNAL, "x", status.trailers(error, "c1"), "s"
    )
    assert type(back) is errors.InferenceError


@pytest.mark.parametrize("error", [errors.AuditError("disk"), RuntimeError("secret")])
def test_whatever_else_fails_is_an_internal_error_without_its_words(error) -> None:
    assert status.status(error).code is grpc.StatusCode.INTERNAL
    assert status.sentence(error, "c1") == "internal error (call c1)"
    assert http_status(error) == 500


def test_a_broken_connection_is_safe_to_retry_only_if_nothing_was_sent() -> None:
    unavailable = grpc.StatusCode.UNAVAILABLE
    sent = status.translated(unavailable, "Socket closed", (), "s")
    assert type(sent) is errors.Interrupted
    never = "failed to connect to all addresses; last error: ... Connection refused"
    assert type(status.translated(unavailable, never, (), "s")) is errors.Unavailable


@pytest.mark.parametrize(
    ("symptom", "cause"),
    [
        ("Hostname Verification Check failed", "not for the expected SPIFFE ID spiffe"),
        ("CERTIFICATE_VERIFY_FAILED", "not signed by the trust bundle of spiffe"),
        ("WRONG_VERSION_NUMBER", "does not speak TLS"),
        ("Connection refused", "nothing listens there"),
        ("Socket closed", "does not trust this client's SVID"),
        ("something new", "no connection to spiffe"),
    ],
)
def test_a_failed_connection_names_its_likely_cause(symptom: str, cause: str) -> None:
    details = f"failed to connect to all addresses; last error: UNKNOWN: {symptom}"
    error = status.translated(grpc.StatusCode.UNAVAILABLE, details, (), "spiffe://td/s")
    assert cause in error.public
    assert details in error.reason


def test_bare_codes_of_the_core_become_typed_errors() -> None:
    code = grpc.StatusCode
    for bare, kind in [
        (code.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (code.UNIMPLEMENTED, errors.NotFound),
        (code.RESOURCE_EXHAUSTED, errors.Overloaded),
        (code.UNKNOWN, errors.InferenceError),
        (code.CANCELLED, errors.Interrupted),
    ]:
        assert type(status.translated(bare, "words", (), "s")) is kind
    larger = "SERVER: Received message larger than max (9 vs. 8)"
    error = status.translated(code.RESOURCE_EXHAUSTED, larger, (), "s")
    assert type(error) is errors.InvalidInput


def test_http_statuses_of_the_edge() -> None:
    kinds = (errors.Unauthenticated, errors.Denied, errors.Overloaded)
    assert [http_status(kind("x")) for kind in kinds] == [401, 403, 429]
