"""The agent of a node: who may have which SPIFFE ID, and the sockets to ask it."""
