"""The matcher of path patterns against `re`, and on what `re` would not finish."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpjax as mp
from mpjax import _path_patterns
from mpjax._path_patterns import LONGEST_PATTERN, check_pattern, matches_path

# Letters with more than two cases among them: the Kelvin sign is a k, the long s an s.
LETTERS = "abAB/_1sK\u017f\u212a\n"
ATOMS = [*"abAs/_1k\u212a.", r"\w", r"\W", r"\d", r"\s", "[ab]", "[^/]", "[a-k]", "[^A-B1]", r"[\w/]", "(?!)", ""]
ANCHORS = ["^", "$", r"\A", r"\Z", r"\b", r"\B"]
REPEATS = ["*", "+", "?", "*?", "+?", "??", "{2}", "{0,2}", "{1,}", "{1,2}?"]
GROUPS = ["=", "!", "<=", "<!", "i:", "-i:", "s:", "a:", "m:"]


def larger(inside):
    some = st.lists(inside, min_size=2, max_size=3)
    return st.one_of(
        some.map("".join),
        some.map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.builds(lambda part, repeat: f"({part}){repeat}", inside, st.sampled_from(REPEATS)),
        st.builds(lambda kind, part: f"(?{kind}{part})", st.sampled_from(GROUPS), inside),
    )


COMPARED = given(
    st.sampled_from(["", "", "(?s)", "(?m)", "(?x)", "(?a)"]),
    st.recursive(st.sampled_from(ATOMS + ANCHORS), larger, max_leaves=8),
    st.lists(st.text(LETTERS, max_size=6), min_size=4, max_size=8),
)


def agrees_with_re(flags, pattern, texts):
    try:
        expected = re.compile(flags + pattern, re.IGNORECASE)
    except re.error:  # a look-behind of any length
        with pytest.raises(ValueError, match="is not a regular expression: look-behind requires fixed-width"):
            check_pattern(flags + pattern)
        return
    for text in texts:
        assert matches_path(flags + pattern, text) == bool(expected.fullmatch(text)), text


test_any_pattern_agrees_with_re = settings(max_examples=200)(COMPARED(agrees_with_re))
test_any_pattern_agrees_with_re_often = pytest.mark.slow(settings(max_examples=20_000)(COMPARED(agrees_with_re)))


@given(st.lists(st.sampled_from(["params", "norm", "bn", "ln_f", "_", "head", "Router", "0", "x", "/"])).map("".join))
def test_the_default_pattern_agrees_with_re(path):
    (pattern,) = mp.default_overrides()
    assert matches_path(pattern, path) == bool(re.fullmatch(pattern, path, re.IGNORECASE))


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        (r".*/(layer_[0-3]|layer_1\d)/.*", {"a/layer_2/w": True, "a/LAYER_17/w": True, "a/layer_4/w": False}),
        (r"(?!.*norm).*/kernel", {"dense/kernel": True, "norm/kernel": False}),
        (r".*(?<!bn)/scale", {"ln/scale": True, "bn/scale": False, "/scale": True}),
        (r"(?-i:Dense)_\d/.*", {"Dense_0/w": True, "dense_0/w": False}),
        (r"(?-i:a(?i:b))", {"ab": True, "aB": True, "Ab": False}),
        (r".*\bhead\b.*", {"lm/head/w": True, "lm_head/w": False}),
        (r"[^/]*/[^/]*", {"a/b": True, "a/b/c": False}),
        (r"(a|b){2,3}", {"ab": True, "aba": True, "a": False, "abab": False}),
        (r"Größe|STRASSE", {"grÖsse": False, "GRÖßE": True, "strasse": True}),
        ("", {"": True, "a": False}),
    ],
)
def test_what_people_write(pattern, paths):
    assert {path: matches_path(pattern, path) for path in paths} == paths


CATASTROPHIC = [
    r"(a+)+$",
    r"(a|a)*b",
    r"(a|aa)+$",
    r".*.*.*.*.*.*.*.*x",
    r"(.*a){25}",
    r"(a*)*(a*)*b",
    r"((a*)*)*b",
    r"(a?){50}a{50}b",
    r"([^/]*)*/([^/]*)*/x",
    r"(?=(a+)+$)(.*)*b",
    r"(?!(a|a)*b)((a*)*)*c",
    r"(?:(?=(a*)*b)|(?!(a*)*b).)*c",
    r"(\ba*\B)*b",
    "(?=.*" * 8 + "b" + ")" * 8 + ".*c",
]


@pytest.mark.parametrize("pattern", CATASTROPHIC)
def test_what_re_would_not_finish(pattern):
    assert not matches_path(pattern, "a" * 500 + "!")


def test_a_path_is_walked_once():
    """However nested the repeats are: nothing is tried again."""
    asked = []

    class Counted(str):
        def __getitem__(self, i):
            asked.append(i)
            return super().__getitem__(i)

    assert not matches_path("(((a*)*)*)*b", Counted("a" * 1000))
    assert len(asked) == 1000


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("a" * 10**6, ["'... (1000000 characters) has 1000000 characters", f"{LONGEST_PATTERN} characters at most"]),
        ("(a+)+" * 200_000, ["(1000000 characters) has 1000000 characters"]),
        ("(" * 4000 + ")" * 4000, ["(8000 characters) is nested too deeply", "a few groups"]),
        ("(a?){5000}", ["has more than 10000 parts, repeats written out", "a smaller pattern"]),
        ("((a{99}){99}){99}", ["has more than 10000 parts"]),
        ("((?:){9999}){9999}", ["has more than 10000 parts"]),
        ("(?:){0,4000000000}", ["has more than 10000 parts"]),
        ("[\0-\U0010ffff]" * 2000, ["has more than 10000 parts"]),
        ("a{99999999999}", ["is not a regular expression: the repetition number is too large"]),
        ("(norm", ["is not a regular expression: missing )"]),
        ("(?<=a*)b", ["is not a regular expression: look-behind requires fixed-width pattern"]),
        (r"(a)\1", [r"override '(a)\\1' has a backreference", "a pattern without one"]),
        ("(?P<x>a)(?P=x)", ["has a backreference"]),
        ("(a)?(?(1)b|c)", ["has a condition"]),
        ("(?>a*)b", ["has an atomic group"]),
        ("a*+b", ["has a possessive repeat"]),
    ],
    ids=lambda x: x[:20] if isinstance(x, str) else None,
)
def test_what_is_refused(pattern, words):
    with pytest.raises(ValueError, match="override") as error:
        check_pattern(pattern)
    for word in [*words, "expected:", "write:"]:
        assert word in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("pattern", ["x" * LONGEST_PATTERN, "|".join(["layer_10"] * 1000), "a{0,1}" * 1600])
def test_long_patterns(pattern):
    check_pattern(pattern)
    assert matches_path(pattern, "layer_10") == ("layer" in pattern)


def test_sets_of_places_are_forgotten_in_time():
    """A pattern that meets new ones all the time keeps no more than its share, and goes on to match."""
    pattern = ".*a" + ".{12}"
    compiled = mp._path_patterns._compiled(pattern)
    for i in range(3000):
        path = f"{i * 2654435761 % 2**32:032b}".replace("1", "a")
        assert matches_path(pattern, path) == bool(re.fullmatch(pattern, path))
    assert compiled._kept < mp._path_patterns._KEPT + 100
    assert len(compiled._known) < 2**13


def test_more_patterns_than_a_small_cache_holds_are_compiled_once():
    """A policy may hold thousands; going through them again and again must find them ready."""
    patterns = [f".*norm_{i}/scale" for i in range(600)]
    first, again = ([matches_path(pattern, "norm_599/scale") for pattern in patterns] for _ in range(2))
    compiled = _path_patterns._compiled.cache_info().misses
    assert first == again == [False] * 599 + [True]
    assert [matches_path(pattern, "norm_7/bias") for pattern in patterns] == [False] * 600
    assert _path_patterns._compiled.cache_info().misses == compiled
