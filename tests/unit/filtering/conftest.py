"""A filter, plain Presidio beside it, and texts that try both."""

import random
from pathlib import Path

import pytest

from ztserve.filtering import TextFilter
from ztserve.filtering.text import Span, merged

KINDS = ["EMAIL_ADDRESS", "CREDIT_CARD", "US_SSN", "US_ITIN", "IBAN_CODE"]
KINDS += ["PHONE_NUMBER", "IP_ADDRESS", "MAC_ADDRESS", "CRYPTO"]

HERE = Path(__file__).parent
PERSONAL = (HERE / "personal.txt").read_text("utf-8").splitlines()
PLAIN = (HERE / "plain.txt").read_text("utf-8").splitlines()
BETWEEN = [" "] * 14 + (
    ["\n", "\t", "  ", "", " " * 60, "\r\n", ", ", "; ", ": ", '"', "<", ">", "."]
    + ["\u3000", "\u00a0", "\u2003", "\u200b", "\u3002", "\uff0c"]
)


def texts(seed, count):
    """Return texts made of personal data, of what looks like it, and of neither."""
    chance = random.Random(seed)
    return [
        "".join(
            chance.choice(PLAIN if chance.random() < 0.7 else PERSONAL)
            + chance.choice(BETWEEN)
            for _ in range(chance.randint(2, 30))
        )
        for _ in range(count)
    ]


@pytest.fixture(scope="session")
def corpus():
    return texts


@pytest.fixture(scope="session")
def default_filter():
    return TextFilter.default()


@pytest.fixture(scope="session")
def plain_presidio(default_filter):
    """Presidio's own engine over whole texts, redacted as the filter does."""
    from presidio_analyzer import AnalyzerEngine
    from presidio_analyzer.nlp_engine import NlpEngineProvider
    from presidio_analyzer.predefined_recognizers import EmailRecognizer

    provider = NlpEngineProvider(
        nlp_configuration={
            "nlp_engine_name": "no_op",
            "models": [{"lang_code": "en", "model_name": "no_op"}],
        }
    )
    engine = AnalyzerEngine(
        nlp_engine=provider.create_engine(), supported_languages=["en"]
    )
    (email,) = (r for r in engine.get_recognizers() if isinstance(r, EmailRecognizer))
    offline = default_filter.recognizers[0].find
    # The one change: its suffix list comes from the package, not from the network.
    email.validate_result = lambda text: bool(offline(text))

    def redact(text):
        found = engine.analyze(text, "en", entities=KINDS, score_threshold=0.4)
        result, at = "", 0
        for span in merged(
            [Span(r.start, r.end, r.entity_type, r.score) for r in found]
        ):
            result += text[at : span.start] + f"<{span.kind}>"
            at = span.end
        return result + text[at:]

    return redact
