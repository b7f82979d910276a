"""``python -m rapm`` is ``rapm``."""

from rapm.cli import main

main()
