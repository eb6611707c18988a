"""Replicas that ask for a JWT-SVID beside the certificate."""

import numpy as np
import pytest

from tests.ray.test_scaling import OPTIONS, calling
from ztserve import config, transport
from ztserve.errors import Unauthenticated
from ztserve.serving.cluster import deploy

PIXELS = {"pixels": np.zeros((1, 64), np.float32)}


@pytest.fixture
def guarded(models, digits, project):
    toml = project / config.FILE
    before = toml.read_text()
    toml.write_text(before.replace("[identity]", "[identity]\nrequire_jwt = true", 1))
    try:
        app = models.Patient.options(model="digits:1", **OPTIONS).bind()
        settings = config.load()
    finally:
        toml.write_text(before)
    deploy(app, name="guarded")
    yield settings
    from ray import serve

    serve.delete("guarded")


def test_a_call_without_a_token_is_refused_and_one_with_it_answered(guarded, developer):
    with (
        calling(guarded, developer, "patient") as bare,
        pytest.raises(Unauthenticated, match="could not be verified"),
    ):
        bare.infer(PIXELS)
    with (
        config.open_tokens(guarded, developer) as tokens,
        transport.Client(
            "ml-inference/patient",
            source=developer,
            directory=f"{guarded.directory.host}:{guarded.directory.port}",
            directory_id=guarded.directory_id,
            tokens=tokens,
        ) as client,
    ):
        answer = client.infer(PIXELS)
    assert answer["probabilities"].shape == (1, 10)
