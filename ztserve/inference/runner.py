"""Run `predict` in all its forms: sync, async, generator, async generator, batched.

Synchronous model code runs one step at a time, on the thread of the call that leads:
the first call in the queue takes all that queued behind it (up to `Batch.max_size`
rows) through the model, hands the others their rows, and passes the lead on. A single
call so pays for no hand-over between threads, and batches form by themselves under
load (flat combining: Hendler et al., SPAA 2010). Asynchronous model code runs on the
replica's own event loop.
"""

import inspect
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

from ztserve.errors import (
    CallError,
    Denied,
    InferenceError,
    Interrupted,
    NotFound,
    Overloaded,
    Unauthenticated,
)
from ztserve.inference.batching import Combiner
from ztserve.inference.context import inference_mode, working_for
from ztserve.inference.convert import from_model, to_model
from ztserve.inference.loop import CLOSE_S, ModelLoop
from ztserve.inference.steps import Steps
from ztserve.inference.turns import Turns, still_wanted
from ztserve.types import Batch, Call, Inputs, Outputs, Spec, TensorSpec, TextSpec

if TYPE_CHECKING:
    import torch

Pieces: TypeAlias = Generator[Outputs, None, None]
_Turn: TypeAlias = Callable[[Call | None], AbstractContextManager[None]]
_END = object()


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
        if any(isinstance(spec, TensorSpec) for spec in inputs):
            # Now: the first calls come together, and would meet it half imported.
            import torch  # noqa: F401
        self._predict = predict
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._device = device
        self._most = max_ongoing + max_queued
        self._admitted = 0
        self._count = threading.Lock()
        self._turns = Turns()
        self._combiner = Combiner(self._step, batch or Batch(1), self._turns)
        self._overlaps = batch is None and inspect.iscoroutinefunction(predict)
        self._loop = ModelLoop(max_ongoing)

    @property
    def ongoing(self) -> int:
        """Calls that are running or queued: what autoscaling looks at."""
        return self._admitted

    @property
    def overlaps(self) -> bool:
        """Whether calls run side by side, so that several are no use to one thread."""
        return self._overlaps

    def run_all(
        self, calls: Sequence[tuple["Place", Call, Inputs]]
    ) -> Iterator[Callable[[], Outputs]]:
        """Take several admitted calls of one thread through the model, together.

        Yields, in their order, what returns each one's answer or raises as `Place.run`;
        each is to be called before the next is asked for.
        """
        for place, _, _ in calls:
            place.joins()
        return self._combiner.run_all([(call, inputs) for _, call, inputs in calls])

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

    def _run(self, call: Call, inputs: Inputs, *, expected: bool) -> Outputs:
        return self._combiner.run(call, inputs, expected=expected)

    def _run_overlapping(self, call: Call, inputs: Inputs) -> Outputs:
        with _blamed_on_the_model():
            still_wanted(call)
            arguments = to_model(inputs, self._inputs, self._device)
            return self._finish((call,), self._predict(**arguments))

    def _step(self, calls: tuple[Call, ...], inputs: Inputs) -> Outputs:
        """Take the inputs of one or more calls through `predict`; holds the model."""
        with _blamed_on_the_model(), working_for(calls), inference_mode():
            result = self._predict(**to_model(inputs, self._inputs, self._device))
            return self._finish(calls, result)

    def _finish(self, calls: tuple[Call, ...], result: object) -> Outputs:
        """Turn whatever `predict` returned into one answer."""
        if inspect.isawaitable(result):
            result = self._loop.wait(calls, result)
        if not _is_stream(result):
            return from_model(result, self._outputs)
        return _join(list(self._iterate(calls[0], result, _held)), self._outputs)

    def _stream(self, call: Call, inputs: Inputs) -> Pieces:
        with _blamed_on_the_model():
            still_wanted(call)
            arguments = to_model(inputs, self._inputs, self._device)
            with self._turn(call):
                result = self._predict(**arguments)
                later = inspect.isawaitable(result) or _is_stream(result)
                answer = None if later else from_model(result, self._outputs)
            if inspect.isawaitable(result):
                result = self._loop.wait((call,), result)
            if _is_stream(result):
                yield from self._iterate(call, result, self._turn)
            else:
                yield from_model(result, self._outputs) if answer is None else answer

    @contextmanager
    def _turn(self, call: Call | None) -> Iterator[None]:
        calls = () if call is None else (call,)
        with self._turns.turn(call), working_for(calls), inference_mode():
            yield

    def _iterate(self, call: Call, stream: Any, turn: _Turn) -> Pieces:
        """Yield a generator's pieces; between two of them other calls get their turn.

        It is closed where its reader leaves it, or its caller has gone.
        """
        try:
            if isinstance(stream, AsyncIterator):
                while (piece := self._awaited(call, stream)) is not _END:
                    yield from_model(piece, self._outputs)
                return
            steps = Steps(stream, lambda piece: from_model(piece, self._outputs))
            while not steps.over:
                still_wanted(call)
                with turn(call):
                    pieces = steps.take()
                yield from pieces
        except BaseException:
            self._close(stream, turn)
            raise

    def _awaited(self, call: Call, stream: AsyncIterator[Any]) -> object:
        still_wanted(call)
        return self._loop.wait((call,), anext(stream, _END))

    def _close(self, stream: Any, turn: _Turn) -> None:
        if hasattr(stream, "aclose"):
            self._loop.wait((), stream.aclose(), within_s=CLOSE_S)
        elif hasattr(stream, "close"):
            with turn(None):
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

    def joins(self) -> None:
        """Note that this call is about to queue, and is expected no more by then."""
        self._expected = False

    def run(self, call: Call, inputs: Inputs) -> Outputs:
        """Take one call's inputs through the model; a text stream is joined.

        Raises DeadlineExceeded, Cancelled, or InferenceError if the model's code
        fails; the other callers of the same batch are not hurt by that.
        """
        runner = self._runner
        if runner._overlaps:  # noqa: SLF001
            self.leave()
            return runner._run_overlapping(call, inputs)  # noqa: SLF001
        expected, self._expected = self._expected, False
        return runner._run(call, inputs, expected=expected)  # noqa: SLF001

    def stream(self, call: Call, inputs: Inputs) -> Pieces:
        """Take one call's inputs through the model; a unary answer is one piece.

        Close it where it is not read to its end.
        """
        self.leave()
        return self._runner._stream(call, inputs)  # noqa: SLF001


def _held(_: Call | None) -> AbstractContextManager[None]:
    """Take no turn: the step that is running has it."""
    return nullcontext()


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
    except (Denied, Unauthenticated, NotFound, Interrupted) as error:
        raise InferenceError(
            f"a call made by predict failed: {type(error).__name__}: {error}"
        ) from error
    except (CallError, InferenceError):
        raise
    except GeneratorExit:
        raise
    except BaseException as error:
        # SystemExit and others, such as a panic of a Rust extension, are no Exceptions:
        # they would end the thread of the call, and with it the batch.
        raise InferenceError(f"{type(error).__name__}: {error}") from error
