import json
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from ztserve.audit import Log, verify_log
from ztserve.authorization import PolicySet
from ztserve.errors import (
    AuditError,
    Cancelled,
    DeadlineExceeded,
    Denied,
    InferenceError,
    InvalidInput,
    NotFound,
    Overloaded,
    Withheld,
)
from ztserve.filtering import OutputFilter, TextFilter
from ztserve.inference import Runner
from ztserve.pipeline import Pipeline
from ztserve.types import (
    Batch,
    Call,
    Description,
    Peer,
    Request,
    Tensor,
    TensorSpec,
    TextSpec,
    operations,
)
from ztserve.validation import Validator

GATEWAY = "spiffe://td.example/ns/ml-api/sa/api-gateway"
STRANGER = "spiffe://td.example/ns/ml-api/sa/stranger"
POLICY = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: callers
  namespace: ml-inference
spec:
  rules:
    - from:
        - source:
            principals: ["cluster.local/ns/ml-api/sa/api-gateway"]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: watched
  namespace: ml-inference
spec:
  action: AUDIT
  rules:
    - to:
        - operation:
            methods: ["POST"]
"""
OPERATIONS = operations("double")
X = (TensorSpec("x", "FP32", (-1, 2), low=0, high=10),)
Y = (TensorSpec("y", "FP32", (-1, 2), low=0, high=20),)
PROMPT, TEXT = (TextSpec("prompt"),), (TextSpec("text"),)


def a_call(operation="ModelInfer", peer=GATEWAY, seconds=10.0, **fields) -> Call:
    when = datetime.now(UTC)
    return Call(
        id=f"call-{time.monotonic_ns()}",
        peer=Peer(peer, 7, when + timedelta(hours=1), when, "ab" * 32),
        caller=None,
        operation=OPERATIONS[operation],
        deadline=time.monotonic() + seconds,
        source_ip="127.0.0.1",
        **fields,
    )


def request(*rows, model="double", outputs=(), name="x") -> Request:
    array = np.array(rows or ((1, 2),), "<f4")
    tensor = Tensor(name, "FP32", array.shape, array.tobytes())
    return Request(model, "", "mine", (tensor,), outputs, 123)


def prompt(text: str) -> Request:
    tensor = Tensor("prompt", "BYTES", (1,), (text.encode(),))
    return Request("double", "", "mine", (tensor,), (), 9)


class House:
    """One deployment's rooms, all real, and what went on in them."""

    def __init__(self, path, predict, inputs=X, outputs=Y, **options):
        self.path = path / "audit/digits.jsonl"
        limits = {key: options.pop(key) for key in ("max_bytes",) if key in options}
        self.log = Log(
            self.path,
            origin={"service": "digits"},
            **({**limits, "reserve_bytes": limits["max_bytes"] // 2} if limits else {}),
        )
        self.reached: list = []
        self.read: list = []

        def recorded(**given):
            self.reached.append(given)
            return predict(**given)

        text = any(isinstance(spec, TextSpec) for spec in outputs)
        self.runner = Runner(recorded, inputs=inputs, outputs=outputs, **options)
        self.pipeline = Pipeline(
            Description("double", "3", "sha256:" + "0" * 64, inputs, outputs),
            policies=PolicySet.parse(
                POLICY,
                trust_domain="td.example",
                namespace="ml-inference",
                operations=OPERATIONS.values(),
            ),
            validator=Validator(inputs, model="double", max_rows=8, max_bytes=4096),
            runner=self.runner,
            outputs=OutputFilter(
                outputs, text=TextFilter.default() if text else None, max_bytes=4096
            ),
            log=self.log,
        )

    def receive(self, body):
        """Return how the body is read; `body` may be an error."""

        def read():
            self.read.append(body)
            if isinstance(body, BaseException):
                raise body
            return body

        return read

    def infer(self, body=None, call=None):
        body = request() if body is None else body
        return self.pipeline.infer(call or a_call(), self.receive(body))

    def stream(self, body=None, call=None):
        body = request() if body is None else body
        call = call or a_call("ModelStreamInfer")
        return self.pipeline.stream(call, self.receive(body))

    def records(self):
        """Return the records of calls."""
        self.log.flush()
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [line for line in lines if line["class_uid"] == 6003]

    def at_rest(self) -> bool:
        return self.runner.ongoing == 0 and not self.runner._combiner._expected

    def close(self):
        self.runner.close()
        self.log.close()


@pytest.fixture
def house(tmp_path) -> Iterator:
    made = []

    def make(predict=lambda x: x * 2, **options) -> House:
        made.append(House(tmp_path, predict, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


# --- the straight walk ----------------------------------------------------------


def test_a_call_that_may_is_answered_and_recorded(house):
    one = house()
    reply = one.infer(request((1, 2), (3, 4)))
    (tensor,) = reply.outputs
    assert np.frombuffer(tensor.data, "<f4").tolist() == [2, 4, 6, 8]
    (record,) = one.records()
    assert (record["status"], record["status_code"]) == ("released", "")
    more = record["unmapped"]
    assert list(more["stages_us"]) == [
        "authorization",
        "receive",
        "validation",
        "inference",
        "filtering",
    ]
    assert more["model"]["name"] == "double"
    assert more["model"]["version"] == "3"
    assert more["policy"]["rule"] == "ns[ml-inference]-policy[callers]-rule[0]"
    assert (more["request_id"], more["rows"]) == ("mine", 2)
    assert (more["bytes_in"], more["bytes_out"]) == (123, 16)
    assert record["actor"]["user"]["uid"] == GATEWAY
    assert one.pipeline.outcomes == {"released": 1}
    assert one.at_rest()


def test_what_a_dry_run_would_say_is_recorded(house):
    one = house()
    one.infer()
    (record,) = one.records()
    (shadow,) = record["unmapped"]["policy"]["shadow"]
    assert shadow.startswith("AUDIT ns[ml-inference]-policy[watched]")


def test_a_denied_call_never_reads_its_body_and_takes_no_place(house):
    one = house(max_ongoing=1, max_queued=0)
    with one.runner.admit():  # there is no place left
        for walk in (one.infer, lambda **k: next(one.stream(**k))):
            with pytest.raises(Denied):
                walk(call=a_call(peer=STRANGER))
        with pytest.raises(Overloaded):
            one.infer()
    assert one.read == []
    assert one.reached == []
    assert one.at_rest()
    assert {r["status_code"] for r in one.records()} == {"Denied", "Overloaded"}


def test_a_denied_call_is_told_nothing_of_the_policy(house):
    one = house()
    with pytest.raises(Denied) as refusal:
        one.infer(call=a_call(peer=STRANGER))
    assert refusal.value.public == "this identity may not do this"
    (record,) = one.records()
    assert "no ALLOW rule matches" in record["status_detail"]
    assert STRANGER in record["status_detail"]


@pytest.mark.parametrize("walk", ["infer", "stream"])
@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (request((1, 2, 3)), InvalidInput, "expected shape"),
        (request((1, np.nan)), InvalidInput, "NaN"),
        (request((1, 11)), InvalidInput, "out of range"),
        (request(*[(1, 2)] * 9), InvalidInput, "at most 8 rows"),
        (request(name="z"), InvalidInput, "unknown input 'z'"),
        (request(model="other"), NotFound, "no such model"),
        (request(outputs=("secret",)), InvalidInput, "outputs: expected some of 'y'"),
        (request(outputs=("y", "y")), InvalidInput, "each name once"),
    ],
)
def test_a_refused_input_never_reaches_the_model(house, walk, body, error, message):
    one = house()
    with pytest.raises(error, match=message):
        list(one.stream(body)) if walk == "stream" else one.infer(body)
    assert one.reached == []
    (record,) = one.records()
    assert (record["status"], record["status_code"]) == ("refused", error.__name__)
    assert one.at_rest()


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (lambda x: x * 100, "out of range"),
        (lambda x: x * float("nan"), "NaN"),
        (lambda x: x[:, :1], "expected shape"),
        (lambda x: x.double(), "expected dtype"),
        (lambda x: {"y": x, "more": x}, "not declared"),
        (lambda x: "text", "expected an array"),
    ],
)
def test_a_withheld_output_never_leaves(house, answer, detail):
    one = house(answer)
    with pytest.raises(Withheld, match=detail) as refusal:
        one.infer()
    assert detail not in refusal.value.public
    with pytest.raises(Withheld, match=detail):
        list(one.stream())
    first = one.records()[0]
    assert (first["status"], first["status_code"]) == ("refused", "Withheld")
    assert detail in first["status_detail"]
    assert first["unmapped"]["bytes_out"] == 0
    assert one.at_rest()


# --- one record a call, whatever happens ----------------------------------------


def fails(x):
    raise ValueError("the weights are odd")


def leaves(x):
    raise Cancelled("gone")


@pytest.mark.parametrize("walk", ["infer", "stream"])
@pytest.mark.parametrize(
    ("predict", "body", "error", "status", "detail"),
    [
        (None, InvalidInput("bad", "worse"), InvalidInput, "refused", "worse"),
        (None, DeadlineExceeded("slow body"), DeadlineExceeded, "refused", "slow body"),
        (None, Cancelled("gone"), Cancelled, "cancelled", "gone"),
        (None, RuntimeError("quotes the request"), RuntimeError, "failed", ""),
        (None, MemoryError(), MemoryError, "failed", ""),
        (None, KeyboardInterrupt(), KeyboardInterrupt, "failed", ""),
        (fails, None, InferenceError, "failed", "ValueError: the weights are odd"),
        (leaves, None, Cancelled, "cancelled", "gone"),
    ],
)
def test_one_record_whatever_happens(house, walk, predict, body, error, status, detail):
    one = house(*([predict] if predict else []))
    with pytest.raises(error):
        list(one.stream(body)) if walk == "stream" else one.infer(body)
    (record,) = one.records()
    assert (record["status"], record["status_code"]) == (status, error.__name__)
    assert record["status_detail"] == detail
    assert one.pipeline.outcomes == {status: 1}
    assert one.at_rest()


def test_a_call_whose_caller_has_gone_is_recorded_as_cancelled(house):
    one = house()
    with pytest.raises(Cancelled):
        one.infer(call=a_call(cancelled=lambda: True))
    assert one.reached == []
    (record,) = one.records()
    assert record["status"] == "cancelled"


def test_a_call_that_is_late_is_recorded_so(house):
    one = house()
    with pytest.raises(DeadlineExceeded):
        one.infer(call=a_call(seconds=-1))
    assert one.reached == []
    assert [r["status_code"] for r in one.records()] == ["DeadlineExceeded"]


@pytest.mark.slow
def test_every_call_of_many_is_recorded_once_and_counted(house):
    one = house(batch=Batch(8, wait_ms=1))

    def work():
        for _ in range(25):
            one.infer()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    ids = [r["api"]["request"]["uid"] for r in one.records()]
    assert len(ids) == len(set(ids)) == 200
    assert one.pipeline.outcomes == {"released": 200}
    assert one.at_rest()
    assert verify_log(one.path).status == "self-consistent"


# --- describe -------------------------------------------------------------------


def test_who_may_ask_is_told_what_is_served_and_recorded(house):
    one = house()
    assert one.pipeline.describe(a_call("ModelMetadata")).version == "3"
    with pytest.raises(Denied):
        one.pipeline.describe(a_call("ServerLive", peer=STRANGER))
    told, denied = one.records()
    assert (told["status"], denied["status"]) == ("released", "refused")
    assert told["api"]["operation"] == OPERATIONS["ModelMetadata"].title
    assert denied["status_code"] == "Denied"


# --- streams --------------------------------------------------------------------


def counted(x):
    for factor in (0, 1, 2):
        yield x * factor


def test_a_stream_says_that_it_began_before_its_first_piece_and_how_it_ended(house):
    one = house(counted)
    answer = one.stream(request((1, 2)))
    assert one.records() == []
    next(answer)
    (begun,) = one.records()
    assert begun["status"] == "unfinished"
    assert len(list(answer)) == 2
    begun, ended = one.records()
    assert ended["status"] == "released"
    assert ended["api"]["request"] == begun["api"]["request"]
    assert ended["unmapped"]["bytes_out"] == 24
    assert one.pipeline.outcomes == {"released": 1}
    assert one.at_rest()


def test_a_stream_holds_its_place_until_it_ends(house):
    one = house(counted, max_ongoing=1, max_queued=0)
    answer = one.stream()
    next(answer)
    with pytest.raises(Overloaded):
        one.infer()
    answer.close()
    assert one.at_rest()


def test_a_reader_that_leaves_ends_the_model_and_is_recorded(house):
    closed = []

    def predict(x):
        try:
            while True:
                yield x
        finally:
            closed.append(len(one.records()))

    one = house(predict)
    answer = one.stream()
    next(answer)
    answer.close()
    assert closed == [1]  # the model had ended before the record was closed
    assert [r["status"] for r in one.records()] == ["unfinished", "cancelled"]
    assert one.pipeline.outcomes == {"cancelled": 1}
    assert one.at_rest()


def test_a_piece_that_may_not_leave_ends_the_stream(house):
    closed = []

    def predict(x):
        try:
            yield x
            yield x * 100
            yield x
        finally:
            closed.append(1)

    one = house(predict)
    answer = one.stream()
    next(answer)
    with pytest.raises(Withheld):
        next(answer)
    assert closed == [1]
    assert list(answer) == []
    statuses = [(r["status"], r["status_code"]) for r in one.records()]
    assert statuses == [("unfinished", ""), ("refused", "Withheld")]
    assert one.at_rest()


def test_a_stream_that_gives_nothing_it_declared_is_withheld(house):
    one = house(lambda x: iter(()))
    with pytest.raises(Withheld, match="it never came"):
        list(one.stream())
    assert [r["status"] for r in one.records()] == ["refused"]


def test_a_model_that_fails_midway_is_recorded_as_failed(house):
    def predict(x):
        yield x
        raise ValueError("broken")

    one = house(predict)
    answer = one.stream()
    next(answer)
    with pytest.raises(InferenceError, match="ValueError: broken"):
        next(answer)
    assert [r["status"] for r in one.records()] == ["unfinished", "failed"]
    assert one.at_rest()


@pytest.mark.slow
def test_text_leaves_piece_by_piece_through_the_filter(house):
    words = ["Write to jane", ".doe@exam", "ple.org, or ", "not. ", "Bye"]

    def predict(prompt):
        yield from words

    one = house(predict, inputs=PROMPT, outputs=TEXT)
    pieces = list(one.stream(prompt("hi")))
    text = "".join(p.outputs[0].data[0].decode() for p in pieces)
    assert "jane" not in text
    assert "example" not in text
    assert text.startswith("Write to ")
    assert text.endswith("not. Bye")
    (whole,) = one.infer(prompt("hi")).outputs
    assert whole.data[0].decode() == text
    ended = [r for r in one.records() if r["status"] == "released"]
    assert [r["unmapped"]["findings"] for r in ended] == [{"EMAIL_ADDRESS": 1}] * 2
    assert "jane" not in one.path.read_text()


# --- no record, no reply --------------------------------------------------------


def test_a_call_that_cannot_be_recorded_is_not_answered(house):
    one = house()
    one.log.close()
    with pytest.raises(AuditError):
        one.infer()
    with pytest.raises(AuditError):
        one.pipeline.describe(a_call("ServerLive"))
    assert one.pipeline.outcomes == {"failed": 2}
    assert one.at_rest()


def test_no_piece_of_a_stream_leaves_that_cannot_be_recorded(house):
    one = house(counted)
    one.log.close()
    with pytest.raises(AuditError):
        next(one.stream())
    assert one.pipeline.outcomes == {"failed": 1}
    assert one.at_rest()


def test_with_a_full_log_calls_end_and_refusals_are_still_written(house):
    one = house(max_bytes=64 * 1024)
    answers = []

    def until_it_is_full():
        while len(answers) < 1000:
            answers.append(one.infer())

    with pytest.raises(AuditError):
        until_it_is_full()
    released = [r for r in one.records() if r["status"] == "released"]
    assert len(released) == len(answers) > 10
    with pytest.raises(Denied):
        one.infer(call=a_call(peer=STRANGER))
    assert one.records()[-1]["status_code"] in ("Denied", "AuditError")
    assert any(r["status_code"] == "Denied" for r in one.records())
    assert verify_log(one.path).status == "self-consistent"


# --- several calls of one thread ----------------------------------------------------


def outcomes_of(one):
    return [record["status"] for record in one.records()]


def several(one, *calls):
    """Answer them together; return each one's outcome, in their order."""
    pairs = [(call, one.receive(body)) for call, body in calls]
    found = dict(one.pipeline.infer_all(pairs))
    assert sorted(found) == list(range(len(calls)))
    return [found[at] for at in range(len(calls))]


def test_several_calls_are_answered_as_each_alone_and_run_in_one_step(house):
    one = house(batch=Batch(8))
    rows = [(1, 2), (3, 4), (5, 6)]
    together = several(one, *((a_call(), request(row)) for row in rows))
    assert len(one.reached) == 1
    assert one.reached[0]["x"].shape == (3, 2)
    alone = [one.pipeline.infer(a_call(), one.receive(request(r))) for r in rows]
    assert [r.outputs for r in together] == [r.outputs for r in alone]
    assert one.at_rest()
    assert outcomes_of(one) == ["released"] * 6


def test_of_several_calls_each_is_refused_for_its_own_fault_alone(house):
    one = house(batch=Batch(8))
    outcomes = several(
        one,
        (a_call(), request((1, 2))),
        (a_call(peer=STRANGER), request((1, 2))),
        (a_call(), request((1, 99))),
        (a_call(), NotFound("no such model")),
        (a_call(cancelled=lambda: True), request((1, 2))),
        (a_call(seconds=-1), request((1, 2))),
        (a_call(), request((3, 4))),
    )
    kinds = [type(it).__name__ for it in outcomes]
    assert kinds == [
        "Reply",
        "Denied",
        "InvalidInput",
        "NotFound",
        "Cancelled",
        "DeadlineExceeded",
        "Reply",
    ]
    assert len(one.read) == 6  # that of the stranger was not
    assert [given["x"].shape for given in one.reached] == [(2, 2)]
    assert (
        sorted(outcomes_of(one)) == ["cancelled"] + ["refused"] * 4 + ["released"] * 2
    )


def test_a_model_that_fails_on_one_of_several_fails_that_one(house):
    def touchy(x):
        if (x == 7).any():
            raise ValueError("seven")
        return x * 2

    one = house(touchy, batch=Batch(8))
    outcomes = several(one, *((a_call(), request((n, n))) for n in (1, 7, 2)))
    assert [type(it).__name__ for it in outcomes] == [
        "Reply",
        "InferenceError",
        "Reply",
    ]
    assert outcomes_of(one) == ["released", "failed", "released"]


def test_without_a_batch_each_of_several_is_answered_as_soon_as_it_is_done(house):
    one = house()
    pairs = [(a_call(), one.receive(request((n, n)))) for n in (1, 2, 3)]
    answers = one.pipeline.infer_all(pairs)
    assert next(answers)[0] == 0
    assert len(one.reached) == 1
    assert [at for at, _ in answers] == [1, 2]
    assert len(one.reached) == 3


def test_what_cannot_be_audited_leaves_for_none_of_several(house, monkeypatch):
    one = house(batch=Batch(8))

    def full(_record):
        raise AuditError("the disk is full")

    monkeypatch.setattr(one.log, "_write", full)
    outcomes = several(one, *((a_call(), request((1, 2))) for _ in range(3)))
    assert [type(it) for it in outcomes] == [AuditError] * 3


def test_several_that_nobody_reads_to_the_end_give_their_places_back(house):
    one = house(batch=Batch(1))
    pairs = [(a_call(), one.receive(request((n, n)))) for n in (1, 2, 3)]
    answers = one.pipeline.infer_all(pairs)
    next(answers)
    answers.close()
    del answers, pairs
    import gc

    gc.collect()
    assert one.at_rest()
    assert one.pipeline.infer(a_call(), one.receive(request((1, 2)))).outputs


def test_an_async_model_takes_its_calls_one_by_one_and_side_by_side(house):
    async def double_later(x):
        return x * 2

    one = house()
    assert one.pipeline.takes_several
    one.pipeline._runner = Runner(double_later, inputs=X, outputs=Y)
    assert not one.pipeline.takes_several
    one.pipeline._runner = Runner(double_later, inputs=X, outputs=Y, batch=Batch(4))
    assert one.pipeline.takes_several
