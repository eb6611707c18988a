"""A model's outputs against what it declared."""

from collections import Counter
from collections.abc import Collection, Sequence

from ztserve.errors import ConfigError, InvalidInput
from ztserve.filtering.contract import TensorRelease, TextRelease, broken, size
from ztserve.filtering.release import NOTHING, ReleaseStream
from ztserve.filtering.text import TextFilter
from ztserve.types import Outputs, Reply, Spec, TensorSpec


class OutputFilter:
    """The maker of Replies: whole ones here, pieces of one in `ReleaseStream`.

    Immutable, so that threads share it. A caller learns no more than that an answer
    was withheld; the audit learns which output and why.
    """

    def __init__(
        self,
        outputs: Sequence[Spec],
        *,
        text: TextFilter | None,
        max_bytes: int,
        max_pieces: int = 65_536,
    ) -> None:
        """Prepare the checks of one deployment.

        `max_bytes` bounds the contents of one answer in all, `max_pieces` how often its
        stream may be fed. Raises ConfigError for a text output without `text`.
        """
        names = [spec.name for spec in outputs]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"outputs {names}: expected at least one, each name once")
        if max_bytes < 1 or max_pieces < 1:
            raise ConfigError("max_bytes and max_pieces must be positive")
        self._plan = {spec.name: _rule(spec, text) for spec in outputs}
        self._max_bytes = max_bytes
        self._max_pieces = max_pieces

    def select(self, wanted: Collection[str]) -> Collection[str]:
        """Return the names of the outputs that leave: the `wanted`, or all if none are.

        Raises InvalidInput where one is not declared or comes twice.
        """
        if not wanted:
            return self._plan.keys()
        if not self._plan.keys() >= set(wanted) or len(set(wanted)) != len(wanted):
            expected = ", ".join(map(repr, self._plan))
            raise InvalidInput(f"outputs: expected some of {expected}, each name once")
        return wanted

    def release(self, outputs: Outputs, wanted: Collection[str] = ()) -> Reply:
        """Return what may leave of `outputs`: all are checked, the `wanted` leave.

        Raises Withheld where an output is missing, undeclared or not what its spec
        says, or a text cannot be checked; InvalidInput as `select` does.
        """
        sent = self.select(wanted)
        values = outputs.values
        if values.keys() != self._plan.keys():
            odd = min(values.keys() ^ self._plan.keys(), key=str)
            what = "missing" if odd in self._plan else "not declared"
            raise broken(odd[:64], what)
        left, leaving, findings = self._max_bytes, [], NOTHING
        for name, rule in self._plan.items():
            if isinstance(rule, TensorRelease):
                tensor = rule.release(values[name], left)
            else:
                filtered = rule.rules.apply(rule.read(values[name]))
                tensor = rule.tensor(filtered.text, left)
                if name in sent:
                    findings = Counter(findings) + Counter(filtered.findings)
            left -= size(tensor)
            if name in sent:
                leaving.append(tensor)
        return Reply(tuple(leaving), findings)

    def stream(self, wanted: Collection[str] = ()) -> ReleaseStream:
        """Return the stream of one answer that the model gives piece by piece.

        Raises InvalidInput as `select` does.
        """
        return ReleaseStream(
            self._plan,
            self.select(wanted),
            max_bytes=self._max_bytes,
            max_pieces=self._max_pieces,
        )


def _rule(spec: Spec, text: TextFilter | None) -> TensorRelease | TextRelease:
    if isinstance(spec, TensorSpec):
        return TensorRelease(spec)
    if text is None:
        raise ConfigError(f"output {spec.name!r} is a text and needs a text filter")
    return TextRelease(spec, text)
