"""Load a model's configuration, and what every loading through transformers has in common."""

from __future__ import annotations

from typing import Any

from rrcli.errors import RRError, first_line
from rrcli.models.manifest import base_auto_map
from rrcli.models.quantisation import stored_format
from rrcli.models.source import ModelSource


def load_config(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """Load a model's configuration; that of an export names the class of its base, not the code of the export.

    Raises:
        RRError: it cannot be read, or its code would have to be trusted.
    """
    from transformers import AutoConfig

    quiet()
    try:
        config = AutoConfig.from_pretrained(**source.from_pretrained_arguments(), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise unreadable(source, "configuration", error) from error
    if getattr(config, "auto_map", None):
        config.auto_map = base_auto_map(config.auto_map, source.manifest)
    return config


def unreadable(source: ModelSource, what: str, error: BaseException) -> RRError:
    """Return the error for a part of a model (`what`) that could not be read, from what was raised."""
    if isinstance(error, RRError):
        return error
    hint = ""
    if "trust_remote_code" in str(error):
        hint = "This model brings its own code; read it, then pass --trust-remote-code."
    elif what == "weights" and (name := stored_format(source)):
        hint = (
            f"They are quantised ({name}): install what the message names, take a device that this format has kernels "
            "for, or the model before it was quantised, with --quantize."
        )
    return RRError(f"cannot read the {what} of {source.path}: {first_line(error)}", hint)


def quiet() -> None:
    """Switch off the progress bars and notices of transformers; rr reports what matters itself."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
