"""Builds the toy data set from nothing: ``python tools/toy/build.py --out DIR``.

The stages render the pools of scenes, train the oracle, the VAE, the text encoder and the UNet, and
write the StableDiffusionPipeline folder and the oracle. A stage that was stopped goes on, and one
whose result is there is skipped. score.py measures the result. The recipe below made the shipped
weights; docs/toy.md has its times and figures.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fit import Stage, fit
from rapm.doctor import cpu_has_bfloat16
from rapm.io import (
    complete_or_absent,
    files_together,
    load_tensors,
    save_tensors,
    write_json,
    write_text,
)
from rapm.toy import GUIDANCE_SCALE
from rapm.toy.oracle import DAMAGES, MAX_COUNT, Oracle
from rapm.toy.scenes import GROUNDS, KINDS, draw_scene, parse_caption, render_many, scene

MAX_TOKENS = 24
WIDTH = 96  # of the text encoder

SEED = 20260
SCENES = 80_000
ORACLE_SCENES = 40_000
RECIPE = {
    "oracle": Stage(updates=2_500, batch=48, rate=1.5e-3),
    "vae": Stage(updates=3_600, batch=8, rate=1.5e-3),
    "text": Stage(updates=900, batch=64, rate=1.5e-3),
}
UNET_ROUNDS = {
    "unet": Stage(updates=12_000, batch=32, rate=7e-4),
    "refine": Stage(updates=4_200, batch=32, rate=5e-4),
    "finish": Stage(updates=3_700, batch=32, rate=5e-4),
    "polish": Stage(updates=8_000, batch=32, rate=5e-4),
}


def _fit(
    name: str,
    stage: Stage,
    model: nn.Module,
    loss_of: Callable[[torch.Generator], Tensor],
    folder: Path,
) -> None:
    fit(name, stage, SEED, model, loss_of, folder / f"{name}.state.safetensors")


def _save(model: AutoencoderKL | CLIPTextModel | UNet2DConditionModel, target: Path) -> None:
    with files_together(target) as folder:
        model.cpu().save_pretrained(folder)


def _half(device: str) -> torch.autocast:
    """bfloat16 where that is fast."""
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or cpu_has_bfloat16())


def _pick(generator: torch.Generator, count: int, size: int) -> Tensor:
    return torch.randint(count, (size,), generator=generator)


def _normal(generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device)


# ---- the pools


def _caption_scene(index: int) -> tuple[np.ndarray, str]:
    drawn = scene(SEED, index, "train")
    return render_many([drawn])[0], drawn.caption


def _oracle_scene(index: int) -> tuple[np.ndarray, list[int]]:
    """None to four objects, alike ones too, so that the oracle cannot guess from what is usual."""
    rng = np.random.default_rng((SEED + 1, index))
    drawn = draw_scene(
        rng, count_weights=(0.05, 0.25, 0.3, 0.28, 0.12), distinct=rng.random() < 0.8
    )
    return render_many([drawn])[0], [
        GROUNDS.index(drawn.ground),
        *(thing.kind for thing in drawn.things),
    ]


def _pool(
    name: str, draw: Callable[[int], tuple[np.ndarray, object]], count: int, folder: Path
) -> tuple[np.ndarray, list]:
    images_file, labels_file = folder / f"{name}.npy", folder / f"{name}.json"
    if not labels_file.exists():
        print(f"rendering {count} scenes ({name})", flush=True)
        with ProcessPoolExecutor() as pool:
            images, labels = zip(*pool.map(draw, range(count), chunksize=500), strict=True)
        with complete_or_absent(images_file) as temporary, temporary.open("wb") as file:
            np.save(file, np.stack(images))
        write_json(labels_file, labels)
    return np.load(images_file, mmap_mode="r"), json.loads(labels_file.read_text())


def to_tensor(images: np.ndarray, device: str = "cpu") -> Tensor:
    """uint8 [n, H, W, 3] to float [n, 3, H, W] in [-1, 1]."""
    return (
        torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float()
        / 127.5
        - 1
    )


# ---- the oracle


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of each image by its own sigma [n], in pixels; 0 leaves an image as it is."""
    n, channels, height, width = images.shape
    offsets = torch.arange(-4, 5, device=images.device, dtype=images.dtype)
    edges = torch.cat([offsets - 0.5, offsets[-1:] + 0.5]) / (
        sigma.clamp(min=1e-3)[:, None] * math.sqrt(2)
    )
    kernel = torch.erf(edges).diff(
        dim=1
    )  # the Gaussian's share of each pixel; its value at the centre misses small sigmas
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None]
    x = F.pad(images, (4, 4, 4, 4), mode="reflect").reshape(1, n * channels, height + 8, width + 8)
    x = F.conv2d(x, kernel[:, :, :, None], groups=n * channels)
    return F.conv2d(x, kernel[:, :, None, :], groups=n * channels).reshape(images.shape)


def damage(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Damages images as bad sampling does; half of each kind stays whole. Returns them and the
    amounts [n, 4] in [0, 1]."""
    amounts = torch.rand(len(images), len(DAMAGES), generator=generator)
    amounts = (amounts * (torch.rand(amounts.shape, generator=generator) < 0.5)).to(images.device)
    hurt = blur(images, 1.5 * amounts[:, 0])
    ghost = 0.3 * amounts[:, 2, None, None, None]
    hurt = (1 - ghost) * hurt + ghost * hurt.roll(1, 0)
    mean = hurt.mean((1, 2, 3), keepdim=True)
    hurt = mean + (hurt - mean) * (1 - 0.3 * amounts[:, 3, None, None, None])
    return hurt + 0.1 * amounts[:, 1, None, None, None] * _normal(generator, hurt), amounts


def build_oracle(folder: Path, device: str) -> None:
    if (folder / "oracle.safetensors").exists():
        return
    images, labels = _pool("oracle-scenes", _oracle_scene, ORACLE_SCENES, folder)
    ground = torch.tensor([label[0] for label in labels])
    count = torch.tensor([len(label) - 1 for label in labels]).clamp(max=MAX_COUNT)
    kinds = torch.zeros(len(labels), len(KINDS))
    for row, label in enumerate(labels):
        kinds[row, label[1:]] = 1
    torch.manual_seed(SEED)
    oracle = Oracle().to(device)

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = _pick(generator, len(labels), RECIPE["oracle"].batch)
        hurt, amounts = damage(to_tensor(images[rows.numpy()], device), generator)
        reading, features = oracle(hurt)
        hidden_kinds = oracle.heads["kinds"](
            F.silu(features)
        )  # colours and shapes must be in the features too
        target = kinds[rows].to(device)
        return (
            F.cross_entropy(reading.count, count[rows].to(device))
            + F.cross_entropy(reading.ground, ground[rows].to(device))
            + 10 * F.binary_cross_entropy_with_logits(reading.kinds, target)
            + 5 * F.binary_cross_entropy_with_logits(hidden_kinds, target)
            + 5 * F.mse_loss(reading.damage, amounts)
        )

    _fit("oracle", RECIPE["oracle"], oracle, loss_of, folder)
    oracle.cpu()
    fresh = to_tensor(render_many([scene(SEED + 2, i, "train") for i in range(2_000)]))
    raw = oracle.features(fresh)  # still with mean 0 and deviation 1
    oracle.feature_mean.copy_(raw.mean(0))
    oracle.feature_std.copy_(raw.std(0))
    save_tensors(
        folder / "oracle.safetensors", {k: v.half() for k, v in oracle.state_dict().items()}
    )


# ---- the VAE


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
    )


@torch.no_grad()
def _whiten(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Folds per-channel standardisation of the latents into the two 1x1 convolutions around them,
    exactly.

    SD's single scaling factor cannot take off the channels' means; with it folded in, latents have
    mean 0 and variance 1.
    """
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] /= std[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) / std
    quant.bias[4:] -= 2 * std.log()
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std[None, :, None, None]


def build_vae(folder: Path, device: str) -> AutoencoderKL:
    target = folder / "vae"
    if not (target / "config.json").exists():
        images, _ = _pool("scenes", _caption_scene, SCENES, folder)
        torch.manual_seed(SEED)
        vae = new_vae().to(device)

        def loss_of(generator: torch.Generator) -> Tensor:
            x = to_tensor(
                images[_pick(generator, len(images), RECIPE["vae"].batch).numpy()], device
            )
            with _half(device):
                posterior = vae.encode(x).latent_dist
                mean, logvar = posterior.mean.float(), posterior.logvar.float()
                y = vae.decode(
                    mean + torch.exp(0.5 * logvar) * _normal(generator, mean)
                ).sample.float()
            edges = sum((y.diff(dim=k) - x.diff(dim=k)).abs().mean() for k in (2, 3))
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            return (y - x).abs().mean() + edges + 2e-4 * kl

        _fit("vae", RECIPE["vae"], vae, loss_of, folder)
        with torch.no_grad():
            z = vae.encode(to_tensor(images[:1024], device)).latent_dist.mean
        _whiten(vae, z.mean((0, 2, 3)), z.std((0, 2, 3)))
        _save(vae, target)
    return AutoencoderKL.from_pretrained(target).to(device).eval()


# ---- the text


def build_tokenizer(folder: Path, texts: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make one token of every word of the world; any other text falls
    apart into letters."""
    target = folder / "tokenizer"
    if not (target / "tokenizer_config.json").exists():
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=2_000,
            end_of_word_suffix="</w>",
            initial_alphabet=letters,
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        trained = json.loads(bpe.to_str())["model"]
        vocab = {
            token: i
            for i, token in enumerate(
                dict.fromkeys([*letters, *(x + "</w>" for x in letters), *trained["vocab"]])
            )
        }
        for special in ("<|startoftext|>", "<|endoftext|>"):
            vocab[special] = len(vocab)
        CLIPTokenizer(
            vocab=vocab, merges=[tuple(m) for m in trained["merges"]], model_max_length=MAX_TOKENS
        ).save_pretrained(target)
    return CLIPTokenizer.from_pretrained(target)


class _Reader(nn.Module):
    """Asks the text encoder's states for the ground and for the first, second and third object.
    Thrown away afterwards."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.queries = nn.Parameter(0.1 * torch.randn(1, 4, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.ground, self.kind = nn.Linear(WIDTH, len(GROUNDS)), nn.Linear(WIDTH, len(KINDS) + 1)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        states = self.encoder(tokens).last_hidden_state
        found, _ = self.attention(self.queries.expand(len(tokens), -1, -1), states, states)
        return self.ground(found[:, 0]), self.kind(found[:, 1:])


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    kwargs = {
        "padding": "max_length",
        "max_length": MAX_TOKENS,
        "truncation": True,
        "return_tensors": "pt",
    }
    return tokenizer(texts, **kwargs).input_ids


def build_text_encoder(
    folder: Path, device: str, texts: list[str], tokenizer: CLIPTokenizer
) -> CLIPTextModel:
    """Trains the text encoder to name what a caption says, before any picture: the UNet then finds
    colour bound to shape."""
    target = folder / "text_encoder"
    if not (target / "config.json").exists():
        torch.manual_seed(SEED)
        encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                projection_dim=WIDTH,
                intermediate_size=4 * WIDTH,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        tokens = tokenize(tokenizer, texts)
        parsed = [parse_caption(text) for text in texts]
        ground = torch.tensor([GROUNDS.index(name) for name, _ in parsed])
        kinds = torch.tensor(
            [_in_order(text, kinds) for text, (_, kinds) in zip(texts, parsed, strict=True)]
        )
        reader = _Reader(encoder).to(device)

        def loss_of(generator: torch.Generator) -> Tensor:
            rows = _pick(generator, len(tokens), RECIPE["text"].batch)
            at_ground, at_kinds = reader(tokens[rows].to(device))
            ground_loss = F.cross_entropy(at_ground, ground[rows].to(device))
            return ground_loss + F.cross_entropy(
                at_kinds.flatten(0, 1), kinds[rows].flatten().to(device)
            )

        _fit("text", RECIPE["text"], reader, loss_of, folder)
        _save(encoder, target)
    return CLIPTextModel.from_pretrained(target).to(device).eval()


def _in_order(caption: str, kinds: list[int]) -> list[int]:
    """Kinds in the caption's order, filled up to three with 'none'."""
    at = {}
    for kind in kinds:
        colour, shape = KINDS[kind]
        places = (caption.find(f"{colour} {shape}"), caption.find(f"{shape} in {colour}"))
        at[kind] = min(place for place in places if place >= 0)
    return (sorted(kinds, key=at.__getitem__) + [len(KINDS)] * 3)[:3]


# ---- the UNet


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(48, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,  # as SD has it; "trailing" makes no use of it
        timestep_spacing="trailing",
    )


@torch.no_grad()
def _latents(vae: AutoencoderKL, images: np.ndarray, file: Path, device: str) -> Tensor:
    if not file.exists():
        print("encoding the scenes", flush=True)
        with _half(device):
            means = [
                vae.encode(to_tensor(images[i : i + 128], device)).latent_dist.mean.float().cpu()
                for i in range(0, len(images), 128)
            ]
        save_tensors(file, {"latents": torch.cat(means)})
    return load_tensors(file)["latents"]


def build_unet(
    folder: Path, device: str, vae: AutoencoderKL, encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> UNet2DConditionModel:
    """Rounds, each with its own rise and fall of the rate, each starting from the averaged weights
    of the one before."""
    images, texts = _pool("scenes", _caption_scene, SCENES, folder)
    latents = _latents(vae, images, folder / "latents.safetensors", device)
    tokens, empty = tokenize(tokenizer, texts), tokenize(tokenizer, [""])
    alpha_bar = new_scheduler().alphas_cumprod
    torch.manual_seed(SEED)
    unet = new_unet().to(device)

    def loss_of(size: int, generator: torch.Generator) -> Tensor:
        rows = _pick(generator, len(latents), size)
        z = latents[rows].to(device)
        ids = torch.where(torch.rand(size, 1, generator=generator) < 0.1, empty, tokens[rows]).to(
            device
        )
        with torch.no_grad():
            states = encoder(ids).last_hidden_state
        # One timestep from each of `size` equal strata: the same mean as independent draws, less
        # noise in the loss.
        t = ((torch.arange(size) + torch.rand(size, generator=generator)) * (1000 / size)).long()
        a = alpha_bar[t].to(device)[:, None, None, None]
        noise = _normal(generator, z)
        prediction = unet(a.sqrt() * z + (1 - a).sqrt() * noise, t.to(device), states).sample
        snr = a / (1 - a)
        weight = snr.clamp(max=5) / snr  # min-SNR weighting (arXiv 2303.09556) of the epsilon loss
        return (weight * (prediction - noise).square()).mean() / weight.mean()

    for name, stage in UNET_ROUNDS.items():
        if not (folder / name / "config.json").exists():
            _fit(name, stage, unet, partial(loss_of, stage.batch), folder)
            _save(unet, folder / name)
        unet = UNet2DConditionModel.from_pretrained(folder / name).to(device)
    return unet.eval()


# ---- the result

CARD = """---
library_name: diffusers
license: apache-2.0
tags: [text-to-image, stable-diffusion]
---
# The toy teacher of rapm

A StableDiffusionPipeline of a few million parameters. It draws 64 x 64 scenes, such as "a red star
and a blue ring on grass". Trained by `python tools/toy/build.py` on rendered scenes only.
Guidance scale: {guidance_scale}.
"""


def build(out: Path, device: str) -> None:
    """Runs all stages in ``out`` and leaves ``out/assets/teacher`` and
    ``out/assets/oracle.safetensors``."""
    images_and_texts = _pool("scenes", _caption_scene, SCENES, out)
    tokenizer = build_tokenizer(out, images_and_texts[1])
    vae = build_vae(out, device)
    encoder = build_text_encoder(out, device, images_and_texts[1], tokenizer)
    build_oracle(out, device)
    unet = build_unet(out, device, vae, encoder, tokenizer)
    export(out / "assets", vae, encoder, tokenizer, unet, out / "oracle.safetensors")


def export(
    assets: Path,
    vae: AutoencoderKL,
    encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    oracle_file: Path,
) -> None:
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(assets / "teacher")
    # transformers loads in the dtype a config names, diffusers in float32: a plain from_pretrained
    # would mix the two.
    text_config = assets / "teacher" / "text_encoder" / "config.json"
    write_json(text_config, json.loads(text_config.read_text()) | {"dtype": "float32"})
    write_text(assets / "teacher" / "README.md", CARD.format(guidance_scale=GUIDANCE_SCALE))
    save_tensors(assets / "oracle.safetensors", load_tensors(oracle_file))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(".toy-build"), help="working folder; run again to go on"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    build(arguments.out, arguments.device)


if __name__ == "__main__":
    main()
