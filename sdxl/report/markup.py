"""HTML as a type: what is not `Html` is text, and text is escaped.

Knows HTML's syntax; does not know any page. Captions, prompts and settings come from strangers, so every element is made by
`tag`, and no module puts texts into HTML itself.
"""

import html
import re
from collections.abc import Iterable, Mapping

_VOID = {"img", "input", "meta", "br"}
_NAME = re.compile(r"[a-z][a-z0-9:-]*", re.IGNORECASE)


class Html(str):
    """HTML that needs no escaping."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str | int | bool | None) -> Html:
    """The element `name`. Children that are not `Html` are escaped, and so are the values of attributes.

    attributes: `class_` stands for class, and `aria_label` for aria-label. None and False leave an attribute out; True
        gives it no value.
    """
    assert _NAME.fullmatch(name)
    told = ""
    for key, value in attributes.items():
        attribute = key.removesuffix("_").replace("_", "-")
        assert _NAME.fullmatch(attribute) and not attribute.startswith("on")
        if value is True:
            told += f" {attribute}"
        elif value is not None and value is not False:
            told += f' {attribute}="{escaped(str(value))}"'
    if name in _VOID:
        return Html(f"<{name}{told}>")
    return Html(f"<{name}{told}>{join(children)}</{name}>")


def join(parts: Iterable[str]) -> Html:
    """Parts one after the other; those that are not `Html` are escaped."""
    return Html("".join(part if isinstance(part, Html) else escaped(part) for part in parts))


def escaped(text: str) -> str:
    """Text for HTML, also in attributes. What cannot be printed, such as half of a character or a change of the direction of
    writing, becomes a replacement character."""
    return html.escape(printable(text), quote=True)


def printable(text: str) -> str:
    """`text` with a replacement character for each that cannot be printed."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def cut(text: str, most: int) -> str:
    """`text`, or its first `most` characters and an ellipsis."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def table(heads: Iterable[str], rows: Iterable[Iterable[str]], *, class_: str = "") -> Html:
    """A table whose first cells name their rows."""
    head = tag("tr", *(tag("th", name, scope="col") for name in heads))
    body = []
    for first, *others in rows:
        body.append(tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in others)))
    return tag(
        "div",
        tag("table", tag("thead", head), tag("tbody", *body)),
        class_=f"table {class_}".strip(),
    )


def facts(pairs: Mapping[str, str]) -> Html:
    """Names with their values, as a list."""
    return tag(
        "dl",
        *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs.items() if value),
        class_="facts",
    )


def section(name: str, title: str, *children: str) -> Html:
    """A part of the page that links reach as `#name`."""
    return tag(
        "section",
        tag("h2", title, id=f"{name}-title"),
        *children,
        id=name,
        aria_labelledby=f"{name}-title",
    )
