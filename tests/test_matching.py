"""Which answers match: a table of scripts, signs and numbers, and what holds for any text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapo_jax import rewards
from tapo_jax.atlas.world import real_world

MATCH = [
    ("A", "A"), ("(A)", "A"), ("The The", "The The"), ("the Beatles", "Beatles"),
    ("An apple.", "apple"), ("?", "?"),
    ("Лев Толстой", "лев толстой"), ("Толсто́й", "Толстой"), ("서울 특별시", "서울 특별시"), ("東京", "東京"),
    ("Łódź", "Lodz"), ("Tromsø", "Tromso"), ("straße", "STRASSE"), ("Æsir", "aesir"), ("Đorđe", "Dorde"),
    ("İstanbul", "istanbul"), ("ΑΘΉΝΑ", "αθηνα"), ("ﬁn", "fin"), ("Ｔｏｋｙｏ　２０２０", "Tokyo 2020"),
    ("٢٠٢٠", "2020"),
    ("−5", "-5"), ("–5", "-5"), ("+5", "5"), ("1,000", "1000"), ("1,234,567.5", "1234567.5"),
    ("1,00,000", "100000"),
    ("1\u202f000", "1000"), ("5 %", "5%"), ("½", "1/2"), ("1700 – 1800", "1700-1800"), ("H₂O", "H2O"),
    ("U.S.A.", "USA"), ("Paris–Dakar", "Paris-Dakar"), ("“Paris”", "Paris"), ("L’Aquila", "L'Aquila"),
    ("AT&T", "ATT"), ("Hawaiʻi", "Hawaii"), ("مُحَمَّد", "محمد"), ("محـــمد", "محمد"),
    ("Tōkyō", "Tokyo"), ("a\u200bb", "ab"),
]  # fmt: skip
DIFFER = [
    ("hepatitis A", "hepatitis"), ("Vitamin A", "vitamin"), ("東京 2020", "大阪 2020"),
    ("第3章", "第3节"), ("か", "が"), ("ハ", "バ"),
    ("Ørsted", "Rsted"), ("й", "и"), ("мёд", "мед"), ("कु", "कू"), ("कि", "की"), ("กา", "กี"),
    ("أ", "ا"), ("가", "각"),
    ("-5", "5"), ("1.5", "15"), ("1,5", "15"), (".5", "5"), ("10³", "103"), ("10^3", "103"),
    ("1½", "11/2"), ("10:30", "1030"),
    ("C#", "C++"), ("C", "C++"), ("C#", "C"), ("€5", "£5"), ("€5", "5"), ("-€5", "€5"),
    ("5%", "5"), ("5%", "5‰"), ("<5", ">5"),
    ("1/2", "12"), ("9/11", "911"), ("1700-1800", "17001800"), ("5′", "5″"), ("①", "1"),
    ("?", "!"), ("🙂", "🙁"),
    ("log₂ 8", "log₃ 8"), ("", ""), (" ", " "), ("α", "a"), ("а", "a"), ("x²", "x2"),
    ("\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
     "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), MATCH)
def test_what_says_the_same_matches(one, other):
    assert rewards.exact_match(one, [other]) == rewards.exact_match(other, [one]) == 1.0


@pytest.mark.parametrize(("one", "other"), DIFFER)
def test_what_differs_does_not_match(one, other):
    assert rewards.exact_match(one, [other]) == rewards.exact_match(other, [one]) == 0.0


@settings(deadline=None)
@given(st.text())
def test_any_text_with_something_to_see_matches_itself(text):
    assert rewards.exact_match(text, [text]) == float(bool(rewards.normalise(text)))


@settings(deadline=None)
@given(st.text(), st.text())
def test_matching_is_symmetric(one, other):
    assert rewards.exact_match(one, [other]) == rewards.exact_match(other, [one])


@settings(deadline=None)
@given(st.text(st.characters(categories=["Lo", "Nd"]), min_size=1), st.characters(categories=["Lo"]))
def test_a_further_letter_is_never_accepted(text, letter):
    assert rewards.exact_match(text + letter, [text]) == 0.0


WORDS = st.lists(st.sampled_from("lima paris the of a an New York's well-known Mr. river, (delta)".split()), min_size=2)


@settings(deadline=None)
@given(WORDS, WORDS)
def test_on_english_words_that_do_not_end_in_an_article_ours_is_the_published_rule(one, other):
    one, other = " ".join([*one, "end"]), " ".join([*other, "end"])
    assert rewards.exact_match(one, [other]) == rewards.exact_match_published(one, [other])


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [("The U.S.A.", "usa", 1), ("-5", "5", 1), ("C#", "C++", 1), ("A", "the", 1),
    ("1.5", "15", 1), ("Tōkyō", "Tokyo", 0),
     ("“Paris”", "Paris", 0), (None, "", 0)],
)  # fmt: skip
def test_the_published_rule(answer, accepted, score):
    assert rewards.exact_match_published(answer, [accepted]) == score


def test_answers_of_atlas_match_each_other_only_where_they_are_one_answer():
    """The default run's rewards: no two different answers of a world are equal, and each equals itself."""
    import dataclasses

    def strings(value):
        if isinstance(value, str):
            yield value
        elif dataclasses.is_dataclass(value):
            yield from strings([getattr(value, field.name) for field in dataclasses.fields(value)])
        elif isinstance(value, dict):
            yield from strings([*value, *value.values()])
        elif isinstance(value, list | tuple | set | frozenset):
            for item in value:
                yield from strings(item)

    found = sorted(set(strings(real_world("train"))))
    assert len(found) > 100
    by_form = {}
    for text in found:
        by_form.setdefault(rewards.normalise(text), set()).add(text)
    assert not {form: texts for form, texts in by_form.items() if len({t.casefold() for t in texts}) > 1}


@pytest.mark.parametrize(
    ("answer", "score"),
    [("1,889 m", 1), ("about 1900", 1), ("1800", 0), ("10 or 1900", 0), ("-1900", 0), (None, 0), ("none", 0)],
)
def test_a_number_in_its_range_is_right(answer, score):
    assert rewards.in_range(answer, [(1880, 1950)]) == score
