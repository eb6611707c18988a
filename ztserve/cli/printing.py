"""What may reach a terminal."""


def printable(text: str) -> str:
    r"""Return `text` without control characters, but for tab and newline.

    What a model, a server or a log says could else drive the terminal: "\x1b" begins
    its commands.
    """
    return "".join(
        character if character.isprintable() or character in "\t\n" else "\ufffd"
        for character in text
    )
