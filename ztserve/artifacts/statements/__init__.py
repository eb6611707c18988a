"""What is signed: envelopes, manifests, releases, read strictly."""
