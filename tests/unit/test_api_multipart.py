"""A form is the same form however it is cut into pieces, and what is none is said to be none."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmboost_api.files.multipart import MultipartError, MultipartReader, PartBegins, PartEnds
from tests.integration.forms import BOUNDARY, CONTENT_TYPE, FILE, PURPOSE, cut, form, value

Parts = list[tuple[str, str | None, bytes]]

MARK = f"\r\n--{BOUNDARY}".encode()
tricky = st.sampled_from(
    [b"\r", b"\n", b"\r\n", b"-", b"--", MARK[:4], MARK[:-1], MARK[2:], MARK[:9], b"x", b"\0"]
)
data = (
    st.lists(tricky | st.binary(max_size=20), max_size=12)
    .map(b"".join)
    .filter(lambda made: MARK not in b"\r\n" + made)
)
names = st.sampled_from(["file", "purpose", "other"])
parts = st.lists(
    st.tuples(names, st.none() | st.sampled_from(["a.jsonl", "ü.jsonl", ""]), data), min_size=1, max_size=4
)
places = st.lists(st.integers(0, 1000), max_size=30)


def read(pieces: list[bytes], content_type: str = CONTENT_TYPE) -> Parts:
    """The parts of a form, whole."""
    reader = MultipartReader(content_type)
    found: Parts = []
    open_part = False
    for piece in pieces:
        for event in reader.feed(piece):
            match event:
                case PartBegins():
                    assert not open_part
                    open_part = True
                    found.append((event.name, event.filename, b""))
                case PartEnds():
                    assert open_part
                    open_part = False
                case more:
                    assert open_part
                    name, filename, so_far = found.pop()
                    found.append((name, filename, so_far + more))
    reader.finish()
    assert not open_part
    return found


@settings(max_examples=300, deadline=None, database=None)
@given(parts, places)
def test_any_cutting_gives_the_same_parts(wanted: Parts, where: list[int]) -> None:
    body = form(
        *(
            (f'; name="{name}"' + ("" if filename is None else f'; filename="{filename}"'), content)
            for name, filename, content in wanted
        )
    )
    assert read(cut(body, where)) == wanted
    assert read([bytes([byte]) for byte in body]) == wanted


@settings(max_examples=300, deadline=None, database=None)
@given(st.data())
def test_a_broken_form_is_said_to_be_one(draw: st.DataObject) -> None:
    """Or it is another form: never anything else, and however it is cut."""
    body = bytearray(form(PURPOSE, FILE))
    for _ in range(draw.draw(st.integers(1, 3))):
        place = draw.draw(st.integers(0, len(body)))
        body[place : place + draw.draw(st.integers(0, 5))] = draw.draw(st.binary(max_size=5))
    outcomes = []
    for pieces in ([bytes(body)], cut(bytes(body), draw.draw(places)), [bytes([byte]) for byte in body]):
        try:
            outcomes.append(repr(read(pieces)))
        except MultipartError:
            outcomes.append("refused")
    assert len(set(outcomes)) == 1


def test_only_line_breaks_may_come_first() -> None:
    """However the form is cut."""
    whole = form(PURPOSE, FILE)
    for cutting in ([b"\r\n" + whole], [b"\r", b"\n", whole]):
        assert read(cutting) == read([whole])
    for first in (b"\n:", b'\r"', b"\r\nHello.\r\n"):
        for cutting in ([first + whole], [first, whole], [bytes([byte]) for byte in first + whole]):
            with pytest.raises(MultipartError):
                read(cutting)


@settings(max_examples=200, deadline=None, database=None)
@given(st.binary(max_size=200))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(MultipartError):
        read([garbage])


@pytest.mark.parametrize("end", range(len(form(PURPOSE, FILE)) - 2))
def test_a_form_that_breaks_off_is_refused(end: int) -> None:
    with pytest.raises(MultipartError):
        read([form(PURPOSE, FILE)[:end]])


@pytest.mark.parametrize(
    ("content_type", "words"),
    [
        ("", "not 'none'"),
        ("application/json", "not 'application/json'"),
        ("multipart/mixed; boundary=x", "multipart/form-data"),
        ("multipart/form-data", "names no boundary"),
        ("multipart/form-data; boundary=", "names no boundary"),
        ('multipart/form-data; boundary=""', "names no boundary"),
        ("multipart/form-data; boundary=" + "x" * 300, "too long"),
    ],
)
def test_a_content_type_that_is_none_of_a_form(content_type: str, words: str) -> None:
    with pytest.raises(MultipartError, match=words):
        read([form(FILE)], content_type)


@pytest.mark.parametrize(
    "head",
    [
        "",
        "; filename=x",
        '; name="file"\r\nContent-Transfer-Encoding: base64',
        '; name="file"\r\n' + "\r\n".join(f"x-{n}: y" for n in range(20)),
        '; name="' + "x" * 5000 + '"',
    ],
)
def test_a_part_that_is_none(head: str) -> None:
    with pytest.raises(MultipartError):
        read([form((head, b"x"))])


def test_names_of_files_are_text() -> None:
    """In UTF-8, as clients send them; what is not UTF-8 does no harm."""
    body = form(value("purpose", "x"), ('; name="file"; filename="naïve 文.jsonl"', b""))
    assert read([body])[1][1] == "naïve 文.jsonl"
    assert read([body.replace("文".encode(), b"\xff")])[1][1] == "naïve \ufffd.jsonl"
