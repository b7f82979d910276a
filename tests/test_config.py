"""Settings: where they come from, what is refused and in which words."""

import tomllib
from pathlib import Path

import pytest
import torch

from rapm import config as configuration
from rapm.config import Config, Section, differences, dump, flatten, load, parse, read
from rapm.errors import UserError

TABLES = {key: type(value) for key, value in Config() if isinstance(value, Section)}
FREE = [
    "device",
    "trajectories.batch_size",
    "training.slot_batch",
    "training.gradient_checkpointing",
    "training.channels_last",
    "training.compile",
    "training.checkpoint_every",
    "training.keep_checkpoints",
]
ODD = {
    "teacher": 'C:\\models\\"mine"',
    "trajectories": {
        "size": "512x768,512x512",
        "negative_prompt": "blurry, 低品質\n'''",
        "guidance_scale": 1,
    },
    "student": {"targets": ["to_q", "ff.net.2"], "learning_rate": 1e-7},
    "training": {"positions": "stored", "relative_weight": [0, 1, 2.5, 0.1], "absolute_weight": 0},
}


def told(*settings, file=None):
    """The one line that these settings are refused with."""
    with pytest.raises(UserError) as caught:
        load(file, settings=settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- where from


def test_the_toy_teacher_takes_the_toy_preset():
    assert load() == load(teacher="toy") == load(preset="toy")
    assert load() != Config()


@pytest.mark.parametrize("name", configuration.presets())
def test_a_preset_gives_what_its_file_says(name):
    written = flatten(
        tomllib.loads((configuration.PRESETS / f"{name}.toml").read_text(encoding="utf-8"))
    )
    loaded = flatten(load(preset=name).model_dump())
    assert written == {key: loaded[key] for key in written}


def test_another_teacher_takes_no_preset():
    assert load(teacher="models/sd15") == Config(teacher="models/sd15")


def test_later_settings_win(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[training]\ncheckpoint_every = 50\n[student]\nrank = 3\n")
    preset = load()
    assert len({Config().training.checkpoint_every, preset.training.checkpoint_every, 50, 7}) == 4
    assert load(file).training.checkpoint_every == 50
    both = load(file, settings=["training.checkpoint_every=6", "training.checkpoint_every=7"])
    assert (both.training.checkpoint_every, both.student.rank) == (7, 3)
    assert (
        both.student.learning_rate == preset.student.learning_rate
    )  # a section in the file leaves its other keys alone
    assert both.trajectories == preset.trajectories


def test_the_teacher_given_by_itself_wins_over_file_and_setting(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('teacher = "file"')
    assert load(file).teacher == "file"
    assert load(file, settings=["teacher=setting"]).teacher == "setting"
    assert load(file, settings=["teacher=setting"], teacher="own").teacher == "own"


def test_a_prompt_file_is_kept_as_an_absolute_path_and_a_hub_data_set_as_it_is(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert load(prompts="mine.csv").trajectories.prompts == str(tmp_path / "mine.csv")
    assert load(prompts=Path("mine.csv")).trajectories.prompts == str(tmp_path / "mine.csv")
    assert (
        load(prompts="hub:them/theirs@v2:train[:9]").trajectories.prompts
        == "hub:them/theirs@v2:train[:9]"
    )


def test_a_setting_is_toml_or_else_text():
    settings = [
        "trajectories.prompts=my prompts.txt",
        "student.targets=['to_q']",
        "training.huber_c=1e-2",
        "training.seed=-3",
    ]
    config = load(settings=settings)
    assert config.trajectories.prompts == str(Path("my prompts.txt").absolute())
    assert config.student.targets == ["to_q"]
    assert config.training.huber_c == 0.01
    assert config.training.seed == -3


@pytest.mark.parametrize(
    "table", [{}, {"trajectories": {"fine_steps": 250}}, ODD], ids=["defaults", "largest", "odd"]
)
def test_what_was_dumped_is_read_again(tmp_path, table):
    config = parse(table, "table")
    (tmp_path / "config.toml").write_text(dump(config), encoding="utf-8", newline="\n")
    assert read(tmp_path / "config.toml") == config
    assert set(flatten(tomllib.loads(dump(config)))) >= {
        key for key, value in flatten(config.model_dump()).items() if value
    }


# ---- what is refused


@pytest.mark.parametrize(
    ("setting", "key", "near"),
    [
        ("training.iteration=5", "training.iteration", "training.iterations"),
        ("iterations=5", "iterations", "training.iterations"),
        ("student.learning_rates=5", "student.learning_rates", "student.learning_rate"),
        ("traning.iterations=5", "traning.iterations", "training.iterations"),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest_known_one(setting, key, near):
    assert told(setting) == f"settings: unknown key '{key}'; did you mean '{near}'?"


def test_an_unknown_key_like_no_other():
    assert told("xyzzy=5") == "settings: unknown key 'xyzzy'"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.iterations", "many"),
        ("training.iterations", 0),
        ("training.relative_weight", "much"),
        ("training.relative_weight", -1),
        ("trajectories.slots", 0),
        ("trajectories.slots", 17),
        ("trajectories.guidance_scale", 0.5),
        ("trajectories.guidance_scale", float("inf")),
        ("trajectories.prompts", 2024),
        ("training.decay", 1.5),
        ("student.ema", 1),
        ("student.learning_rate", 0),
        ("critics.head_width", 6),
        ("precision", "float64"),
        ("training", 3),
    ],
)
def test_a_wrong_type_or_value_is_told_with_its_key(key, value):
    line = told(f"{key}={value}")
    assert line.startswith(f"settings: {key}: Input should be ")
    assert line.endswith(f"(given: {value!r})")


@pytest.mark.parametrize(
    "setting", ["trajectories.slots=true", "training.iterations='100'", "training.seed=1.0"]
)
def test_a_value_is_not_bent_into_another_type(setting):
    assert told(setting).startswith(
        f"settings: {setting.split('=')[0]}: Input should be a valid integer"
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["trajectories.fine_steps=251"],
            ["slots", "fine_steps", "1004 fine steps do not fit into 1000", "lower M to 250"],
        ),
        (["trajectories.delta=11"], ["delta must be from 1 to M = 10 fine steps, not 11"]),
        (
            ["trajectories.delta=10", "training.positions=relayed"],
            [
                "trajectories.delta must be less than fine_steps where training.positions = "
                "'relayed'"
            ],
        ),
        (
            ["training.positions=relayed", "training.relative_weight=[0, 0, 0, 0.1]"],
            [
                "training.relative_weight must be 0 where training.positions = 'relayed'",
                "'stored' or 'followed'",
            ],
        ),
        (
            ["critics.adversarial_weight=0.4", "critics.start=0.9", "critics.head_start=0.1"],
            [
                "critics.start and critics.head_start add up to 1 or more: the student would never "
                "hear of the critics"
            ],
        ),
        (
            ["training.relative_weight=[1, 1]"],
            ["training.relative_weight has 2 weights for N = 4 slots"],
        ),
        (
            ["training.absolute_weight=[1, 1, 1, 1, 1]"],
            ["training.absolute_weight has 5 weights for N = 4 slots"],
        ),
        (
            ["training.relative_weight=0", "training.absolute_weight=[0, 0, 0, 0]"],
            ["training.relative_weight and training.absolute_weight are both 0: nothing to learn"],
        ),
    ],
)
def test_settings_that_do_not_fit_together(settings, words):
    line = told("trajectories.slots=4", "trajectories.fine_steps=10", *settings)
    assert [word for word in words if word not in line] == []


def test_the_largest_grid_fits():
    table = {
        "trajectories": {"slots": 4, "fine_steps": 250, "delta": 250},
        "training": {"positions": "stored"},
    }
    assert parse(table, "table").grid().nudged(0) == -1


def test_a_setting_without_a_value():
    assert (
        told("training.iterations")
        == "--set 'training.iterations': write KEY=VALUE, for instance training.iterations=100"
    )


def test_a_missing_file(tmp_path):
    assert told(file=tmp_path / "none.toml") == f"there is no config file {tmp_path / 'none.toml'}"


@pytest.mark.parametrize(
    "content", [b"training: 3\n", b"\xff\xfe\x00", None], ids=["yaml", "binary", "folder"]
)
def test_a_file_that_is_no_toml(tmp_path, content):
    file = tmp_path / "mine.toml"
    file.mkdir() if content is None else file.write_bytes(content)
    assert told(file=file).startswith(f"{file} is not a TOML file: ")


def test_a_mistake_in_a_file_names_the_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[student]\nranks = 4\n")
    assert told(file=file) == f"{file}: unknown key 'student.ranks'; did you mean 'student.rank'?"


def test_an_unknown_preset():
    with pytest.raises(UserError) as caught:
        load(preset="huge")
    assert (
        str(caught.value)
        == f"there is no preset 'huge'; there are: {', '.join(configuration.presets())}"
    )


def test_names_of_files_are_kept_absolute(tmp_path, monkeypatch):
    """Those in a TOML file are relative to it, those of options and settings to where one stands; ~
    is the home folder."""
    (tmp_path / "here" / "model").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "run.toml"
    file.write_text(
        'teacher = "model"\nteacher_loras = ["a.safetensors:0.5"]\n[trajectories]\nprompts = '
        '"p.txt"\n'
    )
    config = load(file)
    assert config.teacher == str(tmp_path / "model")
    assert config.teacher_loras == [str(tmp_path / "a.safetensors:0.5")]
    assert config.trajectories.prompts == str(tmp_path / "p.txt")
    assert (
        load(teacher="model").teacher
        == load(settings=["teacher=model"]).teacher
        == str(tmp_path / "here" / "model")
    )
    assert load(teacher="~/model").teacher == str(tmp_path / "model")
    assert load(teacher="owner/name").teacher == "owner/name"


@pytest.mark.parametrize("name", ["teacher", "prompts"])
def test_an_unset_variable_is_no_name(name):
    with pytest.raises(UserError, match=f"--{name} is empty"):
        load(**{name: ""})


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Config().torch_device == "cpu"
    with pytest.raises(UserError) as caught:
        _ = Config(device="cuda").torch_device
    told = (
        "device = 'cuda' but torch sees no GPU; use 'cpu' or 'auto', or install torch for your GPU"
    )
    assert str(caught.value) == told


# ---- comparison


def test_differences_tell_both_values():
    stored = "training.positions=stored"
    old = load(settings=[stored, "training.relative_weight=1", "training.seed=0"])
    new = load(
        settings=[
            stored,
            "training.relative_weight=[1, 1, 1, 0]",
            "training.seed=5",
            "trajectories.batch_size=3",
        ]
    )
    assert differences(old, old) == []
    assert differences(old, new) == [
        "training.relative_weight: 1.0 -> [1.0, 1.0, 1.0, 0.0]",
        "training.seed: 0 -> 5",
    ]


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_exactly_these_keys_are_free():
    """Every key is changed in turn, valid or not."""
    old = Config()
    found = {}
    for *table, key in flatten(old.model_dump()):
        change = {key: "another"}
        new = old.model_copy(
            update={t: getattr(old, t).model_copy(update=change) for t in table} or change
        )
        found[".".join([*table, key])] = differences(old, new)
    assert [key for key, lines in found.items() if not lines] == FREE
    assert [
        (key, lines)
        for key, lines in found.items()
        if lines and [line.split(": ")[0] for line in lines] != [key]
    ] == []


@pytest.mark.parametrize(
    "section", [Config, *TABLES.values()], ids=lambda section: section.__name__
)
def test_every_setting_is_explained(section):
    """By the docstring under it; a table by its class's own."""
    assert section.__doc__
    keys = section.model_fields.keys() - (TABLES.keys() if section is Config else {})
    assert [key for key in keys if not section.model_fields[key].description] == []
