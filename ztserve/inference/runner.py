"""Run `predict` in all its forms: sync, async, generator, async generator, batched.

Synchronous model code runs one step at a time, on the thread of the call that leads:
the first call in the queue takes all that queued behind it (up to `Batch.max_size`
rows) through the model, hands the others their rows, and passes the lead on. A single
call so pays for no hand-over between threads, and batches form by themselves under
load (flat combining: Hendler et al., SPAA 2010). Asynchronous model code runs on the
replica's own event loop.
"""

import inspect
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from ztserve.errors import (
    CallError,
    Denied,
    InferenceError,
    Interrupted,
    Overloaded,
    Unauthenticated,
)
from ztserve.inference.batching import Combiner, still_wanted
from ztserve.inference.context import working_for
from ztserve.inference.convert import from_model, to_model
from ztserve.inference.loop import ModelLoop
from ztserve.types import Batch, Call, Inputs, Outputs, Spec, TextSpec

if TYPE_CHECKING:
    import torch


class Runner:
    """One model's `predict`, with its bounded queue.

    Args:
        predict: takes the declared inputs by name.
        inputs: what `predict` takes, in order.
        outputs: what it gives.
        batch: how calls are joined; None: never.
        device: where the tensors go.
        max_ongoing: calls that may be in the model at once.
        max_queued: calls that may wait beyond those before Overloaded.

    """

    def __init__(
        self,
        predict: Callable[..., Any],
        *,
        inputs: Sequence[Spec],
        outputs: Sequence[Spec],
        batch: Batch | None = None,
        device: "torch.device | str" = "cpu",
        max_ongoing: int = 32,
        max_queued: int = 64,
    ) -> None:
        self._predict = predict
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._device = device
        self._most = max_ongoing + max_queued
        self._admitted = 0
        self._count = threading.Lock()
        self._combiner = Combiner(self._step, batch or Batch(1))
        self.overlaps = batch is None and inspect.iscoroutinefunction(predict)
        self._loop = ModelLoop(max_ongoing)

    @property
    def ongoing(self) -> int:
        """Calls that are running or queued: what autoscaling looks at."""
        return self._admitted

    @contextmanager
    def admit(self) -> Iterator["Place"]:
        """Hold a place in the bounded queue; raise Overloaded where there is none."""
        with self._count:
            if self._admitted >= self._most:
                raise Overloaded(
                    "the model is busy; try again later",
                    f"{self._admitted} calls are running or queued, the limit",
                )
            self._admitted += 1
        place = Place(self)
        self._combiner.expect(1)
        try:
            yield place
        finally:
            place.leave()
            with self._count:
                self._admitted -= 1

    def close(self) -> None:
        """Stop the event loop of asynchronous model code."""
        self._loop.close()

    def _not_expected(self) -> None:
        self._combiner.expect(-1)

    def _run(self, call: Call, inputs: Inputs) -> Outputs:
        return self._combiner.run(call, inputs)

    def _run_overlapping(self, call: Call, inputs: Inputs) -> Outputs:
        with _blamed_on_the_model():
            arguments = to_model(inputs, self._inputs, self._device)
            return self._finish((call,), self._predict(**arguments))

    def _step(self, calls: tuple[Call, ...], inputs: Inputs) -> Outputs:
        """Take the inputs of one or more calls through `predict`; holds the model."""
        with _blamed_on_the_model(), working_for(calls), _inference_mode():
            result = self._predict(**to_model(inputs, self._inputs, self._device))
            return self._finish(calls, result)

    def _finish(self, calls: tuple[Call, ...], result: object) -> Outputs:
        """Turn whatever `predict` returned into one answer."""
        if inspect.isawaitable(result):
            result = self._loop.wait(calls, result)
        if not _is_stream(result):
            return from_model(result, self._outputs)
        return _join(list(self._iterate(calls[0], result)), self._outputs)

    def _stream(self, call: Call, inputs: Inputs) -> Iterator[Outputs]:
        with _blamed_on_the_model():
            arguments = to_model(inputs, self._inputs, self._device)
            with self._turn(call):
                result = self._predict(**arguments)
            if inspect.isawaitable(result):
                result = self._loop.wait((call,), result)
            if _is_stream(result):
                yield from self._iterate(call, result, self._turn)
            else:
                yield from_model(result, self._outputs)

    @contextmanager
    def _turn(self, call: Call) -> Iterator[None]:
        with self._combiner.turn(call), working_for((call,)), _inference_mode():
            yield

    def _iterate(
        self,
        call: Call,
        stream: Any,
        turn: Callable[[Call], AbstractContextManager[None]] = nullcontext,
    ) -> Iterator[Outputs]:
        """Yield a generator's pieces; between two of them other calls get their turn."""
        asynchronous = isinstance(stream, AsyncIterator)
        try:
            while True:
                still_wanted(call)
                try:
                    if asynchronous:
                        piece = self._loop.wait((call,), stream.__anext__())
                    else:
                        with turn(call):
                            piece = next(stream)
                except (StopIteration, StopAsyncIteration):
                    return
                yield from_model(piece, self._outputs)
        finally:
            if asynchronous and hasattr(stream, "aclose"):
                self._loop.wait((), stream.aclose())
            elif hasattr(stream, "close"):
                stream.close()


class Place:
    """An admitted call's place in the queue: what it takes to reach the model."""

    __slots__ = ("_expected", "_runner")

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._expected = True

    def leave(self) -> None:
        """Stop others from waiting for this call to join their batch."""
        if self._expected:
            self._expected = False
            self._runner._not_expected()  # noqa: SLF001 - one pair, one module

    def run(self, call: Call, inputs: Inputs) -> Outputs:
        """Take one call's inputs through the model; a text stream is joined.

        Raises DeadlineExceeded, Cancelled, or InferenceError if the model's code
        fails; the other callers of the same batch are not hurt by that.
        """
        if self._runner.overlaps:
            self.leave()
            return self._runner._run_overlapping(call, inputs)  # noqa: SLF001
        self._expected = False
        return self._runner._run(call, inputs)  # noqa: SLF001

    def stream(self, call: Call, inputs: Inputs) -> Iterator[Outputs]:
        """Take one call's inputs through the model; a unary answer is one piece."""
        self.leave()
        return self._runner._stream(call, inputs)  # noqa: SLF001


def _is_stream(result: object) -> bool:
    return isinstance(result, Iterator | AsyncIterator)


def _join(pieces: list[Outputs], specs: Sequence[Spec]) -> Outputs:
    """Join a stream of texts into one answer."""
    for spec in specs:
        if not isinstance(spec, TextSpec):
            raise InferenceError(
                f"output {spec.name!r} is a tensor and predict streams it: only texts "
                "can be joined into one answer; call stream instead"
            )
    return Outputs(
        {
            spec.name: "".join(str(piece.values.get(spec.name, "")) for piece in pieces)
            for spec in specs
        }
    )


@contextmanager
def _blamed_on_the_model() -> Iterator[None]:
    """Tell failures of the model's code from those of the call.

    A refusal that an inner hop met is the model's failure, not this caller's: it must
    not read as if this caller had been denied.
    """
    try:
        yield
    except (Denied, Unauthenticated, Interrupted) as error:
        raise InferenceError(
            f"a call made by predict failed: {type(error).__name__}: {error}"
        ) from error
    except (CallError, InferenceError):
        raise
    except Exception as error:
        raise InferenceError(f"{type(error).__name__}: {error}") from error


def _inference_mode() -> AbstractContextManager[object]:
    """Run without autograd, where torch is loaded at all."""
    torch = sys.modules.get("torch")
    return nullcontext() if torch is None else torch.inference_mode()
