"""RAPM restated flat, with separate copies of the network, and the library's training held to it.

Nothing here comes from ``rapm.methods``. :func:`rapm_by_hand` is the algorithm of arXiv 2503.20744
in plain torch, diffusers and peft; what ``rapm train`` leaves after four iterations (two of the
discriminators, two of the student) must be what it leaves, in every parameter of all learners.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from conftest import changed, make_unet
from rapm import pipeline
from rapm.config import Config
from rapm.models.resolve import teacher_of
from rapm.run import Run

ITERATIONS = 4


def generator(purpose: str) -> torch.Generator:
    digest = hashlib.sha256(purpose.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def rapm_by_hand(
    config: Config, alpha_bar: Tensor, store: Any, nets: Any, heads: Any
) -> dict[Tensor, Tensor]:
    """Four iterations. Changes the parameters of ``nets`` (by learner) and ``heads`` (by term).

    Args:
        alpha_bar: float64 [T + 1], the end of sampling first.

    Returns:
        Of each parameter the smallest size of its gradients.
    """
    N, M, delta = config.trajectories.slots, config.trajectories.fine_steps, config.rapm.delta
    fine = [round(1000 - k * 1000 / (N * M)) - 1 for k in range(N * M)] + [-1]
    t = [fine[(N - n) * M] for n in range(N + 1)]  # t_0 = the end ... t_N
    mid = [fine[(N - n - 1) * M + delta] for n in range(N)]  # t_{n+1} - Delta
    weights = {"relative": float(config.rapm.relative), "absolute": config.rapm.absolute_weight}
    terms = [term for term in weights if weights[term]]
    adversaries = terms if config.discriminators.adversarial_weight else []
    parameters = {"student": [p for p in nets["student"].parameters() if p.requires_grad]}
    for term in adversaries:
        net = nets[f"{term}_discriminator"]
        own = [p for p in net.parameters() if p.requires_grad]
        parameters[term] = own + list(heads[term].parameters())
    betas = {"student": (0.9, 0.999), "relative": (0.0, 0.999), "absolute": (0.0, 0.999)}
    adamw = {
        name: torch.optim.AdamW(own, lr=1e-3, betas=betas[name], weight_decay=1e-3)
        for name, own in parameters.items()
    }

    smallest: dict[Tensor, Tensor] = {}

    def a(t: int) -> Tensor:
        return alpha_bar[t + 1].sqrt().float()

    def s(t: int) -> Tensor:
        return (1 - alpha_bar[t + 1]).sqrt().float()

    def step(z: Tensor, t: int, u: int, prompt: Tensor) -> Tensor:  # DDIM(student, z, t -> u)
        eps = nets["student"](z, t, prompt).sample
        return a(u) * ((z - s(t) * eps) / a(t)) + s(u) * eps

    def logits(term: str, z: Tensor, n: int, tau: int, noise: Tensor, prompt: Tensor) -> Any:
        ratio = a(tau) / a(t[n])  # noise added from t_n up to tau
        z = ratio * z + (s(tau) ** 2 - (ratio * s(t[n])) ** 2).sqrt() * noise
        net, maps = nets[f"{term}_discriminator"], []
        hooks = [
            b.register_forward_hook(lambda _, __, o: maps.append(o[0] if type(o) is tuple else o))
            for b in [*net.down_blocks, net.mid_block]
        ]
        net(z, tau, prompt.expand(len(z), -1, -1))
        for hook in hooks:
            hook.remove()
        return heads[term](maps)

    def mean(maps: list[Tensor]) -> Tensor:
        return torch.stack([x.mean() for x in maps]).mean()

    def d(x: Tensor, y: Tensor) -> Tensor:
        return (((x - y) ** 2 + 1e-6).sqrt() - 1e-3).mean()

    for i in range(ITERATIONS):
        epoch, place = divmod(i, len(store))
        order = torch.randperm(len(store), generator=generator(f"rapm epoch 0 {epoch}"))
        row = store[int(order[place])]
        prompt = row.conditioning["prompt_embeds"][None]
        draws, drawn = generator(f"rapm training 0 {i}"), {}
        for term in adversaries:
            u = torch.rand(N, generator=draws, dtype=torch.float64)
            noise = torch.randn(2, N, *row.absolute.shape[1:], generator=draws)
            taus = [int(max(t[n], 0) + (t[n + 1] - max(t[n], 0)) * u[n]) for n in range(N)]
            drawn[term] = [(taus[n], noise[0, n][None], noise[1, n][None]) for n in range(N)]
        learns = ["student"] if i % 2 == 1 or not adversaries else adversaries
        losses: dict[str, list[Tensor]] = {name: [] for name in learns}
        z = row.absolute[N][None]  # z_N = z~_N
        for n in reversed(range(N)):
            z_phi = step(z, t[n + 1], t[n], prompt)  # z_n^phi
            z_hat = row.intermediate[n][None]
            if mid[n] != t[n]:
                z_hat = step(z_hat, mid[n], t[n], prompt)  # z^_n
            z_hat = z_hat.detach() if config.rapm.detach_relative else z_hat
            for term, real in (("relative", z_hat), ("absolute", row.absolute[n][None])):
                tau, of_real, of_fake = drawn[term][n] if term in adversaries else (0, z, z)
                if "student" in learns and term in terms:
                    loss = d(z_phi, real)
                    if term in adversaries:
                        fake = logits(term, z_phi, n, tau, of_fake, prompt)
                        loss = loss + 0.1 * mean([torch.relu(1 - x) for x in fake])
                    losses["student"].append(weights[term] * loss)
                if term in learns:
                    both, noise = torch.cat([real, z_phi]).detach(), torch.cat([of_real, of_fake])
                    maps = [x.chunk(2) for x in logits(term, both, n, tau, noise, prompt)]
                    hinge = [torch.relu(1 - real) + torch.relu(1 + fake) for real, fake in maps]
                    losses[term].append(mean(hinge))
            z = z_phi.detach() if config.rapm.detach_slots else z_phi  # z_n
        for name in learns:
            torch.stack(losses[name]).sum().backward(inputs=parameters[name])
            torch.nn.utils.clip_grad_norm_(parameters[name], 1.0)
            adamw[name].param_groups[0]["lr"] = 1e-3 * (i + 1) / 20  # warm-up
            for p in parameters[name]:
                smallest[p] = torch.minimum(smallest.get(p, p.grad.abs()), p.grad.abs())
            adamw[name].step()
            adamw[name].zero_grad()
    return smallest


CASES: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "delta 5, w_n 0.5": {"rapm": {"delta": 5, "absolute_weight": 0.5}},
    "delta M": {"rapm": {"delta": 6}},
    "first detach off": {"rapm": {"detach_relative": False}},
    "second detach off": {"rapm": {"detach_slots": False}},
    "relative only": {"rapm": {"absolute_weight": 0.0}},
    "absolute only": {"rapm": {"relative": False}},
    "distances alone, both detaches off, delta 5": {
        "rapm": {"detach_relative": False, "detach_slots": False, "delta": 5},
        "discriminators": {"adversarial_weight": 0.0},
    },
    "one slot after the other, checkpointing": {
        "training": {"slot_batch": 1, "gradient_checkpointing": True}
    },
}


@pytest.mark.parametrize("case", CASES)
def test_four_iterations_of_train_are_the_papers(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    config = changed(tiny_config, trajectories={"fine_steps": 6}, training={"iterations": 4})
    config = changed(changed(config, student={"ema": 0.0}), **CASES[case])
    seen: dict[int, Any] = {}  # by iteration: parameters and heads of every learner

    def watch(run: Run, teacher: Any, method: Any, store: Any) -> Any:
        def note(iteration: int) -> dict[str, float]:
            # Half of a new LoRA is zero, and so is the other half's first gradient.
            for k, learner in enumerate(method.learners.values() if iteration == 0 else ()):
                noise = torch.Generator().manual_seed(k)
                for p in learner.parameters.values():
                    p.data += 0.07 * torch.randn(p.shape, generator=noise)
            seen[iteration] = {
                name: (
                    {n: p.detach().clone() for n, p in learner.parameters.items()},
                    copy.deepcopy(learner.heads),
                )
                for name, learner in method.learners.items()
            }
            return {}

        return note

    monkeypatch.setattr(pipeline, "TrainingSamples", watch)
    run = Run.open(tmp_path / "run", config)
    store = pipeline.make_trajectories(run)
    assert pipeline.train_run(run)

    nets, heads = {}, {}
    for name, (weights, own_heads) in seen[0].items():
        net = make_unet("tiny").requires_grad_(False)
        layers = {key.split(".lora_")[0] for key in weights if ".lora_" in key}
        rank = config.student.rank if name == "student" else config.discriminators.rank
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(layers))
        net.add_adapter(lora, adapter_name=name)
        for key, p in net.named_parameters():
            if f".{name}." in key:
                p.data.copy_(weights[key])
        nets[name] = net
        if own_heads is not None:
            heads[name.removesuffix("_discriminator")] = own_heads
    teacher = teacher_of(config)
    smallest = rapm_by_hand(config, teacher.schedule.alphas.square(), store, nets, heads)

    moved = unsure = number = 0
    for name, (weights, _) in seen[4].items():
        by_hand = dict(nets[name].named_parameters())
        term = name.removesuffix("_discriminator")
        if term in heads:
            by_hand |= {f"heads.{key}": p for key, p in heads[term].named_parameters()}
        for key, value in weights.items():
            # AdamW divides a gradient by its own size: one that is rounding alone moves a weight
            # by a whole step, up or down. Gradients are of length 1.
            rounding = smallest[by_hand[key]] < 2e-6
            error = (value - by_hand[key]).detach().abs()
            assert torch.where(rounding, 0, error).max() <= 1e-6, f"{name} {key}"
            assert error.max() <= 2e-3, f"{name} {key}"
            moved += int((value - seen[0][name][0][key]).abs().gt(2e-6).sum())
            unsure, number = unsure + int(rounding.sum()), number + value.numel()
    assert unsure < 0.02 * number
    assert moved > 0.95 * number
