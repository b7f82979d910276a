"""A page in the browser about all runs of a folder, made with Gradio: ``rapm ui RUNS_FOLDER``.

It reads run folders and locks nothing, so it may stay open while they train.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from rapm.errors import UserError, first_line
from rapm.report.page import charts
from rapm.run import Run
from rapm.sample import sample_run
from rapm.samples import FEW, MANY, cut, drawn_iterations, many_steps, row_file
from rapm.status import progress_of, standing
from rapm.trajectories import stored_prompts

DAMAGES = (UserError, ValueError, LookupError, TypeError)  # of records that hold anything
EVERY = 10  # seconds between two looks at the list of runs
NEEDS = "it takes Gradio: pip install -c constraints.txt -e '.[ui]'"


def runs_in(folder: Path) -> dict[str, Run]:
    """Runs by their folders' names: in a folder, or itself; what cannot be read is left out.

    Raises:
        UserError: it is no folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    found: dict[str, Run] = {}
    for each in (folder, *sorted(folder.iterdir())):
        try:
            found[each.name or each.resolve().name] = Run.existing(each)
        except UserError:  # of an older version, or no run
            continue
    return found


def listed(folder: Path) -> list[list[str]]:
    """A line for each run: name, method, what is finished, hours left."""
    rows = []
    for name, run in runs_in(folder).items():
        try:
            progress, state = progress_of(run.config, run.read_metrics()), standing(run)
        except DAMAGES as error:
            rows.append([name, run.config.method, str(error), ""])
            continue
        left = f"{progress.left:.2f} h" if 0 < progress.done < progress.total else ""
        if progress.done:
            state = f"iteration {progress.done:,} of {progress.total:,}"
        rows.append([name, run.config.method, state, left])
    return rows


def curves(run: Run) -> str:
    """The page's charts, as SVG."""
    drawn = charts(run.read_metrics(), run.read_samples(), run.config.training.gradient_clip)
    columns = "display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(20rem,1fr))"
    return f'<div style="{columns}">{"".join(drawn)}</div>' if drawn else "No curves yet."


def compared(run: Run, prompt: int, few: bool) -> tuple[Image.Image, Image.Image] | None:
    """The teacher's picture and the newest of the student's; None where there are none yet."""
    made = drawn_iterations(run)
    files = run.samples / (FEW if few else MANY), row_file(run.samples, made[-1] if made else 0)
    try:
        left, right = (cut(file)[prompt] for file in files)
    except (OSError, IndexError):
        return None
    return left, right


def opened(file: Path) -> Image.Image:
    """A picture to send; no file of the folder is served as one."""
    with Image.open(file) as picture:
        return picture.convert("RGB")


def build(folder: Path) -> Any:
    """The page.

    Raises:
        UserError: Gradio is not installed, or there is no such folder.
    """
    try:
        import gradio
    except ImportError as error:
        raise UserError(f"rapm ui: {NEEDS} ({error})") from None
    runs_in(folder)

    @contextmanager
    def told() -> Iterator[None]:
        """Whatever is wrong with a run comes up in the page, in a line."""
        try:
            yield
        except KeyError as error:
            raise gradio.Error(f"the run {error} is gone") from None
        except (*DAMAGES, OSError) as error:
            raise gradio.Error(first_line(error)) from None

    def shown(name: str | None) -> tuple[Any, ...]:
        """Everything about one run."""
        if not name:
            return gradio.update(choices=[]), None, None, ""
        with told():
            run = runs_in(folder)[name]
            texts = [prompt.text for prompt in stored_prompts(run.trajectories)]
            choices = [(text, k) for k, text in enumerate(texts[: run.config.samples.count])]
            strip = run.samples / "iterations.png"
            return (
                gradio.update(choices=choices, value=0 if choices else None),
                compared(run, 0, False),
                opened(strip) if strip.is_file() else None,
                curves(run),
            )

    def slid(name: str | None, prompt: int | None, few: bool) -> Any:
        if not name or prompt is None:
            return None
        with told():
            return compared(runs_in(folder)[name], prompt, few)

    def draw(name: str | None, texts: str, seed: int | None) -> Image.Image:
        prompts = [line.strip() for line in texts.splitlines() if line.strip()]
        if not name or not prompts:
            raise gradio.Error("Choose a run, and write a prompt a line.")
        with told():
            run = runs_in(folder)[name]
            steps = many_steps(run.config.trajectories.slots)  # somebody is waiting
            file = sample_run(
                run, prompts=prompts, seed=seed or 0, count=len(prompts), many_steps=steps
            )
            return opened(file)

    def listed_again() -> tuple[Any, Any]:
        return listed(folder), gradio.update(choices=[*runs_in(folder)])

    names = list(runs_in(folder))
    with gradio.Blocks(title="rapm", analytics_enabled=False) as page:
        gradio.Markdown(f"# Runs in {folder.resolve().name}")
        table = gradio.Dataframe(
            listed(folder), headers=["run", "method", "done", "left"], interactive=False
        )
        name = gradio.Dropdown(names, value=None, label="Run")
        with gradio.Row():
            prompt = gradio.Dropdown([], label="Prompt", type="value")
            few = gradio.Checkbox(label="Teacher at the student's number of steps")
        slider = gradio.ImageSlider(label="Teacher, left, and student", type="pil", format="png")
        strip = gradio.Image(label="While it trained", format="png", interactive=False)
        curve = gradio.HTML(label="Curves")
        gradio.Markdown("## Draw these prompts now")
        texts = gradio.Textbox(lines=3, label="Prompts, one a line")
        seed = gradio.Number(0, precision=0, minimum=0, maximum=2**31, label="Seed of the first")
        button = gradio.Button("Draw with the newest checkpoint")
        drawn = gradio.Image(label="Teacher and student", format="png", interactive=False)
        name.change(shown, name, [prompt, slider, strip, curve], api_name="show")
        for each in (prompt, few):
            each.change(slid, [name, prompt, few], slider)
        button.click(draw, [name, texts, seed], drawn, api_name="draw")
        gradio.Timer(EVERY).tick(listed_again, None, [table, name], api_name="runs")
        page.load(listed_again, None, [table, name])
    return page


def serve(folder: Path, host: str, port: int) -> Any:
    """Starts the page in the background; its ``block_thread()`` waits.

    Raises:
        UserError: as :func:`build`, or there is no such address, or the port is taken.
    """
    page = build(folder)
    try:  # Gradio would name another cause
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise UserError(f"rapm ui cannot be served at {host}:{port}: {error}") from None
    from gradio.themes import Default

    page.launch(
        theme=Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
    )
    return page
