"""The shipped prompts: distinct, well formed, of many kinds; the grammar they come from; the
command that writes some of them."""

import random
import re
import sys
from pathlib import Path

import pytest

import generate
import rapm.prompts
import words
from grammar import LONGEST, _a, _tag, compose
from rapm.cli import main
from rapm.errors import UserError
from rapm.prompts import shipped

FILE = Path(rapm.prompts.__file__).with_name("prompts.txt")


@pytest.fixture(scope="module")
def many():
    return FILE.read_text(encoding="utf-8").splitlines()


# ---- the file


def test_there_are_enough_and_no_two_are_alike(many):
    """A text encoder does not tell capitals apart, so they make no difference here either."""
    assert len(many) >= 10_000
    assert len({prompt.lower() for prompt in many}) == len(many)


def test_the_file_is_what_the_tool_writes(many, tmp_path, monkeypatch, capsys):
    arguments = ["generate.py", "--count", str(len(many)), "--out", str(tmp_path / "new.txt")]
    monkeypatch.setattr(sys, "argv", arguments)
    generate.main()
    assert (tmp_path / "new.txt").read_text(encoding="utf-8").splitlines() == many
    assert capsys.readouterr().out == f"{len(many):,} prompts in {tmp_path / 'new.txt'}\n"


def test_the_docs_show_some_of_them(many):
    text = (Path(__file__).parents[1] / "docs" / "prompts.md").read_text(encoding="utf-8")
    shown = text.split("```text\n")[1].split("\n```")[0].splitlines()
    assert len(shown) >= 10
    assert set(shown) <= set(many)


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
    assert sum(length <= 6 for length in lengths) > 480
    assert sum(length > 35 for length in lengths) > 720


@pytest.mark.parametrize(
    ("pattern", "least"),
    [
        (r"\.$", 3_000),  # sentences
        (r"^[^.]*,[^.]*,[^.]*,", 2_400),  # tags
        (r'"[^"]+"', 360),  # written words
        (r"\b(woman|man|girl|boy|child|person)\b", 600),
        (r"\b(cat|dog|fox|owl|whale|elephant)\b", 240),
        (r"\b(street|lake|forest|village|city)\b", 600),
        (r"\b(robot|dragon|wizard|astronaut)\b", 180),
        (r"\b(abstract|pattern|surreal)\b", 180),
        (r"photo", 2_280),
        (r"painting|watercolor", 1_800),
    ],
)
def test_prompts_are_of_many_kinds(many, pattern, least):
    assert sum(re.search(pattern, prompt) is not None for prompt in many) >= least


# ---- the grammar


def test_a_prompt_depends_on_its_seed_and_place_alone():
    first, *others = compose(500, 0), compose(500, 1), compose(500, -1)
    assert compose(1, 0) == first[:1]
    assert len({*first, *others[0], *others[1]}) > 1450
    random.seed(5)
    assert compose(500, 1) == others[0]


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


def test_a_choice_depends_on_its_seed_alone(many):
    """Whoever writes the file anew changes these too."""
    assert sorted(shipped(len(many), 0)) == sorted(many)
    assert shipped(2, 0) == shipped(500, 0)[:2]
    assert shipped(2, 0) == [
        "Bauhaus poster of a French man in a yellow raincoat",
        "A child is flying a kite.",
    ]
    others = shipped(500, 1), shipped(500, -1)
    assert len({*shipped(500, 0), *others[0], *others[1]}) > 1400
    random.seed(5)
    assert shipped(500, 1) == others[0]


def test_more_than_there_are(many, tmp_path, monkeypatch, capsys):
    file = tmp_path / "new.txt"
    assert command(monkeypatch, "prompts", "--count", "1000000", "--out", str(file)) == 2
    told = f"rapm: 1,000,000 prompts are asked for; rapm has {len(many):,}\n"
    assert capsys.readouterr().err == told
    assert not file.exists()
    with pytest.raises(UserError):
        shipped(len(many) + 1, 0)


def test_the_command_writes_shipped_prompts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, count, seed in (("deep/new.txt", 40, 3), ("other.txt", 1, 0)):
        assert not command(
            monkeypatch, "prompts", "--count", str(count), "--seed", str(seed), "--out", name
        )
        assert capsys.readouterr() == (f"{count} prompt{'s' * (count > 1)} in {name}\n", "")
        assert (tmp_path / name).read_text(encoding="utf-8").splitlines() == shipped(count, seed)
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
