"""How does a model get a signature, a name and a place in a registry?

The offline half of artifacts: training and deployment pipelines use it, with keys
that serving never sees. Nothing that serves imports it.
"""

from ztserve.artifacts.publish.attesting import (
    Predicate,
    attest_model,
    attestation_statement,
    parse_predicate,
    result_predicate,
    verification_summary,
)
from ztserve.artifacts.publish.deploying import deployment_statement, sign_deployment
from ztserve.artifacts.publish.distribution import push
from ztserve.artifacts.publish.entries import bundle_entry, key_entry, spiffe_entry
from ztserve.artifacts.publish.keys import (
    CURVES,
    NewKey,
    SigningKey,
    load_signer,
    new_key,
    read_passphrase,
)
from ztserve.artifacts.publish.policies import check_raised
from ztserve.artifacts.publish.registry import (
    Published,
    publish,
    publish_staged,
    set_alias,
)
from ztserve.artifacts.publish.releasing import stage_release
from ztserve.artifacts.publish.signing import (
    SHARD_BYTES,
    choose_serialization,
    model_statement,
    release_model,
    release_statement,
    sign_model,
    sign_policy,
)
from ztserve.artifacts.publish.stamping import (
    StatementSigner,
    SvidKey,
    TimestampedSigner,
    stamp_with,
)
from ztserve.artifacts.publish.timestamps import (
    LocalAuthority,
    NewAuthority,
    load_authority,
    new_authority,
)
from ztserve.artifacts.publish.token_uri import SCHEME as TOKEN_SCHEME
from ztserve.artifacts.publish.token_uri import TokenUri
from ztserve.artifacts.publish.tokens import TokenKey
from ztserve.artifacts.statements.attestation import (
    TEST_RESULT,
    VERIFICATION_SUMMARY,
    Metric,
)

__all__ = [
    "CURVES",
    "SHARD_BYTES",
    "TEST_RESULT",
    "TOKEN_SCHEME",
    "VERIFICATION_SUMMARY",
    "LocalAuthority",
    "Metric",
    "NewAuthority",
    "NewKey",
    "Predicate",
    "Published",
    "SigningKey",
    "StatementSigner",
    "SvidKey",
    "TimestampedSigner",
    "TokenKey",
    "TokenUri",
    "attest_model",
    "attestation_statement",
    "bundle_entry",
    "check_raised",
    "choose_serialization",
    "deployment_statement",
    "key_entry",
    "load_authority",
    "load_signer",
    "model_statement",
    "new_authority",
    "new_key",
    "parse_predicate",
    "publish",
    "publish_staged",
    "push",
    "read_passphrase",
    "release_model",
    "release_statement",
    "result_predicate",
    "set_alias",
    "sign_deployment",
    "sign_model",
    "sign_policy",
    "spiffe_entry",
    "stage_release",
    "stamp_with",
    "verification_summary",
]
