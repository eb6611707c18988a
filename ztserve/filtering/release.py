"""One answer that leaves piece by piece."""

from collections import Counter
from collections.abc import Collection, Mapping
from types import MappingProxyType

from ztserve.errors import Withheld
from ztserve.filtering.contract import (
    BROKEN,
    Plan,
    TensorRelease,
    TextRelease,
    broken,
    size,
)
from ztserve.types import Outputs, Reply, Tensor, Value

NOTHING: Mapping[str, int] = MappingProxyType({})


class _Text:
    """One text output on its way: how much of it came, and its filter."""

    def __init__(self, rule: TextRelease) -> None:
        self.rule = rule
        self._used_chars = 0
        self.stream = rule.rules.stream()

    def feed(self, value: Value) -> str:
        text = self.rule.read(value, self._used_chars)
        self._used_chars += len(text)
        return self.stream.feed(text)


class ReleaseStream:
    """The pieces of one answer, checked; for one thread.

    A piece holds some of the declared outputs. Tensors leave as they come, each against
    its spec; the pieces of a text are one text, of which the filter holds back what it
    must. Whatever is refused ends the stream.
    """

    def __init__(
        self, plan: Plan, sent: Collection[str], *, max_bytes: int, max_pieces: int
    ) -> None:
        self._plan = plan
        self._sent = sent
        self._left_bytes = max_bytes
        self._left_pieces = max_pieces
        self._texts = {
            name: _Text(rule)
            for name, rule in plan.items()
            if isinstance(rule, TextRelease)
        }
        self._awaited = plan.keys() - self._texts.keys()
        self._told: Counter[str] = Counter()
        self._open = True

    def feed(self, outputs: Outputs) -> Reply | None:
        """Take what the model gave next; return what may leave by now, if anything.

        Raises Withheld where it is not as declared, or is too much in all.
        """
        self._enter()
        self._left_pieces -= 1
        if self._left_pieces < 0:
            raise Withheld(BROKEN, "stream: more pieces than max_pieces allows")
        leaving: list[Tensor] = []
        for name, value in outputs.values.items():
            rule = self._plan.get(name)
            if rule is None:
                raise broken(name[:64], "not declared")
            if isinstance(rule, TensorRelease):
                self._awaited.discard(name)
                self._leave(rule.release(value, self._left_bytes), leaving)
            elif text := self._texts[name].feed(value):
                self._leave(rule.tensor(text, self._left_bytes), leaving)
        self._open = True
        return self._reply(leaving)

    def close(self) -> Reply | None:
        """Return the rest, if any; nothing can be fed after it.

        Raises Withheld where a declared tensor never came, and as `feed` does.
        """
        self._enter()
        if self._awaited:
            raise broken(min(self._awaited), "missing: it never came")
        leaving: list[Tensor] = []
        for text in self._texts.values():
            if rest := text.stream.close():
                self._leave(text.rule.tensor(rest, self._left_bytes), leaving)
        return self._reply(leaving)

    def _enter(self) -> None:
        if not self._open:
            raise Withheld(BROKEN, "stream: fed after its end")
        self._open = False  # until all has been checked

    def _leave(self, tensor: Tensor, leaving: list[Tensor]) -> None:
        self._left_bytes -= size(tensor)
        if tensor.name in self._sent:
            leaving.append(tensor)

    def _reply(self, leaving: list[Tensor]) -> Reply | None:
        if not leaving:
            return None
        if not any(text.stream.has_found for text in self._texts.values()):
            return Reply(tuple(leaving), NOTHING)  # nearly always
        found: Counter[str] = Counter()
        for name, text in self._texts.items():
            if name in self._sent:
                found.update(text.stream.findings)
        fresh, self._told = found - self._told, found
        return Reply(tuple(leaving), fresh or NOTHING)
