"""Connections of our own, TLS, HTTP/2 and gRPC: a server's loop and clients' links.

Short calls are answered by the thread that leads the server's loop, others elsewhere;
what they send goes to the loop, which writes to each connection once a turn. Nothing a
caller or the model does can hold it up for long.
"""
