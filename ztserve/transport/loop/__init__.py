"""The server on a loop of its own: TLS, HTTP/2 and gRPC of ours on one thread.

Calls are answered on other threads; what they send goes back to the loop, which writes
to each connection once a turn. Nothing a caller or the model does can block it.
"""

from ztserve.transport.loop.server import Server

__all__ = ["Server"]
