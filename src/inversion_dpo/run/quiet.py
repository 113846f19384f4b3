"""Quieten the libraries of networks; importing them takes seconds."""

from __future__ import annotations


def quieten_libraries() -> None:
    """Let the libraries below say errors only, and no loading bars but those of downloads."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    enable_progress_bars()  # transformers' function stops those of the hub, too
