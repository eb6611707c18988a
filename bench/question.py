"""What all arms of one run are asked, and what tells a right answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import grpc

PATIENCE_S = 10.0


@dataclass(frozen=True)
class Question:
    """A question as gRPC and as HTTP carry it; either judge raises LoadError."""

    rpc: str
    """The call's path."""
    message: bytes
    body: bytes
    judge: Callable[[str, bytes], None]
    """Takes the arm's name, and its answer over HTTP."""
    judge_messages: Callable[[str, Sequence[bytes]], None]

    def put(self, name: str, channel: grpc.Channel) -> int:
        """Ask over gRPC, and judge; return the bytes of the answer.

        Without the prefix of its first message, as `Arm.reply_bytes` has it.
        """
        # A unary answer is a stream of one message.
        ask = channel.unary_stream(self.rpc, bytes, bytes)
        answer = [bytes(one) for one in ask(self.message, timeout=PATIENCE_S)]
        self.judge_messages(name, answer)
        return sum(map(len, answer)) + 5 * (len(answer) - 1)
