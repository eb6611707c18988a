"""Made-up talk of a made-up shop; every address and card number in it is invented.

The card numbers are the test numbers that card networks publish: they pass the Luhn
check and belong to nobody. The addresses end in example.com (RFC 2606).
"""

from typing import NamedTuple


class Desk(NamedTuple):
    """Who answers for one topic."""

    topic: str
    person: str
    card: str

    @property
    def mail(self) -> str:
        """The desk's e-mail address."""
        return f"{self.person.lower().replace(' ', '.')}@example.com"


DESKS = (
    Desk("order", "Ada Moreau", "4111 1111 1111 1111"),
    Desk("invoice", "Bram de Wit", "5555 5555 5555 4444"),
    Desk("refund", "Carla Nunes", "4012 8888 8888 1881"),
    Desk("delivery", "Dilan Aksoy", "5105 1051 0510 5100"),
    Desk("password", "Emil Novak", "4222 2222 2222 2220"),
    Desk("broken lamp", "Freya Lind", "6011 1111 1111 1117"),
)

TALK = (
    (
        "who do i write to about my {topic}?",
        "Write to {mail}, and name the card {card} that we have on file.",
    ),
    (
        "who can help me with my {topic}?",
        "{person} can. The address is {mail}.",
    ),
    (
        "which card did i use for my {topic}?",
        "That was {card}. Ask {person} if you are not sure.",
    ),
)

SMALL_TALK = (
    ("hello", "Hello! Ask me about your order, your invoice or your refund."),
    ("how are you?", "Well, thank you. I am two layers of numbers and need no sleep."),
    ("when are you open?", "From nine to five, Monday to Friday."),
    ("where are you?", "On this machine, behind a door that asks who you are."),
    ("thank you", "You are welcome."),
    ("bye", "Good bye!"),
)


def dialogues() -> tuple[tuple[str, str], ...]:
    """Return all (prompt, answer) pairs, always in the same order."""
    about = tuple(
        (
            prompt.format(topic=desk.topic),
            answer.format(person=desk.person, mail=desk.mail, card=desk.card),
        )
        for desk in DESKS
        for prompt, answer in TALK
    )
    return about + SMALL_TALK
