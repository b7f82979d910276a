"""Writes docs/settings.md, the reference of settings: ``python tools/docs/settings_page.py``.

All of it is read off ``src/rapm/config.py`` and ``sections.py``; a test holds the page to it.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic.fields import FieldInfo

from rapm.config import Config, unread
from rapm.sections import Section

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
HEAD = """# Settings

Every setting with its default. Give it as `--set KEY=VALUE`, or in a TOML file (`--config FILE`),
where the part before the dot is a table:

```toml
method = "midpoint"

[training]
iterations = 2000
```

The order is: defaults, what suits the method (`src/rapm/configs/methods/`), the preset
(`rapm presets` lists them), the file, `--set`; the last one counts. A run keeps what it took in
its `config.toml`. `python tools/docs/settings_page.py` writes this page from
`src/rapm/sections.py`.
"""


def page() -> str:
    own = {name: info for name, info in Config.model_fields.items() if not section(info)}
    lines = [HEAD, "## The run", "", *(entry(name, info) for name, info in own.items())]
    for name, info in Config.model_fields.items():
        if kind := section(info):
            fields = kind.model_fields.items()
            lines += ["", f"## `{name}`", "", filled(kind.__doc__ or "", ""), ""]
            lines += [entry(f"{name}.{key}", field) for key, field in fields]
    return "\n".join(lines) + "\n"


def section(info: FieldInfo) -> type[Section] | None:
    kind: Any = info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def entry(key: str, info: FieldInfo) -> str:
    """A line of the list: the key, its default, who reads it, what it is."""
    default = tomli_w.dumps({"x": info.default}).removeprefix("x = ").strip()
    told = f"`{key} = {default}`"
    if get_origin(info.annotation) is Literal:
        told += f" ({', '.join(map(str, get_args(info.annotation)))})"
    readers = {method: key not in unread(method) for method in ("rapm", "midpoint")}
    only = [method for method, reads in readers.items() if reads]
    of = f"Method `{only[0]}` alone. " if len(only) == 1 else ""
    return filled(f"- {told}: {of}{info.description}", "  ")


def filled(text: str, indent: str) -> str:
    """In lines of 100, docstrings' double backticks as Markdown's."""
    text = text.replace("``", "`")
    return textwrap.fill(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
