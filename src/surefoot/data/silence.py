"""transformers' own progress bars and warnings, switched off while we call it."""

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def silence_transformers() -> Iterator[None]:
    """No progress bars, and no warnings that a user can do nothing about, while it is held."""
    from transformers.utils import logging

    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # peft calls a transformers name that is being renamed.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            # What peft warns of, of ties and names, `policies/lm/adapters.py` sees to.
            warnings.filterwarnings("ignore", module="peft")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()
