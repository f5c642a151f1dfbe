"""What the log shows: our own plain sentences and bars, and of the libraries only errors."""

import logging
import sys


def configure_logging() -> None:
    """Send messages to stderr as plain text, and keep diffusers' and transformers' chatter out; may be repeated."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpcore", "huggingface_hub", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
