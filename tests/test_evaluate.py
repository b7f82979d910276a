"""Scores by published networks' stand-ins: small modules of the same interfaces, real files."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from conftest import changed, make_pipeline
from rapm.card import tell_scores
from rapm.cli import main
from rapm.config import Config
from rapm.errors import UserError
from rapm.evaluate.captions import (
    Captions,
    captions_beside,
    chosen,
    open_picture,
    read_captions,
)
from rapm.evaluate.drawing import Gallery, Model, Samplers
from rapm.evaluate.features import CLIP, INCEPTION, PICKSCORE, Inception, Reader, centre, resized
from rapm.evaluate.metrics import frechet_distance, pair_distances
from rapm.evaluate.protocols import Choices, open_task
from rapm.evaluate.rows import Row, Scores
from rapm.export import export_run
from rapm.io import sha256
from rapm.models.resolve import teacher_of
from rapm.network import STUDENT, TEACHER
from rapm.pictures import to_pictures
from rapm.pipeline import distill_run
from rapm.run import Run
from rapm.sample import open_sampler, teachers_sampler
from rapm.scores import evaluate_lora, evaluate_run, scores_of
from rapm.toy import TEACHER as TOY

FEATURES = 4


class StandIn(nn.Module):
    """What is asked of NVIDIA's file: ``layers`` gives features of [n, 3, 299, 299]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, FEATURES, 9, stride=20), nn.AdaptiveAvgPool2d(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def save_clip(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(TOY / "tokenizer")
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {"image_size": 32, "patch_size": 8}
    parts = {"text_config": small | text, "vision_config": small | vision}
    config = CLIPConfig(**parts, projection_dim=8, logit_scale_init_value=3.0)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side).save_pretrained(folder)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.jit.save(torch.jit.script(StandIn().eval()), folder / INCEPTION)
    save_clip(folder / CLIP, 1)
    save_clip(folder / PICKSCORE, 2)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of a small SDXL."""
    folder = tmp_path_factory.mktemp("sdxl")
    make_pipeline("sdxl").save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text("a red star\na blue ring\n")
    config = Config.model_validate(
        {
            "method": "midpoint",
            "teacher": str(folder / "teacher"),
            "trajectories": {"prompts": str(folder / "prompts.txt"), "count": 2, "slots": 2},
            "student": {"rank": 2, "learning_rate": 0.01},
            "training": {"iterations": 2, "warmup": 0},
            "samples": {"count": 0},
        }
    )
    opened = Run.open(folder / "run", config)
    assert distill_run(opened)
    return opened


def some_pictures(folder: Path, count: int, side: int = 32) -> list[Path]:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(count):
        values = rng.integers(0, 256, (side, side + k, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"COCO_val2014_{k:012d}.png")
    return sorted(folder.iterdir())


def coco(folder: Path, pictures: list[Path]) -> Path:
    """In the form of ``captions_val2014.json``: five captions a picture, in no order."""
    images = [{"id": 100 + k, "file_name": file.name} for k, file in enumerate(pictures)]
    annotations = [
        {"id": 5 * k + j, "image_id": 100 + k, "caption": f"A picture {k},\n caption {j}. "}
        for k in range(len(pictures))
        for j in (3, 0, 4, 1, 2)
    ]
    file = folder / "captions_val2014.json"
    file.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations[::-1]}))
    return file


# ---- pictures into networks


def test_resize_is_pillows_bicubic_in_float() -> None:
    """No rounding; what bicubic overshoots is cut; and it smooths before it thins."""
    picture = Image.fromarray(np.kron([[0, 255], [255, 0]], np.ones((40, 40))).astype(np.uint8))
    values = resized(picture.convert("RGB"), 30, 20)
    assert values.shape == (3, 20, 30)
    assert float(values.min()) == 0 and float(values.max()) == 255
    one = np.asarray(picture, np.float32)
    expected = np.asarray(Image.fromarray(one).resize((30, 20), Image.Resampling.BICUBIC))
    assert np.array_equal(values[1].numpy(), expected.clip(0, 255))
    assert not torch.equal(values, values.round())
    stripes = Image.fromarray(np.tile(np.uint8([0, 255]), (64, 32))).convert("RGB")
    assert float(resized(stripes, 8, 8).std()) < 10  # thinned without smoothing they stay black


def test_patches_are_the_centre() -> None:
    values = np.zeros((301, 400, 3), np.uint8)
    values[1:-1, 50:349] = 255
    patch = centre(Image.fromarray(values))
    assert patch is not None and patch.size == (299, 299)
    assert np.asarray(patch).min() == 255
    assert centre(Image.new("RGB", (400, 298))) is None


def test_inception_reads_what_its_file_says(weights: Path) -> None:
    pictures = [Image.new("RGB", (50, 40), (200, 10, 90)), Image.new("RGB", (299, 299))]
    inception = Inception(weights / INCEPTION, "cpu")
    values = torch.stack([resized(p, 299, 299) for p in pictures])
    expected = StandIn().layers((values - 128) / 128).flatten(1)
    assert torch.equal(inception(pictures), expected.detach())
    assert (inception.dimensions, inception.mark) == (FEATURES, sha256(weights / INCEPTION))


def test_text_fit_is_the_models_own_similarity(weights: Path) -> None:
    """transformers' ``logits_per_image`` is the cosine times the factor."""
    pictures = [Image.new("RGB", (50, 40), (200, 10, 90)), Image.new("RGB", (64, 64))]
    texts = ["a red star", "a blue ring on sand"]
    reader = Reader(weights, "cpu", prefix="a ")
    found = reader(pictures, texts)
    for name, prefix, factor in (("clip", "a ", 100), ("pickscore", "", np.exp(3.0))):
        model = CLIPModel.from_pretrained(weights / name)
        tokenizer = CLIPTokenizer.from_pretrained(weights / name)
        processor = CLIPImageProcessor.from_pretrained(weights / name)
        with torch.no_grad():
            logits = model(
                **processor(pictures, return_tensors="pt"),
                **tokenizer([prefix + t for t in texts], padding="max_length", return_tensors="pt"),
            ).logits_per_image
        expected = logits.diag() * factor / np.exp(3.0)
        torch.testing.assert_close(found[name], expected.float(), atol=1e-4, rtol=1e-4)
    assert reader.marks.keys() == {"inception", "clip", "pickscore"}
    assert Reader(weights, "cpu", prefix="b ").facts != reader.facts
    assert Reader(weights, "cpu", prefix="a ").facts == reader.facts
    assert "patches" not in found and found["features"].shape == (2, FEATURES)


def broken(name: str) -> Callable[[Path], None]:
    """What makes a folder of weights wrong in one way."""

    class Other(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images

    def absent(folder: Path) -> None:
        (folder / INCEPTION).unlink()

    def text(folder: Path) -> None:
        (folder / INCEPTION).write_text("version https://git-lfs.github.com/spec/v1\n")

    def other(folder: Path) -> None:
        torch.jit.save(torch.jit.script(Other()), folder / INCEPTION)

    def empty(folder: Path) -> None:
        (folder / CLIP / "model.safetensors").unlink()

    return {"absent": absent, "text": text, "other": other, "empty": empty}[name]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("absent", r"there is no .*inception-2015-12-05.pt; put it there: .* clean-fid uses"),
        ("text", r"inception-2015-12-05.pt is no TorchScript file"),
        ("other", r"inception-2015-12-05.pt is another network"),
        ("empty", r"clip holds no CLIP model"),
    ],
)
def test_wrong_weights_are_one_line(weights: Path, tmp_path: Path, name: str, line: str) -> None:
    folder = tmp_path / "weights"
    (folder / CLIP).mkdir(parents=True)
    for file in [weights / INCEPTION, *(weights / CLIP).iterdir()]:
        (folder / file.relative_to(weights)).write_bytes(file.read_bytes())
    broken(name)(folder)
    with pytest.raises(UserError, match=line) as caught:
        Reader(folder, "cpu")
    assert "\n" not in str(caught.value)


# ---- captions


def test_cocos_file_has_one_caption_a_picture(tmp_path: Path) -> None:
    pictures = some_pictures(tmp_path / "val2014", 3)
    found = read_captions(coco(tmp_path, pictures))
    assert sorted(found) == [
        (f"A picture {k}, caption 0.", file.name) for k, file in enumerate(pictures)
    ]


def test_karpathys_file_is_its_test_split(tmp_path: Path) -> None:
    images = [
        {"filename": f"{k}.jpg", "split": split, "sentences": [{"raw": f"text {k}"}, {"raw": "no"}]}
        for k, split in enumerate(("train", "test", "restval", "test"))
    ]
    file = tmp_path / "dataset_coco.json"
    file.write_text(json.dumps({"images": images, "dataset": "coco"}))
    assert read_captions(file) == [("text 1", "1.jpg"), ("text 3", "3.jpg")]


def test_other_lists(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa dog\n\n a cat \n")
    assert read_captions(tmp_path / "list.txt") == [("a dog", ""), ("a cat", "")]
    pictures = some_pictures(tmp_path / "pictures", 2)
    for k, picture in enumerate(pictures):
        picture.with_suffix(".txt").write_text(f"number {k}\n")
    expected: Captions = [(f"number {k}", picture.name) for k, picture in enumerate(pictures)]
    assert captions_beside(tmp_path / "pictures") == expected
    expected[0] = "number\u2028 0", expected[0][1]
    told = [{"file_name": name, "text": text} for text, name in expected]
    expected[0] = "number 0", expected[0][1]
    rows = [json.dumps(row, ensure_ascii=False) for row in told]
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(rows))
    pictures[0].with_suffix(".txt").unlink()
    assert captions_beside(tmp_path / "pictures") == expected


def test_the_choice_of_captions_is_always_the_same() -> None:
    captions: Captions = [(f"{k}", "") for k in range(100)]
    assert chosen(captions, 5) == chosen(captions, 50)[:5]
    assert sorted(chosen(captions, 100)) == sorted(captions)
    assert chosen(captions, 100) != captions
    with pytest.raises(UserError, match="--count 101: there are 100 captions"):
        chosen(captions, 101)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.json", "{", "holds no captions that can be read"),
        ("a.json", "[]", "holds no captions that can be read"),
        ("a.json", '{"images": []}', "holds no caption"),
        ("a.json", '{"images": [], "annotations": [{"id": 1, "image_id": 2}]}', "KeyError"),
        ("a.jsonl", '{"file_name": "a.png"}', "'text'"),
        ("a.txt", "\n \n", "holds no caption"),
        ("a.txt", None, "there is no file"),
        ("a.json", "[" * 100_000, "RecursionError"),
        ("a.jsonl", '{"file_name": ["a"], "text": "b"}', "no text"),
        ("a.jsonl", '{"file_name": "a", "text": " "}', "no text"),
        ("a.jsonl", '{"file_name": "a", "text": "\\ud83d"}', "no text"),
    ],
)
def test_captions_that_are_none(tmp_path: Path, name: str, content: str | None, line: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=line):
        read_captions(tmp_path / name)


def test_wrong_pictures_are_one_line(run: Run, weights: Path, tmp_path: Path) -> None:
    teacher, folder = teacher_of(run.config), tmp_path / "val2014"

    def asked(**choices: object) -> None:
        open_task(Choices("coco", **choices), teacher, ())  # type: ignore[arg-type]

    with pytest.raises(UserError, match="name their folder with --images"):
        asked()
    with pytest.raises(UserError, match="there is no folder of pictures"):
        asked(images=folder, captions=tmp_path)
    pictures = some_pictures(folder, 3)
    captions = coco(tmp_path, pictures)
    with pytest.raises(UserError, match="by --captions"):
        asked(images=folder)
    pictures[1].unlink()
    asked(images=folder, captions=captions)
    with pytest.raises(UserError, match=r"000000000001\.png of 'A picture 1.*' is not in"):
        asked(images=folder, captions=captions, reference="paired")
    with pytest.raises(UserError, match="has no caption"):
        open_task(Choices("images", images=folder), teacher, ())
    pictures[2].unlink()
    with pytest.raises(UserError, match="two captions and two pictures"):
        asked(images=folder, captions=captions)
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(pictures[0])
    with pytest.raises(UserError, match="more than 8 bits a channel"):
        open_picture(pictures[0])
    pictures[0].write_bytes(b"no picture")
    gallery = Gallery(Reader(weights, "cpu"), None, tmp_path / "cache")
    with pytest.raises(UserError, match="is no picture, or damaged"):
        gallery.of_files(pictures[:1])
    pictures[0].unlink()
    with pytest.raises(UserError, match="holds no picture"):
        asked(images=folder, captions=captions)


# ---- protocols


def test_protocol_teacher(run: Run, weights: Path, tmp_path: Path) -> None:
    """The student and the teacher's rows against the teacher's pictures from other seeds."""
    file = tmp_path / "captions.txt"
    texts = ["a red star", *(f"a blue ring {k}" for k in range(12))]
    file.write_text("\n".join(texts))
    choices = Choices("teacher", captions=file, count=12, many_steps=3)
    given = {"weights": weights, "cache": tmp_path / "cache"}
    lines = evaluate_run(run, choices, **given)
    scores = next(s for s in scores_of(run) if s.protocol["name"] == "teacher")
    assert [(r.model, r.steps, r.guidance_scale) for r in scores.rows] == [
        ("teacher", 3, 7.5),
        ("teacher", 8, 7.5),
        *(("teacher", 2, scale) for scale in (7.5, 5.0, 3.0, 2.0)),
        ("student", 2, 1.0),
    ]
    assert scores.protocol["count"] == 12  # without the prompt that the run has
    sampler, reader = open_sampler(run), Reader(weights, "cpu")
    told = [text for text, _ in chosen([(t, "") for t in texts[1:]], 12)]

    def features(adapter: str, steps: int, seed: int) -> Tensor:
        images = sampler.images(adapter, told, range(seed, seed + 12), steps)
        return reader(to_pictures(images))["features"]

    reference = features(TEACHER, 3, 2_000_000)
    own, other = features(STUDENT, 2, 1_000_000), features(STUDENT, 2, 2_000_000)
    student = scores.rows[-1].scores
    assert student["fid"].value == pytest.approx(frechet_distance(own, reference), rel=1e-4)
    apart = pair_distances(features(TEACHER, 3, 1_000_000), reference).mean()
    expected = float((pair_distances(own, other) / apart).mean())
    assert student["diversity"].value == pytest.approx(expected, rel=1e-4)
    assert scores.rows[0].scores["diversity"].value == pytest.approx(1)
    assert all(s.low < s.value < s.high for row in scores.rows for s in row.scores.values())
    assert lines[:-1] == scores.render()
    assert [line for line in lines if "Patch FID is left out" in line]

    # Nothing is drawn again, and what was stopped goes on: the same, with a part of the cache gone.
    parts = sorted(tmp_path.glob("cache/*"))
    before = {part: part.stat().st_mtime_ns for part in parts}
    parts[0].unlink()
    parts[1].write_bytes(parts[1].read_bytes()[:-9])
    text = (run.folder / "scores-teacher.json").read_text()
    (run.folder / "scores-teacher.json").unlink()
    assert evaluate_run(run, choices, **given) == lines
    assert (run.folder / "scores-teacher.json").read_text() == text
    again = {part: part.stat().st_mtime_ns for part in parts}
    assert {part for part in parts if before[part] != again[part]} == {*parts[:2]}


def test_protocol_coco(run: Run, weights: Path, tmp_path: Path) -> None:
    """With few pictures FID is left out, KID is not; what others reported is theirs."""
    pictures = some_pictures(tmp_path / "val2014", FEATURES)
    captions = coco(tmp_path, pictures)
    choices = Choices("coco", captions, tmp_path / "val2014", prefix="a photo of ", resize=24)
    lines = evaluate_run(run, choices, weights=weights, cache=tmp_path / "cache")
    (scores,) = (s for s in scores_of(run) if s.protocol["name"] == "coco")
    assert [row.model for row in scores.rows] == ["student"]
    assert {*scores.rows[0].scores} == {"kid", "clip", "pickscore"}
    expected = {"name": "coco", "count": 4, "resize": 24, "reference": "all", "references": 4}
    expected |= {"clip_prefix": "a photo of ", "captions": "captions_val2014.json"}
    assert expected.items() <= scores.protocol.items()
    assert scores.protocol["inception_sha256"] == sha256(weights / INCEPTION)[:12]
    assert [line for line in lines if "FID is left out: with 4 features it takes more" in line]
    (reported,) = (line for line in lines if line.startswith("Reported by their authors, and not"))
    assert "RAPM 19.21 / 30.50" in reported


def test_protocol_images_of_a_lora(run: Run, weights: Path, tmp_path: Path) -> None:
    """A LoRA's file is drawn at strength 1.0, as the run's own student, in each form."""
    pictures = some_pictures(tmp_path / "pictures", 12)
    for k, picture in enumerate(pictures):
        picture.with_suffix(".txt").write_text(f"a blue ring {k}")
    choices = Choices("images", images=tmp_path / "pictures", reference="paired")
    given = {"weights": weights, "cache": tmp_path / "cache"}
    evaluate_run(run, choices, **given)
    (own,) = (s for s in scores_of(run) if s.protocol["name"] == "images")
    exported = run.export / "pytorch_lora_weights.safetensors"
    pickled = tmp_path / "theirs.pt"
    tensors = load_file(exported)
    peft = {
        "base_model.model." + re.sub(r"^unet\.(.*)\.weight$", r"\1.default.weight", name): value
        for name, value in tensors.items()
    }
    torch.save({"state_dict": peft}, pickled)
    kohya = next(file for file in run.export.glob("*-steps.safetensors"))
    config = Config.model_validate({"teacher": run.config.teacher})
    for file in (exported, kohya, pickled):
        out = tmp_path / f"{file.stem}.json"
        evaluate_lora(file, config, choices, file=out, steps=2, **given)
        found = Scores.load(out, {"checkpoint": sha256(file)})
        assert found and found.protocol == own.protocol
        assert found.rows[0].model == file.stem
        for name, score in own.rows[0].scores.items():
            assert found.rows[0].scores[name].value == pytest.approx(score.value, rel=1e-3)
    before = own.rows[0].scores

    def again(**other: Any) -> Row:
        evaluate_lora(exported, other.pop("config", config), choices, file=out, **given, **other)
        found = Scores.load(out, {})
        assert found
        return found.rows[0]

    assert again(steps=2, scheduler="lcm").model == "pytorch_lora_weights, lcm"
    negative = changed(config, trajectories={"negative_prompt": "ugly"})
    guided = again(steps=2, guidance_scale=3.0).scores
    ugly = again(steps=2, guidance_scale=3.0, config=negative).scores
    for scores in (again(steps=2, scheduler="lcm").scores, again(steps=1).scores, guided):
        assert scores["kid"] != before["kid"]
    assert ugly["kid"] != guided["kid"]
    assert again(steps=2).scores["kid"].value == pytest.approx(before["kid"].value, rel=1e-3)
    Image.new("RGB", (40, 40)).save(pictures[3])  # other real pictures, as many as before
    assert again(steps=2).scores["kid"].value != pytest.approx(before["kid"].value, rel=1e-3)
    with pytest.raises(UserError, match="scores are JSON, and replace nothing but scores"):
        evaluate_lora(exported, config, choices, file=exported, **given)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match="scores are JSON, and replace nothing but scores"):
        evaluate_lora(exported, config, choices, file=tmp_path / "a.json", **given)
    # Nothing but tensors is built of a pickle.
    torch.save({"a": Path("a")}, pickled)
    with pytest.raises(UserError, match="holds no plain tensors"):
        evaluate_lora(pickled, config, choices, file=out, **given)
    torch.save({"a": [1]}, pickled)
    with pytest.raises(UserError, match="something else than tensors"):
        evaluate_lora(pickled, config, choices, file=out, **given)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("RUN", "--weights DIR is missing, a folder of networks that read pictures: inception-"),
        ("RUN --weights none", "there is no folder none; it takes inception-2015-12-05.pt"),
        ("RUN --images a", "--images is not read by protocol teacher"),
        ("RUN --check", "--check is not read by protocol teacher"),
        ("RUN --protocol toy", "protocol toy is the toy teacher's"),
        ("RUN --protocol toy --count 5", "--count is not read by protocol toy"),
        ("RUN --teacher toy", "has its own settings; --teacher goes with a LoRA's file"),
        ("RUN --out a.json", "--out goes with a LoRA's file"),
        ("LORA --protocol toy", "protocol toy scores runs of the toy teacher, not LoRA files"),
        ("none", "none holds no run"),
        ("none.safetensors --teacher toy", "there is no LoRA file none.safetensors"),
        ("LORA --prompts a.txt", "--prompts is not read here: a LoRA is made already"),
        ("RUN --protocol coco --many-steps 3", "--many-steps are the teacher's"),
    ],
)
def test_a_mistake_is_one_line(
    run: Run,
    arguments: str,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"RUN": run.folder, "LORA": run.export / "pytorch_lora_weights.safetensors"}
    given = [str(places.get(word, word)) for word in arguments.split()]
    monkeypatch.setattr(sys, "argv", ["rapm", "evaluate", *given])
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1)
    assert line in err
    assert list(tmp_path.iterdir()) == []


def test_scores_come_into_page_and_card(
    run: Run, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command; what a user wrote into the card stays."""
    (tmp_path / "list.txt").write_text("\n".join(f"a blue ring {k}" for k in range(6)))
    card = run.export / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    places = {"weights": weights, "cache": tmp_path / "cache"}
    given = f"evaluate {run.folder} --weights {weights} --captions {tmp_path / 'list.txt'}"
    given += f" --many-steps 2 --cache {tmp_path / 'cache'}"
    monkeypatch.setattr(sys, "argv", ["rapm", *given.split()])
    for _ in range(2):
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 0
    (scores,) = (s for s in scores_of(run) if s.protocol["name"] == "teacher")
    student = scores.cells()[1][-1]
    text, page = card.read_text(), run.page.read_text()
    assert text.count("## Scores") == 1 and text.endswith("\nMy own words.\n")
    assert f"| {' | '.join(student)} |" in text
    assert all(f"<td>{cell}</td>" in page for cell in student)
    assert scores.described() in text
    assert f"{scores.protocol['inception_sha256']}" in page
    export_run(run)  # anew: with the scores of its checkpoint
    assert f"| {' | '.join(student)} |" in card.read_text()
    # A newer checkpoint's scores are not the exported LoRA's.
    _, tensors = run.load_checkpoint()
    run.save_checkpoint(3, tensors)
    try:
        text = card.read_text()
        evaluate_run(
            run, Choices("teacher", captions=tmp_path / "list.txt", many_steps=1), **places
        )
        tell_scores(run)
        assert card.read_text() == text
    finally:
        (run.checkpoints / "step-00000003.safetensors").unlink()


def test_one_network_is_held_at_a_time(run: Run, tmp_path: Path, weights: Path) -> None:
    made: list[str] = []
    teacher = teacher_of(run.config)

    def maker(name: str) -> Callable[[], object]:
        return lambda: made.append(name) or teachers_sampler(teacher, run.config)

    samplers = Samplers({"a": maker("a"), "b": maker("b")})  # type: ignore[dict-item]
    assert samplers["a"] is samplers["a"]
    assert samplers["b"] is samplers["b"]
    assert made == ["a", "b"]
    facts = {"size": ""}
    model = Model("teacher", "a", TEACHER, 1, 1.0, facts)
    gallery = Gallery(Reader(weights, "cpu"), None, tmp_path)
    some, others = ["a", "b"], ["a", "c"]
    found = gallery.of_model(model, samplers, some, 5)
    assert len(list(tmp_path.iterdir())) == 1
    for changed_model in (replace(model, steps=2), replace(model, facts={"size": "1"})):
        gallery.of_model(changed_model, samplers, some, 5)
    gallery.of_model(model, samplers, others, 5)
    gallery.of_model(model, samplers, some, 6)
    assert len(list(tmp_path.iterdir())) == 5
    assert torch.equal(gallery.of_model(model, samplers, some, 5)["features"], found["features"])
