"""The modules of a base from its files, for commands in an environment in which the runtime is installed too.

transformers decides which modules a base has; this package knows it only through the runtime's own code.
"""

from __future__ import annotations

import importlib

from lorapool_api.common import FailureReason
from lorapool_artifacts.checks.base_facts import BaseFacts
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.inspect import BaseFiles

_RUNTIME = "lorapool_runtime.engines.torch.model.without_weights"


def facts_of(files: BaseFiles) -> BaseFacts | None:
    """The facts of the base as a runtime would publish them; None where the runtime is not installed.

    Takes seconds. Raises ArtifactError for a base of which transformers makes no model.
    """
    try:
        runtime = importlib.import_module(_RUNTIME)
    except ImportError:
        return None
    try:
        modules = runtime.modules_of(files.config, files.shapes)
    except Exception as error:  # transformers raises what the settings of a base make it raise
        raise ArtifactError(
            FailureReason.UNSUPPORTED_FORMAT,
            f"transformers makes no model of the base's config.json ({type(error).__name__}: {error}); serve a base of "
            "an architecture that it contains.",
        ) from error
    return BaseFacts.of(modules, *files.names)
