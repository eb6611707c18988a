"""The three examples, served over mutual TLS, without Ray."""

from pathlib import Path

import numpy as np
import pytest

from examples.chat import Chat
from examples.digits import Digits
from examples.pipeline import Preprocess
from examples.training.digits import accuracy, held_back
from ztserve.errors import Denied, InferenceError, InvalidInput
from ztserve.serving.composition import Composed
from ztserve.testing import serve
from ztserve.transport import Client

pytestmark = pytest.mark.slow

POLICIES = Path(__file__).parents[2] / "examples/policies"
SEED, DEVELOPER, PIPELINE = (
    POLICIES / f"{name}.yaml" for name in ("seed", "developer", "pipeline")
)
DOMAIN = "spiffe://dev.ztserve.internal"
GATEWAY = f"{DOMAIN}/ns/ml-api/sa/api-gateway"
PREPROCESS = f"{DOMAIN}/ns/ml-inference/sa/preprocess"
KNOWN = "who do i write to about my order?"


def client_of(served, who, model):
    return Client(
        served.address,
        source=served.authority.source(who),
        server_id=served.server_id,
        model=model,
    )


def test_the_served_accuracy_is_the_trained_accuracy(trained_digits):
    pixels, labels = held_back()
    with (
        serve(Digits, model=trained_digits.directory, policies=(SEED,)) as served,
        client_of(served, GATEWAY, "digits") as gateway,
    ):
        one_by_one = [
            gateway.infer({"pixels": pixels[at : at + 1]})["probabilities"]
            for at in range(len(pixels))
        ]
    scores = np.concatenate(one_by_one)
    assert accuracy(scores, labels) == trained_digits.facts["accuracy"]
    assert np.allclose(scores.sum(axis=1), 1, atol=1e-5)


def test_a_pixel_out_of_range_is_refused_by_name(trained_digits):
    with (
        serve(Digits, model=trained_digits.directory) as served,
        pytest.raises(InvalidInput, match="'pixels': element 0 is out of range"),
    ):
        served.client.infer({"pixels": np.full((1, 64), 17, np.float32)})


def test_what_the_chat_knows_by_heart_does_not_leave(trained_chat):
    with serve(Chat, model=trained_chat.directory) as served:
        answer = served.client.infer({"prompt": KNOWN})["text"]
        record = served.records()[-1]
    assert answer == (
        "Write to <EMAIL_ADDRESS>, and name the card <CREDIT_CARD> that we have on "
        "file."
    )
    assert record["unmapped"]["findings"] == {"EMAIL_ADDRESS": 1, "CREDIT_CARD": 1}


def test_a_streamed_answer_is_the_whole_answer_in_pieces(trained_chat):
    with serve(Chat, model=trained_chat.directory) as served:
        whole = served.client.infer({"prompt": KNOWN})["text"]
        pieces = [piece["text"] for piece in served.client.stream({"prompt": KNOWN})]
    assert "".join(pieces) == whole
    assert len(pieces) > 4


@pytest.mark.parametrize("prompt", ["HELLO", "", "\n\n", "日本語", "x" * 96])
def test_the_chat_answers_whatever_it_is_asked(trained_chat, prompt):
    with serve(Chat, model=trained_chat.directory) as served:
        answer = served.client.infer({"prompt": prompt})["text"]
    assert len(answer) <= Chat.outputs[0].max_chars


def test_the_gateway_may_chat_and_a_stranger_may_not(trained_chat):
    with serve(
        Chat, model=trained_chat.directory, policies=(SEED, DEVELOPER)
    ) as served:
        with client_of(served, GATEWAY, "chat") as gateway:
            assert gateway.infer({"prompt": "hello"})["text"].startswith("Hello!")
        with client_of(served, PREPROCESS, "chat") as stranger, pytest.raises(Denied):
            stranger.infer({"prompt": "hello"})


def composed(inner) -> Composed:
    return Composed(
        client_of(inner, PREPROCESS, "digits"), Digits.inputs, Digits.outputs
    )


def camera(pixels):
    """Grey images as a camera gives them: bytes, black to white."""
    return (pixels.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)


def test_the_pipeline_answers_as_its_inner_deployment_does(trained_digits):
    pixels, labels = held_back()
    with (
        serve(
            Digits, model=trained_digits.directory, policies=(SEED, PIPELINE)
        ) as inner,
        serve(Preprocess, args=(composed(inner),), policies=(SEED, PIPELINE)) as outer,
    ):
        answer = outer.client.infer({"image": camera(pixels)})["probabilities"]
        judged = inner.records()[-1]
    assert accuracy(answer, labels) == pytest.approx(
        trained_digits.facts["accuracy"], abs=0.01
    )
    assert judged["actor"]["user"]["uid"] == PREPROCESS


def test_white_is_not_above_what_digits_takes(trained_digits):
    with (
        serve(Digits, model=trained_digits.directory, policies=(PIPELINE,)) as inner,
        serve(Preprocess, args=(composed(inner),), policies=(PIPELINE,)) as outer,
    ):
        white = np.full((1, 8, 8), 255, np.uint8)
        assert outer.client.infer({"image": white})["probabilities"].shape == (1, 10)


def test_the_inner_edge_is_denied_without_its_policy(trained_digits):
    with (
        serve(Digits, model=trained_digits.directory, policies=(SEED,)) as inner,
        serve(Preprocess, args=(composed(inner),), policies=(SEED, PIPELINE)) as outer,
    ):
        with pytest.raises(InferenceError):
            outer.client.infer({"image": np.zeros((1, 8, 8), np.uint8)})
        refused, blamed = inner.records()[-1], outer.records()[-1]
    assert refused["status_code"] == "Denied"
    assert refused["actor"]["user"]["uid"] == PREPROCESS
    assert "Denied" in blamed["status_detail"]


def test_the_outer_edge_is_denied_without_its_policy(trained_digits):
    with (
        serve(Digits, model=trained_digits.directory, policies=(PIPELINE,)) as inner,
        serve(Preprocess, args=(composed(inner),), policies=(SEED,)) as outer,
        pytest.raises(Denied),
    ):
        outer.client.infer({"image": np.zeros((1, 8, 8), np.uint8)})
