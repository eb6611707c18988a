import grpc
import pytest

from ztserve import errors
from ztserve.transport import http_status, status
from ztserve.transport.status import Code

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
    code = status.status(error).code
    told = status.sentence(error, "c1")
    back = status.translated(code, told, status.trailers(error, "c1"), "spiffe://td/s")
    assert type(back) is kind
    assert back.public == "what all may know"
    assert "c1" in back.reason
    assert "none" not in repr(back)


def test_the_codes_are_grpcs() -> None:
    assert {one.name: one.value for one in Code} == {
        one.name: one.value[0] for one in grpc.StatusCode
    }


def test_every_call_error_has_its_own_row() -> None:
    assert {*KINDS, errors.InferenceError} == set(status.TABLE)
    codes = [row.code for row in status.TABLE.values()]
    assert len(codes) == len(set(codes))


def test_the_models_failure_is_told_by_the_call_id_only() -> None:
    error = errors.InferenceError("weights of the secret model")
    assert status.sentence(error, "c1") == "the model failed on this request (call c1)"
    back = status.translated(Code.INTERNAL, "x", status.trailers(error, "c1"), "s")
    assert type(back) is errors.InferenceError


@pytest.mark.parametrize("error", [errors.AuditError("disk"), RuntimeError("secret")])
def test_whatever_else_fails_is_an_internal_error_without_its_words(error) -> None:
    assert status.status(error).code is Code.INTERNAL
    assert status.sentence(error, "c1") == "internal error (call c1)"
    assert http_status(error) == 500


def test_bare_codes_of_other_servers_become_typed_errors() -> None:
    for bare, kind in [
        (Code.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (Code.UNIMPLEMENTED, errors.NotFound),
        (Code.RESOURCE_EXHAUSTED, errors.Overloaded),
        (Code.UNKNOWN, errors.InferenceError),
        # It may have run: only our own servers say by name that it did not.
        (Code.CANCELLED, errors.Interrupted),
        (Code.UNAVAILABLE, errors.Interrupted),
    ]:
        error = status.translated(bare, "words", (), "s")
        assert type(error) is kind
        assert bare.name in str(error)
    assert "code 99" in str(status.translated(99, "", (), "s"))


def test_http_statuses_of_the_edge() -> None:
    kinds = (errors.Unauthenticated, errors.Denied, errors.Overloaded)
    assert [http_status(kind("x")) for kind in kinds] == [401, 403, 429]
