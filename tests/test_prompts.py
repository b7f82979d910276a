"""Prompts: what is read, what is refused and in which words, what is said about them."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import CLIPTokenizer

from rapm.cli import main
from rapm.config import Config
from rapm.errors import UserError
from rapm.pipeline import describe_prompts
from rapm.prompts import Prompt, PromptList, count_longer, is_hub, read_prompts, report, token_limit
from rapm.run import Run
from rapm.toy import TEACHER


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file into the current folder, so that errors name it without one, and returns its
    name."""
    monkeypatch.chdir(tmp_path)

    def file(name, content):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return file


def told(source):
    """The one line that a source is refused with."""
    with pytest.raises(UserError) as caught:
        read_prompts(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pairs(source):
    return [(prompt.text, prompt.seed) for prompt in read_prompts(source).prompts]


# ---- what is read


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_other_encodings_are_not_taken_for_text(write, encoding):
    assert "holds control characters; is the file UTF-16?" in told(
        write("a.txt", "a cat".encode(encoding))
    )
    assert "holds control characters" in told(write("a.jsonl", '{"prompt": "a\\u0000b"}'))


@pytest.mark.parametrize("ending", [".txt", ".TXT"])
def test_a_text_file_has_a_prompt_a_line(write, ending):
    name = write(f"a{ending}", "\ufeffa cat\r\n\r\n  a dog, sleeping \n\t\na “fox”\u2028at dusk")
    assert pairs(name) == [("a cat", None), ("a dog, sleeping", None), ("a “fox” at dusk", None)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'id,prompt,seed\r\n1,"a cat, asleep",5\r\n\r\n2,"a ""big""\ndog",\r\n'),
        (
            "a.csv",
            '\ufeffSeed,Prompt \n5,"a cat, asleep"\n , "a ""big"" dog"\n'.replace(', "a', ',"a'),
        ),
        ("a.tsv", 'prompt\tseed\na cat, asleep\t 5\n"a ""big"" dog"\t\n'),
        ("a.jsonl", '{"seed": 5, "prompt": " a cat, asleep"}\n\n"a \\"big\\"\\ndog"\n'),
        (
            "a.jsonl",
            '{"Seed": "5", "PROMPT": "a cat, asleep"}\r\n{"prompt": "a \\"big\\" dog", "seed": '
            "null}",
        ),
    ],
)
def test_tables_have_a_prompt_a_row(write, name, content):
    assert pairs(write(name, content)) == [("a cat, asleep", 5), ('a "big" dog', None)]


@pytest.mark.parametrize(
    ("header", "chosen"),
    [
        ("text,caption,prompt", "c"),
        ("text,caption,other", "b"),
        ("text,x,y", "a"),
        ("TEXT,x,y", "a"),
    ],
)
def test_the_column_is_prompt_or_else_caption_or_else_text(write, header, chosen):
    assert pairs(write("a.csv", f"{header}\na,b,c\n")) == [(chosen, None)]
    record = dict(zip(header.split(","), "abc", strict=True))
    assert pairs(write("a.jsonl", json.dumps(record))) == [(chosen, None)]
    pq.write_table(pa.Table.from_pylist([record]), "a.parquet")
    assert pairs("a.parquet") == [(chosen, None)]


def test_a_parquet_file(write):
    pq.write_table(
        pa.table({"n": [1, 2, 3], "caption": ["a cat", " a\ndog", "a fox"], "seed": [5, None, -1]}),
        "a.parquet",
    )
    assert pairs("a.parquet") == [("a cat", 5), ("a dog", None), ("a fox", -1)]
    many = [f"prompt {n}" for n in range(70_000)]
    pq.write_table(pa.table({"text": many}), "many.parquet", row_group_size=20_000)
    assert [text for text, _ in pairs("many.parquet")] == many


def test_what_comes_again_is_left_out_and_counted(write):
    """Text and seed together: a prompt under two seeds is two prompts."""
    found = read_prompts(write("a.csv", "prompt,seed\na,\nb,1\na,\nb,2\n a ,\nb,1\n"))
    assert found == PromptList([Prompt("a"), Prompt("b", 1), Prompt("b", 2)], 3)


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.txt", "\n  \n", "a.txt holds no prompts"),
        ("a.csv", "", "a.csv holds no prompts"),
        ("a.csv", "prompt\n", "a.csv holds no prompts"),
        ("a.jsonl", "", "a.jsonl holds no prompts"),
        ("a.txt", b"a cat\na caf\xe9\n", "a.txt line 2: this is not UTF-8 text"),
        ("a.csv", b"prompt\na cat\n\xff\n", "a.csv line 3: this is not UTF-8 text"),
        ("a.txt", "a cat\n".encode("utf-16"), "a.txt line 1: this is not UTF-8 text"),
        (
            "a.csv",
            "id,words\n1,a cat\n",
            "a.csv line 1: no column prompt, caption or text; there are: id, words",
        ),
        (
            "a.csv",
            "id,prompt\n1,a cat\n\n2,a dog, asleep\n",
            "a.csv line 4: cells and columns differ in number (3 and 2); a prompt with a comma in "
            "it needs quotes",
        ),
        (
            "a.tsv",
            "id\tprompt\n1\n",
            "a.tsv line 2: cells and columns differ in number (1 and 2); a prompt with a tab in it "
            "needs quotes",
        ),
        (
            "a.csv",
            'prompt\na cat\n"a dog\na fox\n',
            "a.csv line 3: this row cannot be read (unexpected end of data)",
        ),
        (
            "a.csv",
            'prompt,seed\n"a\ncat",1\na dog,2.5\n',
            "a.csv line 4: seed is not an integer of 64 bits (given: '2.5')",
        ),
        ("a.csv", "prompt,seed\na cat,1\n ,2\n", "a.csv line 3: prompt is empty"),
        (
            "a.csv",
            "prompt,seed,prompt\na cat,1,a dog\n",
            "a.csv line 1: column prompt is there twice; keep one of them",
        ),
        (
            "a.tsv",
            "text\tTEXT \na\tb\n",
            "a.tsv line 1: column text is there twice; keep one of them",
        ),
        (
            "a.csv",
            "seed,text,seed\n1,a,2\n",
            "a.csv line 1: column seed is there twice; keep one of them",
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "a", "Text": "b"}',
            "a.jsonl line 2: column text is there twice; keep one of them",
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "a", "text": "b"}',
            "a.jsonl line 2: this is not JSON ('text' is there twice)",
        ),
        ("a.jsonl", "[" * 100_000, "a.jsonl line 1: this is not JSON (nested too deeply)"),
        (
            "a.csv",
            "prompt,seed\na cat,9223372036854775808\n",
            "a.csv line 2: seed is not an integer of 64 bits (given: '9223372036854775808')",
        ),
        (
            "a.jsonl",
            '{"text": "a", "seed": 1e30}',
            "a.jsonl line 1: seed is not an integer of 64 bits (given: 1e+30)",
        ),
        ("a.jsonl", '"a cat"\n{"prompt": \n', "a.jsonl line 2: this is not JSON (Expecting value)"),
        (
            "a.jsonl",
            '{"seed": %s}' % ("9" * 5000),
            "a.jsonl line 1: this is not JSON (Exceeds the limit (4300 digits) for integer "
            "string conversion: value has 5000 digits; use sys.set_int_max_str_digits() to "
            "increase the limit)",
        ),
        (
            "a.jsonl",
            '{"a": 1, "b": 2}',
            "a.jsonl line 1: no column prompt, caption or text; there are: a, b",
        ),
        ("a.jsonl", "{}", "a.jsonl line 1: no column prompt, caption or text; there are: none"),
        ("a.jsonl", "\n[1]", "a.jsonl line 2: this is neither an object nor a string"),
        ("a.jsonl", '{"text": 5}', "a.jsonl line 1: text is not text (given: 5)"),
        ("a.jsonl", '{"caption": null}', "a.jsonl line 1: caption is empty"),
        ("a.jsonl", '" "', "a.jsonl line 1: prompt is empty"),
        (
            "a.jsonl",
            '"\\ud83d"',
            "a.jsonl line 1: prompt holds half a character (a lone surrogate)",
        ),
        (
            "a.jsonl",
            '{"text": "a", "seed": 1.5}',
            "a.jsonl line 1: seed is not an integer of 64 bits (given: 1.5)",
        ),
        (
            "a.jsonl",
            '{"text": "a", "seed": true}',
            "a.jsonl line 1: seed is not an integer of 64 bits (given: True)",
        ),
        (
            "a.xlsx",
            "a cat\n",
            "a.xlsx: prompts are read from .txt, .csv, .tsv, .jsonl, .parquet files and from "
            "hub:OWNER/NAME",
        ),
        (
            "prompts",
            "a cat\n",
            "prompts: prompts are read from .txt, .csv, .tsv, .jsonl, .parquet files and from "
            "hub:OWNER/NAME",
        ),
    ],
)
def test_a_mistake_is_told_with_its_place(write, name, content, line):
    assert told(write(name, content)) == line


def test_there_is_no_such_file(write, tmp_path):
    assert told("none.txt") == "there is no prompt file none.txt"
    assert told(str(tmp_path)) == f"there is no prompt file {tmp_path}"


def test_mistakes_in_a_parquet_file(write, monkeypatch):
    assert told(write("a.parquet", "a cat\n")).startswith("a.parquet cannot be read as Parquet: ")
    pq.write_table(pa.table({"id": [1], "words": ["a"]}), "a.parquet")
    assert told("a.parquet") == "a.parquet: no column prompt, caption or text; there are: id, words"
    pq.write_table(pa.table({"prompt": ["a", "b", None]}), "a.parquet")
    assert told("a.parquet") == "a.parquet row 3: prompt is empty"
    pq.write_table(pa.table({"prompt": ["a", "b"], "seed": [1.0, 2.5]}), "a.parquet")
    assert told("a.parquet") == "a.parquet row 2: seed is not an integer of 64 bits (given: 2.5)"
    pq.write_table(
        pa.table({"prompt": ["a", "b", "c"], "seed": [1.0, None, float("nan")]}), "a.parquet"
    )
    assert [prompt.seed for prompt in read_prompts("a.parquet").prompts] == [1, None, None]
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), "a.parquet")
    assert told("a.parquet") == "a.parquet holds no prompts"
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert (
        told("a.parquet")
        == "a.parquet needs pyarrow to be read; install it: pip install 'rapm[data]'"
    )


# ---- the hub


class Table(list):
    """As much of datasets.Dataset as is used."""

    @property
    def column_names(self):
        return list(self[0])

    def select_columns(self, names):
        return Table({name: record[name] for name in names} for record in self)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the ``datasets`` package, because tests have no network; returns the list of
    what it was asked.

    It holds one data set, and says what the package itself (5.2) says without a network when it is
    asked for another.
    """
    asked = []

    def load_dataset(name, *, revision, split):
        asked.append((name, revision, split))
        if name != "them/theirs":
            raise ConnectionError(
                f"Couldn't reach '{name}' on the Hub (OfflineModeIsEnabled)\nand more"
            )
        if split == "test":
            return Table([{"id": 1, "words": "a cat"}])
        return Table(
            [
                {"image": b"", "Caption": "a cat", "seed": 5},
                {"image": b"", "Caption": "a\ndog", "seed": None},
            ]
        )

    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, __version__="5.2.0")
    )
    return asked


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hub:them/theirs", ("them/theirs", None, "train")),
        ("hub:them/theirs@v1.0", ("them/theirs", "v1.0", "train")),
        ("hub:them/theirs:validation", ("them/theirs", None, "validation")),
        ("hub:them/theirs@refs/pr/1:train[:100]", ("them/theirs", "refs/pr/1", "train[:100]")),
    ],
)
def test_a_hub_data_set(hub, source, asked):
    assert is_hub(source)
    assert pairs(source) == [("a cat", 5), ("a dog", None)]
    assert hub == [asked]


@pytest.mark.parametrize(
    "source",
    ["hub:", "hub:theirs", "hub:them/theirs/more", "hub:them/theirs@", "hub:them/../theirs"],
)
def test_a_name_that_is_none_of_the_hubs(hub, source):
    line = (
        f"{source}: a hub data set is written hub:OWNER/NAME, hub:OWNER/NAME@REVISION or "
        f"hub:OWNER/NAME:SPLIT"
    )
    assert told(source) == line
    assert hub == []


def test_a_hub_data_set_that_cannot_be_had(hub, monkeypatch):
    line = (
        "hub:them/others cannot be loaded: Couldn't reach 'them/others' on the Hub "
        "(OfflineModeIsEnabled)"
    )
    assert told("hub:them/others") == line
    line = "hub:them/theirs:test: no column prompt, caption or text; there are: id, words"
    assert told("hub:them/theirs:test") == line
    monkeypatch.setattr(sys.modules["datasets"], "__version__", "3.6.0")
    line = (
        "hub:them/theirs needs datasets 4.0 or newer, not 3.6.0; install it: pip install "
        "'rapm[data]'"
    )
    assert told("hub:them/theirs") == line
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert (
        told("hub:them/theirs")
        == "hub:them/theirs needs datasets to be read; install it: pip install 'rapm[data]'"
    )


# ---- the report


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(TEACHER / "tokenizer")


def ending(tokenizer, limit, times=1):
    """A tokenizer of another end, with ``times`` as many tokens."""

    class Ending:
        model_max_length = limit

        def __call__(self, texts, truncation):
            ids = tokenizer(texts, truncation=truncation).input_ids
            return SimpleNamespace(input_ids=[each * times for each in ids])

    return Ending()


def test_tokens_are_counted_with_their_marks(tokenizer):
    """One token a word in the toy's vocabulary, and the two marks."""
    texts = [" ".join(["red"] * n) for n in (1, 8, 22, 23)]
    assert [len(ids) for ids in tokenizer(texts).input_ids] == [3, 10, 24, 25]
    limits = (2, 3, 10, 24, 25)
    found = [count_longer(texts, [ending(tokenizer, limit)]) for limit in limits]
    assert found == [4, 3, 2, 1, 0]


def test_a_prompt_is_cut_where_no_tokenizer_sees_it_whole(tokenizer):
    texts = ["red", "red star", "red star on grass"]
    six, doubled = ending(tokenizer, 6), ending(tokenizer, 6, times=2)
    assert [count_longer(texts, own) for own in ([six], [doubled])] == [0, 2]
    assert count_longer(texts, [six, doubled]) == count_longer(texts, [doubled, six]) == 0
    assert count_longer(texts, [ending(tokenizer, 3), doubled]) == 2


def test_the_limit_is_the_tokenizers_own(tokenizer):
    assert token_limit([tokenizer]) == 24
    assert token_limit([SimpleNamespace(model_max_length=248)]) == 248
    assert token_limit([SimpleNamespace(model_max_length=77), tokenizer]) == 77


@pytest.mark.parametrize(
    ("number", "duplicates", "used", "longer", "line"),
    [
        (1, 0, 1, 0, "1 prompt"),
        (1000, 0, 1000, 0, "1,000 prompts"),
        (
            1000,
            3,
            2000,
            12,
            "1,000 prompts; 3 duplicates left out; 12 longer than 77 tokens, whose ends the "
            "teacher does not see",
        ),
        (
            2,
            1,
            2,
            1,
            "2 prompts; 1 duplicate left out; 1 longer than 77 tokens, whose end the teacher does "
            "not see",
        ),
        (5000, 0, 1000, 0, "5,000 prompts, of which the first 1,000 are used"),
    ],
)
def test_the_report(number, duplicates, used, longer, line):
    prompts = PromptList([Prompt(str(n)) for n in range(number)], duplicates)
    assert report(prompts, used, longer, 77) == line


def described(settings):
    return describe_prompts(Run(Path("run"), Config.model_validate({"trajectories": settings})))


def test_a_runs_prompts_are_described(write):
    long = " ".join(["red"] * 23)
    name = write("a.txt", f"red star\n{long}\nred star\nblue ring\n{long} red\n")
    assert described({"prompts": name, "count": 3}) == (
        "4 prompts, of which the first 3 are used; 1 duplicate left out; "
        "1 longer than 24 tokens, whose end the teacher does not see"
    )
    assert described({"count": 5}) == "5 prompts"


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("rapm", "2 trajectories in {}"),
        (
            "midpoint",
            "Method 'midpoint' learns without a rollout: 2 pairs of prompt and noise are ready in "
            "{}, no trajectories",
        ),
    ],
)
def test_the_command_line_says_it_first(
    tiny_teacher, tiny_prompts, tmp_path, monkeypatch, capsys, method, told
):
    settings = ["device=cpu", "trajectories.count=2", "trajectories.slots=1"]
    settings += ["trajectories.fine_steps=2"] if method == "rapm" else []
    options = {
        "--teacher": tiny_teacher,
        "--prompts": tiny_prompts,
        "--out": tmp_path / "run",
        "--method": method,
    }
    arguments = [str(part) for option in options.items() for part in option]
    arguments += [f"--set={setting}" for setting in settings]
    monkeypatch.setattr(sys, "argv", ["rapm", "trajectories", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    assert capsys.readouterr().out.splitlines() == [
        "3 prompts, of which the first 2 are used",
        told.format(tmp_path / "run" / "trajectories"),
    ]
