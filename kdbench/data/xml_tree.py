"""A small XML file that somebody else wrote, read without document types, entities or more elements than are plausible."""

from __future__ import annotations

from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from kdbench.bounded import read_file

LARGEST = 4_000_000  # bytes of a file
MOST_ELEMENTS = 50_000
DEEPEST = 50  # levels of elements


class InvalidXML(ValueError):
    """A file is no XML, or has more in it than it may. The message says what, to be read after the file's name."""


def read_xml(path: Path) -> Element:
    """The outermost element of a file.

    Raises:
        InvalidXML: it is not XML, declares a document type or an entity, or is larger or deeper than the bounds of this module.
        OSError: there is none, it is no regular file, or it can't be read.
    """
    return parse_xml(read_file(path, LARGEST))


def parse_xml(content: bytes) -> Element:
    """The outermost element of a text. Raises InvalidXML."""
    builder, parser, depth, count = TreeBuilder(), expat.ParserCreate(), 0, 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth, count
        depth, count = depth + 1, count + 1
        if depth > DEEPEST or count > MOST_ELEMENTS:
            raise InvalidXML(f"has more than {DEEPEST} levels or {MOST_ELEMENTS:,} elements")
        builder.start(name, attributes)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(name)

    def refuse(*_: object) -> None:
        raise InvalidXML("declares a document type, which is not read")

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, builder.data
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse  # an entity can stand for gigabytes, or for another file
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise InvalidXML(f"is not valid XML: {error}") from None
    except (LookupError, UnicodeError, ValueError) as error:
        if isinstance(error, InvalidXML):
            raise
        raise InvalidXML("is not valid XML: it has an unknown encoding") from None
    return builder.close()
