"""What the streams' bench asks: an answer that is not whole is no answer."""

import pytest

from bench import pieces
from bench.generators import LoadError
from ztserve.transport import codec
from ztserve.transport.v1 import inference_pb2 as pb
from ztserve.types import Reply, Tensor


def a_piece(text):
    reply = Reply((Tensor("text", "BYTES", (1,), (text.encode(),)),))
    return codec.piece(codec.reply(reply, "digits", "1", ""))


def test_there_are_100_pieces_of_20_bytes():
    assert [len(piece.encode()) for piece in pieces.PIECES] == [20] * 100


def test_a_whole_answer_is_taken_and_no_other():
    answer = [a_piece(text) for text in pieces.PIECES]
    pieces.judge_messages("arm", answer)
    pieces.judge("arm", pieces.TEXT.encode())
    with pytest.raises(LoadError, match="in 99 pieces, not 100"):
        pieces.judge_messages("arm", answer[1:])
    with pytest.raises(LoadError, match="not with the text"):
        pieces.judge_messages("arm", [*answer[1:], answer[0]])
    with pytest.raises(LoadError, match="with 3 bytes"):
        pieces.judge("arm", b"abc")


def test_a_refusal_within_the_stream_is_no_answer():
    refused = pb.ModelStreamInferResponse(error_message="no").SerializeToString()
    answer = [a_piece(text) for text in pieces.PIECES]
    with pytest.raises(LoadError):
        pieces.judge_messages("arm", [*answer[:99], refused])
