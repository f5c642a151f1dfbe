"""What a caption says: the tokens it names, and how a written caption continues its prefix.

Knows texts; does not know files, pictures or models.
"""

import re
import unicodedata

from dataset_and_utils import TokenMap
from sdxl.errors import DatasetError, UserInputError

LONGEST_TEXT = 20_000
"""Characters of a prompt or caption. Text encoders read some 400 of them, and a million take a minute to split."""


def require_short(text: str, what: str) -> None:
    """Refuse a text of more than `LONGEST_TEXT` characters.

    what: its name in messages.

    Raises:
        UserInputError: it is longer.
    """
    if len(text) > LONGEST_TEXT:
        raise UserInputError(
            f"{what} has {len(text):,} characters, but may have at most {LONGEST_TEXT:,}: shorten it."
        )


def tokens_in(text: str) -> list[str]:
    """The words of `text` that look like new tokens: two or more capital letters and underscores."""
    return list(dict.fromkeys(re.findall(r"(?<!\w)[A-Z_]*[A-Z][A-Z_]+(?!\w)", text)))


def count_token(text: str, token: str) -> int:
    """How often `text` names `token` as a separate word."""
    return len(re.findall(rf"(?<!\w){re.escape(token)}(?!\w)", text))


def one_line(text: str) -> str:
    """`text` with single spaces, and without characters that nobody sees: controls, marks of no width, halves of pairs.

    The two joiners stay, because emoji and some scripts need them.
    """
    text = text.replace("\u200b", " ")  # the space of no width
    return " ".join("".join(character for character in text if _is_seen(character)).split())


def _is_seen(character: str) -> bool:
    joins = character in "\u200c\u200d" or character >= "\U000e0000"  # the latter are in emoji of flags
    return character.isspace() or joins or unicodedata.category(character) not in ("Cc", "Cf", "Cs")


def check_caption_text(text: str, what: str = "") -> None:
    """Refuse captions and caption prefixes that contain placeholder tokens.

    what: where the text comes from, such as "The caption of 1.jpg".

    Raises:
        UserInputError: `text` contains a placeholder token such as <s0>, or is longer than `LONGEST_TEXT`.
    """
    require_short(text, what or "A caption")
    placeholder = re.search(r"<s[0-9]+>", text)
    if placeholder is not None:
        quoted = f', "{text}",' if what else f'"{text}"'
        raise UserInputError(
            f"{what}{quoted} holds {placeholder[0]}, a placeholder token that only training may insert: "
            "write a word such as TOK instead."
        )


def require_token(caption: str, token_map: TokenMap, what: str) -> None:
    """Refuse a caption without a token of the map: its picture would teach the token nothing.

    what: where the caption comes from, such as "The caption of 1.jpg".

    Raises:
        DatasetError: the caption names no token.
    """
    if token_map.named_in(caption):
        return
    shown = caption if len(caption) <= 120 else f"{caption[:120]}…"
    problem = f'{what}, "{shown}", names no token of token_map'
    for token in token_map.placeholders:
        similar = re.search(rf"\w*{re.escape(token)}\w*", caption, re.IGNORECASE)
        if similar is not None:
            case = "" if token in similar[0] else " and in the same case"
            raise DatasetError(
                f'{problem}: it has "{similar[0]}", but {token} must be a separate word{case}.'
            )
    tokens = " or ".join(token_map.placeholders)
    raise DatasetError(f"{problem}: add {tokens} as a separate word, in exactly this spelling.")


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
