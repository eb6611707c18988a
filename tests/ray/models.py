"""Deployments to be tried: in a module that replicas can import."""

import os
import time
from pathlib import Path

import numpy as np

from examples.digits import Digits
from ztserve import ModelRef, TensorSpec, TextSpec, ZTDeployment

LONGEST_S = 60.0


class Gated(ZTDeployment):
    """Answers once there is the file that the call names."""

    inputs = (TextSpec("gate", max_chars=1024),)
    outputs = (TensorSpec("pid", "INT64", (-1,)),)

    def predict(self, gate: str):
        until = time.monotonic() + LONGEST_S
        while not Path(gate).exists() and time.monotonic() < until:
            time.sleep(0.02)
        return np.array([os.getpid()], dtype=np.int64)


class Busy(Gated):
    """The same, scaled by its load."""


class Unruly(Gated):
    """The same, under a policy that nobody understands."""


class Patient(Digits):
    """Digits under a name of its own, for a registry that is away."""

    service = "patient"


class Listener(ZTDeployment):
    """Takes a text and says how long it is."""

    inputs = (TextSpec("said", max_chars=65536),)
    outputs = (TensorSpec("length", "INT64", (-1,)),)

    def predict(self, said: str):
        return np.array([len(said)], dtype=np.int64)


class Heavy(ZTDeployment):
    """Has weights that are worth sharing; sets the first one and says what it was."""

    model = ModelRef("heavy:1")
    inputs = (TensorSpec("value", "FP32", (-1,)),)
    outputs = (
        TensorSpec("pid", "INT64", (-1,)),
        TensorSpec("before", "FP32", (-1,)),
    )

    def load(self, model):
        self.weights = dict(model.tensors())["w"]

    def predict(self, value):
        before = float(self.weights[0])
        self.weights[0] = float(value[0])
        return {
            "pid": np.array([os.getpid()], dtype=np.int64),
            "before": np.array([before], dtype=np.float32),
        }
