"""Numbers in every form that people and models write them in."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rrcli.data.numbers import boxed, first_number, last_number, number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", "42"), ("1,000", "1000"), ("$5", "5"), ("-$5.50", "-5.5"), ("$-5", "-5"), ("42.", "42"), (".5", "0.5"),
        ("7.50 %", "7.5"), (" +3 ", "3"), ("\u22125", "-5"), ("\u20135", "-5"), ("- 5", "-5"), ("1/2", "1/2"),
        ("-3/4", "-3/4"), ("1 1/2", "3/2"), ("\u00bd", "1/2"), ("2\u00bd", "5/2"), ("1\u20442", "1/2"),
        (r"\frac{1}{2}", "1/2"), (r"-\dfrac{3}{4}", "-3/4"), (r"1\frac12", "3/2"), ("1e6", "1000000"),
        ("2.5E-3", "0.0025"), ("1.5 x 10^3", "1500"), (r"$1.5 \times 10^{-3}$", "0.0015"), ("2*10**3", "2000"),
        (r"\boxed{7}", "7"), (r"$\boxed{-\frac{1}{2}}$.", "-1/2"), (r"\(7\)", "7"), ("**7**", "7"), ("1{,}234", "1234"),
        ("\uff11\uff12", "12"), ("\u0661\u0662", "12"), ("5 \u20ac", "5"), (r"50\%", "50"), ("50 percent", "50"),
        ("1,234,567.89", "1234567.89"), ("0", "0"), ("0.50", "0.5"),
    ],
)  # fmt: skip
def test_a_number_is_read_in_each_form(text: str, value: str) -> None:
    assert number(text) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "3 apples", "-", ",", ".", "%", "$", "1,2", "1,2,3", "0,5", "0,500", "1,23", "1,2345", "12,34,567",
        "1/0", "1/2/3", "10:3", "10-4", "10^2", "10\u00b2", "1.2.3", "2024-08", "007", "0110", "--5", "+-5", "1 2",
        "1 3/2", "1e9999", "1" * 500, "[1,2]", "(3)", "1e", "e5", "0x1F", "1_000", "1e5e5", "five",
    ],
)  # fmt: skip
def test_what_is_not_one_number_is_none(text: str) -> None:
    assert number(text) is None


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("There are 3 and 4, that is 7.", "7"), ("It is $1,000.", "$1,000"), ("x=7.", "7"), ("10 - 4 = 6", "6"),
        ("about 1,200 km", "1,200"), ("5km", "5"), ("It is \u22124", "-4"), ("so 1 1/2 cups", "1 1/2"),
        ("x2 = 7", "7"), ("(7)", "7"), ("It costs 50% more", "50%"), ("1e6 of them", "1e6"), ("I have 2, so 3", "3"),
        ("in a1 and b2", None), ("from 10:3", None), ("it is 1,2", None), ("[1, 2, 3]", None), ("2, 3", None),
        ("10^2", None), ("in 2024-08", None), ("v1.2.3", None), ("10 - 4", None), ("nothing", None),
        ("is (1; 2)", None), ("so 2x", None), ("2x = 7", "7"), (r"$2\pi$", None), ("it is 3i", None), ("10k", None),
        ("the 3rd", "3"), ("5m2 of it", "5"), (r"5\text{ cm}", "5"), ("7KM", "7"), ("30%more", "30%"), ("2 x", "2"),
    ],
)  # fmt: skip
def test_the_last_number_of_a_text_is_never_a_part_of_something_else(text: str, last: str | None) -> None:
    assert last_number(text) == last


def test_the_first_number_and_the_box() -> None:
    assert first_number("7, not 8") == "7"
    assert first_number("1,2 or 8") is None
    assert boxed(r"so \boxed{3} or \boxed{\frac{1}{2}} is right") == r"\frac{1}{2}"
    assert boxed(r"\boxed{3") is boxed("3") is None


# -- each form of a number is that number, and never another one -------------------------------------------------------

FORMS = (
    "{0}", " {0}. ", "**{0}**", "${0}$", r"\boxed{{{0}}}", "{0}%", r"\({0}\)", "{0} percent", "`{0}`",
)  # fmt: skip
INTEGERS = st.integers(-(10**12), 10**12)


def written(value: Fraction) -> list[str]:
    """Return ways to write a number with few decimals."""
    whole = f"{value.numerator}/{value.denominator}"
    forms = [whole, whole.replace("-", "\u2212"), rf"\frac{{{value.numerator}}}{{{value.denominator}}}"]
    decimal = f"{float(value):.4f}"
    if Fraction(decimal) == value:
        grouped = f"{value.numerator / value.denominator:,.4f}"
        forms += [decimal, decimal.replace("-", "\u2212"), grouped, decimal + "e0", f"{decimal}0 x 10^0"]
        forms += [decimal.translate(dict(zip(map(ord, "0123456789"), map(chr, range(0xFF10, 0xFF1A)), strict=True)))]
    if value.denominator == 1:
        forms += [str(value.numerator), f"{value.numerator:,}", f"{value.numerator}e0", f"{value.numerator}.0"]
    return forms


@given(st.fractions(-(10**6), 10**6, max_denominator=10**4), st.sampled_from(FORMS))
def test_a_number_equals_itself_in_each_form(value: Fraction, form: str) -> None:
    for text in written(value):
        if form == "{0}%" and "/" in text:
            continue
        assert number(form.format(text)) == value, text


@given(INTEGERS, INTEGERS)
def test_two_numbers_are_never_one(one: int, other: int) -> None:
    for join in (",", ", ", ":", "-", " - ", "/", "^", " ", ";", "_", "'", ".", "e", "x"):
        joined = f"{one}{join}{other}"
        found = number(joined)
        plausible = {
            ",": int(f"{one}{abs(other)}"), ".": None, "/": Fraction(one, other) if other else None, "e": None,
            " ": None,
        }  # fmt: skip
        if join in (".", "e") and found is not None:
            assert found == Fraction(joined)
        elif join == "," and found is not None:
            assert 100 <= other <= 999, "only thousands"
            assert found == plausible[","]
        elif join == "/" and found is not None:
            assert found == plausible["/"]
        else:
            assert found is None, joined


@given(st.text(max_size=80) | st.text("0123456789,.-+/:^e %$\\{}[]()x*½²", max_size=40))
def test_nothing_raises_and_what_is_found_is_a_number(text: str) -> None:
    for found in (last_number(text), first_number(text)):
        assert found is None or number(found) is not None
    number(text)
    boxed(text)


@pytest.mark.parametrize(
    "text",
    [
        "[" + "1," * 50_000, "1," * 50_000 + "x", "1 " * 50_000, "1" * 50_000, "*" * 50_000, r"\boxed{" * 20_000,
        r"\frac{" * 20_000, "1/" * 50_000, "(1,2" * 20_000, "1 1/2 " * 20_000, "\u00bd" * 50_000, "\u00b2" * 50_000,
        "9^9^9^9^9", "9e999999999", "1x" * 50_000,
    ],
    ids=lambda text: repr(text[:8]),
)  # fmt: skip
def test_the_time_is_bounded(text: str) -> None:
    begin = time.perf_counter()
    number(text), last_number(text), first_number(text), boxed(text)
    assert time.perf_counter() - begin < 2
