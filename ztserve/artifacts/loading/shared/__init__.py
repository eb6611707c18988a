"""One copy of the weights a node: a broker hashes and seals it, replicas map it.

`memory` is what is shared, `statement` what the broker says of it under its own SVID,
`wire` how both pass a unix socket, `broker` and `borrowing` the two ends.
"""
