"""Two deployments, composed: one prepares camera pixels, the other knows digits.

The inner call is a call like any other: mutual TLS, judged by the policy of the called
deployment, validated, filtered and recorded there::

    python -m examples.digits publish
    ztserve run examples.pipeline:app        with examples/policies/pipeline.yaml
"""

from typing import Any

from torch import Tensor

from examples.digits import Digits
from ztserve import TensorSpec, ZTDeployment


class Preprocess(ZTDeployment):
    """Scale grey images of 8x8 bytes to what `Digits` takes."""

    model = None
    service = "preprocess"
    inputs = (TensorSpec("image", "UINT8", (-1, 8, 8)),)
    outputs = (TensorSpec("probabilities", "FP32", (-1, 10), low=0, high=1),)

    def __init__(self, digits: Any) -> None:
        self.digits = digits  # a client of `Digits`, which is called like `Digits`

    def predict(self, image: Tensor) -> Any:
        # Divided first, so that white (255) becomes 16 exactly and not a hair more.
        pixels = image.flatten(1).float() / 255 * 16
        return self.digits.predict(pixels=pixels.cpu().numpy())


app = Preprocess.bind(Digits.bind())
