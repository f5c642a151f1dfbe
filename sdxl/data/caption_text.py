"""What a caption says: the tokens it names, and how a written caption continues its prefix.

Knows texts; does not know files, pictures or models.
"""

import re
import unicodedata

from sdxl.errors import UserInputError


def tokens_in(text: str) -> list[str]:
    """The words of `text` that look like new tokens: two or more capital letters and underscores."""
    return list(dict.fromkeys(re.findall(r"(?<!\w)[A-Z_]*[A-Z][A-Z_]+(?!\w)", text)))


def count_token(text: str, token: str) -> int:
    """How often `text` names `token` as a separate word."""
    return len(re.findall(rf"(?<!\w){re.escape(token)}(?!\w)", text))


def check_caption_text(text: str) -> None:
    """Refuse captions and caption prefixes that contain placeholder tokens.

    Raises:
        UserInputError: `text` contains a placeholder token such as <s0>.
    """
    placeholder = re.search(r"<s[0-9]+>", text)
    if placeholder is not None:
        raise UserInputError(
            f'"{text}" holds {placeholder[0]}, a placeholder token that only training may insert: '
            "write a word such as TOK instead."
        )


def join_caption(prefix: str, written: str) -> str:
    """`prefix`, followed by what a model wrote after it.

    Models repeat the prefix in another case and spacing; the repetition is removed. Tokens and names in the prefix
    appear only once in the result.
    """
    prefix = prefix.strip()
    rest = written[_length_of_repetition(prefix, written) :]
    for word in (*tokens_in(prefix), *_proper_names(prefix)):
        rest = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", " ", rest, flags=re.IGNORECASE)
    rest = " ".join(rest.split()).strip(" ,.")
    if not rest:
        return prefix.strip(" ,")
    return f"{prefix} {rest}"


def _length_of_repetition(prefix: str, written: str) -> int:
    """How many characters at the beginning of `written` repeat `prefix`; 0 if it begins otherwise.

    Compares letters and digits only.
    """
    position = 0
    for letter in filter(str.isalnum, prefix):
        while position < len(written) and not written[position].isalnum():
            position += 1
        if position == len(written) or _plain(written[position]) != _plain(letter):
            return 0
        position += 1
    return position


def _plain(letter: str) -> str:
    """A letter without case and accent, because models drop both."""
    return unicodedata.normalize("NFKD", letter.lower())[0]


def _proper_names(text: str) -> list[str]:
    """The words of `text` that begin with a capital letter, except its first word."""
    return re.findall(r"(?<=\s)[A-Z]\w*", text)
