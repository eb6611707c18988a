#!/bin/sh
# Register the workloads of examples.digits for the user who runs this.
#
# `-dns` is the name that the client compares in the handshake: it is derived from the
# SPIFFE ID, and no other entry may have it (docs/decisions/012).
set -eu
domain=ml.example
for path in ns/ml-inference/sa/inference-service ns/ztserve/sa/directory \
            ns/ml-api/sa/api-gateway ns/dev/sa/cli; do
    id="spiffe://$domain/$path"
    name=$(python3 -c 'import sys; from ztserve.identity import dns_name; print(dns_name(sys.argv[1]))' "$id")
    spire-server entry create -socketPath ./run/server.sock \
        -parentID "spiffe://$domain/node" -spiffeID "$id" \
        -selector "unix:uid:$(id -u)" -dns "$name" -hint "${path##*/}"
done
