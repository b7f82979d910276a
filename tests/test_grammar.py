"""The built-in prompts: distinct, the same for everybody, well formed, of many kinds; and the
command that writes them."""

import random
import re
import sys
from pathlib import Path

import pytest

from rapm import words
from rapm.cli import main
from rapm.errors import UserError
from rapm.grammar import LONGEST, MOST, _a, _tag, compose


@pytest.fixture(scope="module")
def many():
    return compose(100_000, 0)


def test_a_hundred_thousand_are_distinct(many):
    """A text encoder does not tell capitals apart, so they make no difference here either."""
    assert len({prompt.lower() for prompt in many}) == 100_000


def test_a_prompt_depends_on_its_seed_and_place_alone(many):
    assert compose(500, 0) == many[:500]
    assert compose(1, 0) == many[:1]
    others = compose(500, 1), compose(500, -1)
    assert len({*many[:500], *others[0], *others[1]}) > 1450
    random.seed(5)
    assert compose(500, 1) == others[0]


def test_the_first_prompts_stay_what_they_are():
    """Another machine or version of Python gives the same; whoever changes the words changes these
    too."""
    assert compose(3, 0) == [
        "tawny owl stretching, roof of an old barn, night, telephoto photograph, muted colors, "
        "film grain, 8k, "
        "high resolution, award-winning photography, ultra realistic",
        'glowing red sign that says "FRESH BREAD", photo',
        "A generative art piece of grains of sand rising like a flock of birds. The colors are "
        "teal and charcoal gray, "
        "with paper texture.",
    ]


def test_the_forty_of_the_docs_are_what_the_command_there_writes():
    text = (Path(__file__).parents[1] / "docs" / "prompts.md").read_text(encoding="utf-8")
    assert "rapm prompts --count 40 --seed 1 " in text
    assert text.split("```text\n")[1].split("\n```")[0].splitlines() == compose(40, 1)


def test_more_than_there_are():
    with pytest.raises(UserError) as caught:
        compose(MOST + 1, 0)
    assert str(caught.value) == "1,000,001 prompts are asked for; a seed has 1,000,000"


def test_prompts_are_well_formed(many):
    """No doubled word, no stray space or comma, brackets or empty part, no wrong article, sentences
    with capital and stop."""
    wrong = re.compile(
        r"\b(\w+) \1\b|\s\s|^\s|\s$|\s[,.]|[,.][,.]|,$|, ,|[{}<>|/\\_\[\]()]"
        r"|\ban (?!hour|8)[^aeiou]|\ba (?!uni|euro|one|ukr)[aeiou8]|\ba hour|\ban "
        r"(?:uni(?!nh)|Ukr)",
        re.IGNORECASE,
    )
    assert [prompt for prompt in many if wrong.search(prompt)] == []
    assert [
        prompt
        for prompt in many
        if prompt.endswith(".") and not prompt[0].isupper() and not prompt[0].isdigit()
    ] == []
    assert [prompt for prompt in many if re.search(r"\. [a-z]", prompt)] == []
    assert [prompt for prompt in many if prompt.count('"') not in (0, 2)] == []
    assert all(prompt.isascii() and prompt.isprintable() for prompt in many)


def test_verbs_agree(many):
    assert [
        p
        for p in many
        if re.match(r"(An?|The) [^,.]*? are ", p) and not re.search(r"(who|that|which|\.) ", p)
    ] == []
    assert [p for p in many if re.match(r"(Two|Three|Four) [^,.]*? is ", p)] == []


def test_prompts_are_short_and_long_but_never_too_long(many):
    lengths = [len(re.findall(r"\w+|[^\w\s]", prompt)) for prompt in many]
    assert max(lengths) <= LONGEST
    assert min(lengths) == 1
    assert sum(length <= 6 for length in lengths) > 4_000
    assert sum(length > 35 for length in lengths) > 6_000


@pytest.mark.parametrize(
    ("pattern", "least"),
    [
        (r"\.$", 25_000),  # sentences
        (r"^[^.]*,[^.]*,[^.]*,", 20_000),  # tags
        (r'"[^"]+"', 3_000),  # written words
        (r"\b(woman|man|girl|boy|child|person)\b", 5_000),
        (r"\b(cat|dog|fox|owl|whale|elephant)\b", 2_000),
        (r"\b(street|lake|forest|village|city)\b", 5_000),
        (r"\b(robot|dragon|wizard|astronaut)\b", 1_500),
        (r"\b(abstract|pattern|surreal)\b", 1_500),
        (r"photo", 19_000),
        (r"painting|watercolor", 15_000),
    ],
)
def test_prompts_are_of_many_kinds(many, pattern, least):
    assert sum(re.search(pattern, prompt) is not None for prompt in many) >= least


@pytest.mark.parametrize(
    "text",
    [
        *(
            "an owl",
            "a unicorn",
            "an umbrella",
            "an hourglass",
            "a house",
            "an 8-bit scene",
            "a 16-bit scene",
            "a 3D render",
        ),
        *(
            "a Ukrainian nurse",
            "an upright piano",
            "a university",
            "two owls",
            "concept art",
            "a one-room hut",
        ),
    ],
)
def test_articles(text):
    bare = re.sub(r"^an? ", "", text)
    assert _a(bare) == text


@pytest.mark.parametrize(
    ("place", "tag"),
    [
        ("in a small bakery", "small bakery"),
        ("high above the Earth", "Earth"),
        ("in front of an old house", "old house"),
        ("among tall bookshelves", "tall bookshelves"),
        ("on top of a hill", "hill"),
    ],
)
def test_a_place_becomes_a_tag(place, tag):
    assert _tag(place) == tag


def test_every_place_becomes_a_tag():
    assert [
        p for scene in (*words.SCENES, *words.SIGNS) for p in scene.places if _tag(p) == p
    ] == []


# ---- the command line


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["rapm", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def test_the_command_writes_what_the_grammar_composes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, count, seed in (("deep/new.txt", 40, 3), ("other.txt", 1, 0)):
        assert not command(
            monkeypatch, "prompts", "--count", str(count), "--seed", str(seed), "--out", name
        )
        assert capsys.readouterr() == (f"{count} prompt{'s' * (count > 1)} in {name}\n", "")
        assert (tmp_path / name).read_text(encoding="utf-8").splitlines() == compose(count, seed)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["deep", "new.txt", "other.txt"]


def test_the_command_overwrites_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("by hand")
    assert command(monkeypatch, "prompts", "--out", "mine.txt") == 2
    assert capsys.readouterr().err == "rapm: --out mine.txt is there already; name another file\n"
    assert (tmp_path / "mine.txt").read_text() == "by hand"


def test_the_command_writes_text_files_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "prompts", "--out", "a.csv") == 2
    assert capsys.readouterr() == (
        "",
        "rapm: --out a.csv: prompts are written one a line, into a file that ends in .txt\n",
    )
    assert list(tmp_path.iterdir()) == []
