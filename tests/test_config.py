"""Settings: where they come from, what is refused and in which words."""

import tomllib
from pathlib import Path

import pytest
import torch

from conftest import changed
from rapm import presets as presets_file
from rapm import settings
from rapm.config import Config, Section, keys, unread
from rapm.errors import UserError
from rapm.settings import differences, dump, flatten, load, parse, presets, read_run

TABLES = {key: type(value) for key, value in Config() if isinstance(value, Section)}
METHODS = ("rapm", "midpoint")
FREE_TO_COMBINE = [name for name in presets() if not name.endswith("-paper")]
FREE = [
    "device",
    "trajectories.batch_size",
    "training.slot_batch",
    "training.gradient_checkpointing",
    "training.compile",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "samples.every",
    "samples.count",
    "evaluate.every",
]
ODD = {
    "teacher": 'C:\\models\\"mine"',
    "trajectories": {
        "size": "512x768,512x512",
        "negative_prompt": "blurry, 低品質\n'''",
        "guidance_scale": 1,
    },
    "student": {"targets": ["to_q", "ff.net.2"], "learning_rate": 1e-7},
    "rapm": {"absolute_weight": [0, 1, 2.5, 0.1], "relative": False},
}
ODD_MIDPOINT = {
    "method": "midpoint",
    "teacher_loras": ["a.safetensors:0.5"],
    "midpoint": {"weight": [4, 1, 0, 0.1]},
}


def told(*given, file=None, **options):
    """The one line that these settings are refused with."""
    with pytest.raises(UserError) as caught:
        load(file, settings=given, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(name):
    """What a shipped file says, its keys joined by dots."""
    file = settings.CONFIGS / f"{name}.toml"
    return flatten(tomllib.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def nested(flat):
    table = {}
    for key, value in flat.items():
        *section, name = key.split(".")
        (table.setdefault(section[0], {}) if section else table)[name] = value
    return table


# ---- where from


def test_the_defaults_are_the_papers():
    loaded = flatten(load(teacher="models/sd15").model_dump())
    expected = {
        "method": "rapm",
        "trajectories.slots": 4,
        "trajectories.fine_steps": 25,
        "trajectories.count": 1000,
        "rapm.delta": 1,
        "rapm.relative": True,
        "rapm.absolute_weight": 1.0,
        "rapm.detach_relative": True,
        "rapm.detach_slots": True,
        "training.iterations": 20_000,
        "training.batch_size": 1,
        "training.huber_c": 1e-3,
        "training.decay": 0.0,
        "discriminators.adversarial_weight": 0.1,
        "discriminators.weighting": "fixed",
        "discriminators.loss": "hinge",
        "discriminators.noise": "independent",
        "discriminators.schedule": "alternate",
        "student.ema": 0.0,
    }
    assert {key: loaded[key] for key in expected} == expected
    assert load(teacher="models/sd15") == Config(teacher="models/sd15")


def test_the_toy_teacher_takes_the_toy_preset():
    assert load() == load(teacher="toy") == load(preset="toy")
    assert load() != Config()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FREE_TO_COMBINE)
def test_a_preset_goes_with_either_method(name, method):
    """Later files win: the method's, the preset's, the preset's for this method."""
    files = (f"methods/{method}", f"presets/{name}", f"presets/{name}.{method}")
    expected = {"method": method}
    for file in files:
        expected |= written(file)
    config = load(preset=name, method=method)
    loaded = flatten(config.model_dump())
    assert {key: loaded[key] for key in expected} == expected
    assert config == parse(nested(expected), "again")  # the rest is left at its defaults
    assert "method" not in written(f"presets/{name}")


@pytest.mark.parametrize("name", [name for name in presets() if name not in FREE_TO_COMBINE])
def test_a_papers_preset_is_of_its_method_alone(name, tmp_path):
    loaded = flatten(load(preset=name).model_dump())
    assert {key: loaded[key] for key in written(f"presets/{name}")} == written(f"presets/{name}")
    assert load(preset=name) == load(preset=name, method="rapm")
    line = f"preset '{name}' is of method 'rapm', not 'midpoint'"
    file = tmp_path / "mine.toml"
    file.write_text('method = "midpoint"\n')
    assert told(preset=name, method="midpoint") == line
    assert told("method=midpoint", preset=name) == line
    assert told(file=file, preset=name) == line
    assert load(file, preset=name, method="rapm").method == "rapm"


def test_a_presets_file_for_one_method_is_for_that_one_alone():
    rapm, midpoint = written("presets/toy.rapm"), written("presets/toy.midpoint")
    assert rapm["trajectories.count"] == 64 and midpoint["midpoint.weight"] == [4, 1, 1, 1]
    assert load(method="midpoint").trajectories.count == 4000
    assert load(method="midpoint").midpoint.weight == [4, 1, 1, 1]
    assert load(method="rapm").trajectories.count == 64
    assert load(method="rapm").midpoint.weight == 1.0
    assert load(preset="sdxl-12gb", method="midpoint").midpoint.weight == 1.0


@pytest.mark.parametrize("preset", ["toy", "sdxl-12gb"])
def test_a_method_brings_what_suits_it_however_it_is_named(tmp_path, preset):
    file = tmp_path / "mine.toml"
    file.write_text('method = "midpoint"\n')
    asked = load(preset=preset, method="midpoint")
    assert asked.student.ema == 0.99 and asked.training.decay == 0.6
    assert load(file, preset=preset) == load(preset=preset, settings=["method=midpoint"]) == asked
    assert load(file, preset=preset, method="rapm") == load(preset=preset)
    assert load(preset=preset, method="midpoint", settings=["student.ema=0.5"]).student.ema == 0.5


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
    # A section in the file leaves its other keys alone.
    assert both.student.learning_rate == preset.student.learning_rate
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
    hub = "hub:them/theirs@v2:train[:9]"
    assert load(prompts=hub).trajectories.prompts == hub


def test_a_setting_is_toml_or_else_text():
    config = load(
        settings=[
            "trajectories.prompts=my prompts.txt",
            "student.targets=['to_q']",
            "training.huber_c=1e-2",
            "training.seed=-3",
        ]
    )
    assert config.trajectories.prompts == str(Path("my prompts.txt").absolute())
    assert config.student.targets == ["to_q"]
    assert config.training.huber_c == 0.01
    assert config.training.seed == -3


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"trajectories": {"fine_steps": 250}},
        ODD,
        {"method": "midpoint"},
        ODD_MIDPOINT,
        load(method="midpoint").model_dump(exclude={"rapm", "discriminators", "trajectories"}),
    ],
    ids=["defaults", "largest", "odd", "midpoint", "odd midpoint", "toy midpoint"],
)
def test_what_was_dumped_is_read_again(table):
    config = parse(table, "table")
    assert read_run(dump(config), "again") == config
    dumped = flatten(tomllib.loads(dump(config)))
    assert dumped.keys() == set(keys(Config)) - unread(config.method).keys()
    assert dumped == {key: flatten(config.model_dump())[key] for key in dumped}


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


def test_every_key_is_read_by_a_method():
    everything = set(keys(Config))
    assert unread("rapm") == {"midpoint.weight": "midpoint"}
    own = {key for key in everything if key.startswith(("rapm.", "discriminators."))}
    rollout = {"trajectories.fine_steps", "trajectories.shard_size"}
    assert unread("midpoint") == dict.fromkeys(own | rollout, "rapm")
    assert len(own) == 14


@pytest.mark.parametrize(
    ("method", "setting", "reader"),
    [
        ("midpoint", "rapm.delta=1", "rapm"),
        ("midpoint", "rapm.relative=true", "rapm"),
        ("midpoint", "discriminators.rank=8", "rapm"),
        ("midpoint", "discriminators.adversarial_weight=0", "rapm"),
        ("midpoint", "trajectories.fine_steps=25", "rapm"),
        ("midpoint", "trajectories.shard_size=20", "rapm"),
        ("rapm", "midpoint.weight=1.0", "midpoint"),
    ],
)
def test_a_key_that_the_method_does_not_read_is_refused(
    tmp_path, monkeypatch, method, setting, reader
):
    """Also where its value is the default; by a setting, a file and a preset."""
    key, value = setting.split("=")
    line = f"{key} is not read by method '{method}'; method '{reader}' reads it"
    assert told(setting, method=method) == f"settings: {line}"
    assert load(settings=[setting], method=reader).method == reader
    section, name = key.split(".")
    file = tmp_path / "mine.toml"
    file.write_text(f"[{section}]\n{name} = {value}\n")
    assert told(file=file, method=method) == f"{file}: {line}"
    for module in (settings, presets_file):
        monkeypatch.setattr(module, "CONFIGS", tmp_path)
    (tmp_path / "presets").mkdir()
    file.rename(tmp_path / "presets" / "mine.toml")
    assert told(preset="mine", method=method, teacher="owner/name") == f"settings: {line}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.iterations", "many"),
        ("training.iterations", 0),
        ("rapm.absolute_weight", "much"),
        ("rapm.absolute_weight", -1),
        ("rapm.relative", 0.5),
        ("rapm.delta", 0),
        ("trajectories.slots", 0),
        ("trajectories.slots", 17),
        ("trajectories.guidance_scale", 0.5),
        ("trajectories.guidance_scale", float("inf")),
        ("trajectories.prompts", [2024]),
        ("training.decay", 1.5),
        ("student.ema", 1),
        ("student.learning_rate", 0),
        ("discriminators.head_width", 6),
        ("discriminators.adversarial_weight", -0.1),
        ("samples.count", 65),
        ("samples.every", -1),
        ("precision", "float64"),
        ("base_precision", "fp8"),
        ("training.seed", 2**63),
        ("training.seed", -(2**63) - 1),
        ("trajectories.seed", 10**30),
        ("trajectories.count", 10**9 + 1),
        ("training.iterations", 2**64),
        ("training.warmup", 10**10),
        ("training.batch_size", 4097),
        ("training.slot_batch", 10**20),
        ("trajectories.batch_size", 10**20),
        ("student.rank", 10**12),
        ("discriminators.rank", 4097),
        ("discriminators.head_width", 8192),
        ("samples.every", 2**64),
    ],
)
def test_a_wrong_type_or_value_is_told_with_its_key(key, value):
    line = told(f"{key}={value}")
    assert line.startswith(f"settings: {key}: Input should be ")
    assert line.endswith(f"(given: {value!r})")


def test_a_value_of_a_section_drops_nothing_of_it(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[trajectories]\ncount = 3\n")
    for key, value in (("trajectories", "5"), ("training", "[]"), ("rapm", "true")):
        line = f"{key} is a section: write {key}.KEY=VALUE (given: "
        assert told(f"{key}={value}", file=file).startswith(f"{file} and settings: {line}")
        assert told(f"{key}={value}").startswith(f"settings: {line}")
    assert load(file, settings=["trajectories={seed=5}"]).trajectories.count == 3
    file.write_text("trajectories = 5\n")
    assert told(file=file) == (
        f"{file}: trajectories is a section: write trajectories.KEY=VALUE (given: 5)"
    )


@pytest.mark.parametrize("key", ["trajectories.negative_prompt", "trajectories.prompts", "teacher"])
def test_a_number_that_is_meant_as_text(key):
    assert told(f"{key}=2024") == (
        f"settings: {key}: Input should be a valid string (given: 2024); text needs quotes of its "
        f"own: '{key}=\"2024\"'"
    )
    assert flatten(load(settings=[f'{key}="hub:a/2024"']).model_dump())[key] == "hub:a/2024"


@pytest.mark.parametrize("size", ["16392x8", "8x99999999999999999999", "512x512,8x16385"])
def test_an_absurd_size(size):
    assert "no side may have more than 16384 pixels" in told(f"trajectories.size='{size}'")
    assert load(settings=["trajectories.size='16384x16384'"])


def test_what_is_too_deep_or_too_long(tmp_path):
    deep, dotted, long = (
        f"a = {'[' * 9_999}",
        f"{'a.' * 5_000}b = 1",
        f"[training]\nseed = 1{'0' * 9_999}",
    )
    lines = ["tables are nested too deeply", "tables are nested too deeply", "is not a TOML file"]
    for text, line in zip((deep, dotted, long), lines, strict=True):
        file = tmp_path / "mine.toml"
        file.write_text(text)
        for said in (
            told(file=file),
            told(text.replace("[training]\n", "training.").replace(" ", "")),
        ):
            assert len(said) < 500
            assert "\n" not in said
        assert line in told(file=file)
        with pytest.raises(UserError, match=line):
            read_run(f"method = 'rapm'\n{text}", "config.toml")
    assert load(settings=["student.learning_rate=1"]).student.learning_rate == 1.0
    assert "learning_rate: Input should be" in told("student.learning_rate=1" + "0" * 400)


@pytest.mark.parametrize(
    "setting", ["trajectories.slots=true", "training.iterations='100'", "training.seed=1.0"]
)
def test_a_value_is_not_bent_into_another_type(setting):
    key = setting.split("=")[0]
    assert told(setting).startswith(f"settings: {key}: Input should be a valid integer")


@pytest.mark.parametrize("value", ["dmd2", "3", "['rapm']", "true"])
def test_an_unknown_method(value):
    line = told(f"method={value}")
    assert line.startswith("there is no method '") and line.endswith("; there are: rapm, midpoint")
    assert told(method="dmd2") == "there is no method 'dmd2'; there are: rapm, midpoint"
    with pytest.raises(UserError, match="table: method: Input should be 'rapm' or 'midpoint'"):
        parse({"method": "dmd2"}, "table")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            ["trajectories.fine_steps=251"],
            ["slots", "fine_steps", "1004 fine steps do not fit into 1000", "lower M to 250"],
        ),
        (["rapm.delta=11"], ["delta must be from 1 to M = 10 fine steps, not 11"]),
        (["rapm.absolute_weight=[1, 1]"], ["rapm.absolute_weight has 2 weights for N = 4 slots"]),
        (
            ["rapm.absolute_weight=[1, 1, 1, 1, 1]"],
            ["rapm.absolute_weight has 5 weights for N = 4 slots"],
        ),
        (
            ["rapm.relative=false", "rapm.absolute_weight=[0, 0, 0, 0]"],
            ["rapm.absolute_weight is 0: nothing to learn"],
        ),
        (["rapm.relative=false", "rapm.absolute_weight=0"], ["nothing to learn"]),
    ],
)
def test_settings_that_do_not_fit_together(given, words):
    line = told("trajectories.slots=4", "trajectories.fine_steps=10", *given)
    assert [word for word in words if word not in line] == []


def test_midpoints_settings_that_do_not_fit_together():
    line = "settings: midpoint.weight has 2 weights for N = 4 slots"
    assert told("midpoint.weight=[1, 1]", method="midpoint") == line
    for weights in ("0", "[0, 0, 0, 0]"):
        line = told(f"midpoint.weight={weights}", method="midpoint")
        assert line == "settings: midpoint.weight is 0: nothing to learn"


def test_one_loss_is_enough():
    assert load(settings=["rapm.absolute_weight=0"]).slot_weights(0.0) == [0.0] * 4
    only_last = load(settings=["rapm.relative=false", "rapm.absolute_weight=[0, 0, 0, 2]"])
    assert only_last.slot_weights(only_last.rapm.absolute_weight) == [0, 0, 0, 2]


def test_the_largest_grid_fits():
    table = {"trajectories": {"slots": 4, "fine_steps": 250}, "rapm": {"delta": 250}}
    assert parse(table, "table").grid().intermediate(0) == -1


def test_midpoints_fine_steps_halve_a_slot():
    grid = load(method="midpoint").grid()
    assert grid.fine == [999, 874, 749, 624, 499, 374, 249, 124, -1]
    assert [grid.intermediate(n) for n in range(4)] == [124, 374, 624, 874]


def test_a_setting_without_a_value():
    line = "--set 'training.iterations': write KEY=VALUE, for instance training.iterations=100"
    assert told("training.iterations") == line


def test_a_missing_file(tmp_path):
    assert told(file=tmp_path / "none.toml") == f"there is no config file {tmp_path / 'none.toml'}"


@pytest.mark.parametrize(
    "content", [b"training: 3\n", b"\xff\xfe\x00", None], ids=["yaml", "binary", "folder"]
)
def test_a_file_that_is_no_toml(tmp_path, content):
    file = tmp_path / "mine.toml"
    file.mkdir() if content is None else file.write_bytes(content)
    expected = f"{file} is no file" if content is None else f"{file} is not a TOML file: "
    assert told(file=file).startswith(expected)


def test_a_mistake_in_a_file_names_the_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[student]\nranks = 4\n")
    assert told(file=file) == f"{file}: unknown key 'student.ranks'; did you mean 'student.rank'?"


@pytest.mark.parametrize("name", ["huge", "toy.rapm", "../methods/midpoint"])
def test_an_unknown_preset(name):
    assert told(preset=name) == f"there is no preset '{name}'; there are: {', '.join(presets())}"
    assert "toy.rapm" not in presets()


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
    here = str(tmp_path / "here" / "model")
    assert load(teacher="model").teacher == load(settings=["teacher=model"]).teacher == here
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


# ---- a run's own


def test_a_run_of_an_older_version_is_told():
    line = (
        "config.toml names no method: the run was made by an older rapm, and this one cannot go on "
        "with it; nothing in it was changed: choose another folder"
    )
    for text in ('teacher = "toy"\n[critics]\nrank = 8\n', ""):
        with pytest.raises(UserError) as caught:
            read_run(text, "config.toml")
        assert str(caught.value) == line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("teacher = ", "config.toml is not a TOML file: "),
        ('method = "rapm"\n[critics]\nrank = 8\n', "config.toml: unknown key 'critics.rank'"),
        ('method = "other"\n', "config.toml: method: Input should be 'rapm' or 'midpoint'"),
        (
            'method = "midpoint"\n[rapm]\ndelta = 1\n',
            "config.toml: rapm.delta is not read by method 'midpoint'; method 'rapm' reads it",
        ),
    ],
)
def test_a_runs_damaged_settings_are_told(text, line):
    with pytest.raises(UserError) as caught:
        read_run(text, "config.toml")
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


# ---- comparison


def test_differences_tell_both_values():
    old = load(settings=["rapm.absolute_weight=1", "training.seed=0"])
    new = load(
        settings=[
            "rapm.absolute_weight=[1, 1, 1, 0]",
            "training.seed=5",
            "trajectories.batch_size=3",
        ]
    )
    assert differences(old, old) == []
    assert differences(old, new) == [
        "rapm.absolute_weight: 1.0 -> [1.0, 1.0, 1.0, 0.0]",
        "training.seed: 0 -> 5",
    ]


def test_another_method_is_the_one_difference():
    rapm, midpoint = load(method="rapm"), load(method="midpoint")
    assert differences(rapm, midpoint) == ["method: 'rapm' -> 'midpoint'"]
    assert differences(midpoint, rapm) == ["method: 'midpoint' -> 'rapm'"]


def test_teacher_and_prompts_may_have_moved():
    old = load(teacher="a/b", prompts="p.txt")
    new = load(teacher="c/d", prompts="q.txt", settings=["training.seed=5"])
    moved = changed(new, training={"seed": 5})
    assert [line.split(":")[0] for line in differences(old, moved)] == [
        "teacher",
        "trajectories.prompts",
        "training.seed",
    ]
    assert differences(old, moved, may_have_moved=True) == ["training.seed: 0 -> 5"]


def test_more_iterations_go_on_where_no_rate_falls_to_an_end():
    few, more = (changed(Config(), training={"iterations": n}) for n in (4000, 6000))
    assert differences(few, more) == []
    assert differences(more, few) == ["training.iterations: 6000 -> 4000"]
    few, more = (changed(config, training={"decay": 0.25}) for config in (few, more))
    assert differences(few, more) == [
        "training.iterations: 4000 -> 6000, and training.decay = 0.25 has made all learning rates "
        "fall towards the earlier end"
    ]


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            "training.iterations=5\nstudent.rank=64",
            "training.iterations: Input should be a",
        ),
        ("trajectories.size=0x0", "write WIDTHxHEIGHT in pixels"),
        ("trajectories.negative_prompt=a\udcff", "trajectories.negative_prompt is not UTF-8 text"),
        ("trajectories.count=1000000000", "less than or equal to 10000000"),
    ],
)
def test_settings_that_would_be_taken_for_others(given, told):
    with pytest.raises(UserError) as caught:
        load(settings=[given])
    assert told in str(caught.value)


def test_exactly_these_keys_are_free():
    """Every key is changed in turn, valid or not."""
    old = Config()
    found = {}
    for key in flatten(old.model_dump()):
        *table, name = key.split(".")
        change = {name: 1 if key == "training.iterations" else "another"}
        update = {t: getattr(old, t).model_copy(update=change) for t in table} or change
        found[key] = differences(old, old.model_copy(update=update))
    assert list(found) == list(keys(Config))
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
    own = section.model_fields.keys() - (TABLES.keys() if section is Config else {})
    assert [key for key in own if not section.model_fields[key].description] == []
