"""What libraries say of things that nobody here can change."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Only their errors are heard meanwhile, as on the command line."""
    kernels = logging.getLogger("bitsandbytes")
    before = [(one, one.get_verbosity()) for one in (diffusers_logging, transformers_logging)]
    level = kernels.level
    for library, _ in before:
        library.set_verbosity_error()
    kernels.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of teachers' configs
            yield
    finally:
        for library, verbosity in before:
            library.set_verbosity(verbosity)
        kernels.setLevel(level)
