"""A page in the browser about all runs of a folder, made with Gradio: ``rapm ui RUNS_FOLDER``.

It reads run folders and locks nothing, so it may stay open while they train.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from rapm.errors import UserError
from rapm.report.page import charts
from rapm.run import Run
from rapm.sample import sample_run
from rapm.samples import FEW, MANY, cut, drawn_iterations, many_steps, row_file
from rapm.status import progress_of, standing
from rapm.trajectories import stored_prompts

EVERY = 10  # seconds between two looks at the list of runs
NEEDS = "it takes Gradio: pip install -c constraints.txt -e '.[ui]'"


def runs_in(folder: Path) -> dict[str, Run]:
    """Runs by name: of a folder's folders, or of itself; what cannot be read as one is left out.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    found: dict[str, Run] = {}
    for each in (folder, *sorted(folder.iterdir())):
        try:
            found[each.resolve().name] = Run.existing(each)
        except UserError:  # of an older version, or no run
            continue
    return found


def listed(folder: Path) -> list[list[str]]:
    """A line for each run: name, method, what is finished, hours left."""
    rows = []
    for name, run in runs_in(folder).items():
        try:
            progress, state = progress_of(run.config, run.read_metrics()), standing(run)
        except UserError as error:  # damaged
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

    def of(name: str) -> Run:
        return runs_in(folder)[name]

    def shown(name: str | None) -> tuple[Any, ...]:
        """Everything about one run."""
        if not name:
            return gradio.update(choices=[]), None, None, ""
        run = of(name)
        texts = [prompt.text for prompt in stored_prompts(run.trajectories)]
        texts = texts[: run.config.samples.count]
        choices = [(text, k) for k, text in enumerate(texts)]
        strip = run.samples / "iterations.png"
        return (
            gradio.update(choices=choices, value=0 if choices else None),
            compared(run, 0, False),
            str(strip) if strip.is_file() else None,
            curves(run),
        )

    def slid(name: str | None, prompt: int | None, few: bool) -> Any:
        return None if not name or prompt is None else compared(of(name), prompt, few)

    def draw(name: str | None, texts: str, seed: float) -> str:
        prompts = [line.strip() for line in texts.splitlines() if line.strip()]
        if not name or not prompts:
            raise gradio.Error("Choose a run, and write a prompt a line.")
        try:
            run = of(name)
            steps = many_steps(run.config.trajectories.slots)  # somebody is waiting
            count = len(prompts)
            drawn = sample_run(run, prompts=prompts, seed=int(seed), count=count, many_steps=steps)
            return str(drawn)
        except UserError as error:
            raise gradio.Error(str(error)) from None

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
        seed = gradio.Number(0, precision=0, label="Seed of the first")
        button = gradio.Button("Draw with the newest checkpoint")
        drawn = gradio.Image(label="Teacher and student", format="png", interactive=False)
        name.change(shown, name, [prompt, slider, strip, curve], api_name="show")
        for each in (prompt, few):
            each.change(slid, [name, prompt, few], slider, api_name=False)
        button.click(draw, [name, texts, seed], drawn, api_name="draw")
        gradio.Timer(EVERY).tick(lambda: listed(folder), None, table, api_name="runs")
    return page


def serve(folder: Path, host: str, port: int, *, block: bool = True) -> Any:
    """Starts the page; returns when it is stopped, or at once without ``block``.

    Raises:
        UserError: as :func:`build`, or the port is taken.
    """
    page = build(folder)
    from gradio.themes import Default

    try:
        page.launch(
            theme=Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            server_name=host,
            server_port=port,
            prevent_thread_lock=not block,
            allowed_paths=[str(folder.resolve())],
            quiet=True,
            share=False,
        )
    except OSError as error:
        raise UserError(f"rapm ui cannot be served at {host}:{port}: {error}") from None
    return page
