"""Writes the prompts that rapm ships:

    python tools/prompts/generate.py --count 12000 --seed 0 --out src/rapm/prompts.txt

Another count or seed makes another file. The same ones make the same file on every machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from grammar import compose


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=12_000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other prompts")
    parser.add_argument("--out", type=Path, required=True, help="the file, one prompt a line")
    arguments = parser.parse_args()
    text = "\n".join(compose(arguments.count, arguments.seed)) + "\n"
    arguments.out.write_text(text, encoding="utf-8", newline="\n")
    print(f"{arguments.count:,} prompts in {arguments.out}")


if __name__ == "__main__":
    main()
