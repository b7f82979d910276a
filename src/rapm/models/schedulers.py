"""A teacher's scheduler: what its config says of noise, and the one that pictures are drawn by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import diffusers

from rapm.errors import UserError
from rapm.models import Family
from rapm.models.files import reading
from rapm.schedule import Schedule

PREDICTIONS = ("epsilon", "v_prediction", "sample")  # of teachers with betas
FLOW = "FlowMatchEulerDiscreteScheduler"
# What else a flow's scheduler may do to its sigmas, and what it says where it does not.
_PLAIN = {
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
}
# Which sigmas a pipeline visits, where nobody names them: here they are always named.
_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config is of rectified flow."""
    return config.get("_class_name") == FLOW


def scheduler_of(config: Any, shift: float = 1.0) -> Any:
    """The deterministic scheduler of a teacher, whatever scheduler its config is of.

    Of a flow it is its own, of the one shift that the schedule has. Of other teachers it is DDIM:
    their betas, trailing timesteps, nothing clipped. What a config of another scheduler leaves out
    is what Stable Diffusion has, and not what DDIMScheduler's defaults are.
    """
    if is_flow(config):
        own = {"shift": shift, "use_dynamic_shifting": False} | dict.fromkeys(_SPACINGS, False)
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(config, **own)
    final = {} if "set_alpha_to_one" in config else {"set_alpha_to_one": False}
    own = {"clip_sample": False, "thresholding": False, "timestep_spacing": "trailing"}
    return diffusers.DDIMScheduler.from_config(config, **own, **final)


def schedule_of(
    source: str, config: Mapping[str, Any], family: Family, patches: Callable[[], int]
) -> Schedule:
    """What a scheduler's config says.

    Args:
        source: the teacher as the user named it, for messages.
        patches: of a picture, by whose number some shift.

    Raises:
        UserError: it is damaged, or of a kind that this version does not distil.
    """
    if is_flow(config) != family.flow:
        name, kind = config.get("_class_name", "scheduler"), family.pipeline.__name__
        takes = f"a {FLOW}" if family.flow else "a scheduler with betas"
        raise UserError(f"teacher '{source}' has a {name}; a {kind} takes {takes}")
    if not family.flow:
        return _betas(source, config)
    if config.get("use_dynamic_shifting") and family.shift:
        with reading(source, "scheduler"):
            config = {**config, "shift": family.shift(config, patches())}
            config["use_dynamic_shifting"] = False
    return _flow(source, config)


def _flow(source: str, config: Mapping[str, Any]) -> Schedule:
    for name, plain in _PLAIN.items():
        if config.get(name, plain) != plain:
            raise UserError(
                f"teacher '{source}': its scheduler has {name} = {config[name]!r}; of flows this "
                "version distils those with a shift that is always the same"
            )
    shift, timesteps = config.get("shift", 1.0), config.get("num_train_timesteps", 1000)
    is_number = isinstance(shift, int | float) and not isinstance(shift, bool)
    if not is_number or not 0.01 <= shift <= 100:
        raise UserError(
            f"teacher '{source}': its scheduler's shift is {shift!r}, and not from 0.01 to 100"
        )
    if timesteps != 1000:
        raise UserError(
            f"teacher '{source}' has {timesteps!r} timesteps; this version distils those with 1000"
        )
    return Schedule.flow(float(shift))


def _betas(source: str, config: Mapping[str, Any]) -> Schedule:
    if not {"beta_start", "trained_betas"} & {*config}:
        name = config.get("_class_name", "scheduler")
        raise UserError(
            f"teacher '{source}' has a {name}, which has no betas; this version distils DDPM-style "
            f"models and flows with a {FLOW}"
        )
    with reading(source, "scheduler"):
        timesteps = config.get("num_train_timesteps", 1000)
        if isinstance(timesteps, int) and timesteps > 1 << 20:  # each takes memory
            raise ValueError(f"it has {timesteps:,} timesteps")
        scheduler = scheduler_of(config)
        kind, timesteps = scheduler.config["prediction_type"], len(scheduler.alphas_cumprod)
    if kind not in PREDICTIONS or timesteps != 1000:
        raise UserError(
            f"teacher '{source}' predicts '{kind}' over {timesteps} timesteps; "
            f"this version distils {', '.join(PREDICTIONS)} over 1000"
        )
    if kind == "epsilon" and scheduler.config["rescale_betas_zero_snr"]:
        raise UserError(
            f"teacher '{source}' predicts the noise where there is nothing but noise (zero "
            f"terminal SNR with epsilon)"
        )
    left = scheduler.alphas_cumprod.diff()
    if (
        not (scheduler.alphas_cumprod[-1] >= 0 and scheduler.alphas_cumprod[0] < 1)
        or not (left < 0).all()
    ):  # nor are they, where one is no number
        raise UserError(
            f"teacher '{source}': by its scheduler's betas noise does not grow from step to step; "
            "they are damaged"
        )
    return Schedule.of(scheduler.alphas_cumprod, scheduler.final_alpha_cumprod, kind)
