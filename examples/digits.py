"""Which digit is drawn on 8x8 pixels?

python -m examples.digits publish
ztserve run examples.digits:app
"""

from functools import partial

from torch import Tensor, nn

from ztserve import Batch, ModelRef, TensorSpec, VerifiedModel, ZTDeployment


def network() -> nn.Sequential:
    """Return the untrained network: 64 pixels to 10 scores."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


class Digits(ZTDeployment):
    """Tell how probable each digit is."""

    model = ModelRef("digits@production")
    service = "inference-service"
    inputs = (TensorSpec("pixels", "FP32", (-1, 64), low=0, high=16),)
    outputs = (TensorSpec("probabilities", "FP32", (-1, 10), low=0, high=1),)
    batch = Batch(max_size=32, wait_ms=2)

    def load(self, model: VerifiedModel) -> None:
        self.network = network()
        self.network.load_state_dict(dict(model.tensors()))
        self.network.to(self.device).eval()

    def predict(self, pixels: Tensor) -> Tensor:
        scores: Tensor = self.network(pixels)
        return scores.softmax(dim=1)


app = Digits.bind()

if __name__ == "__main__":
    from examples.training.digits import train
    from examples.training.release import main

    main("digits", partial(train, network=network))
