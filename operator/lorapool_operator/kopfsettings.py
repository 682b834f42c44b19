"""kopf's settings, each pinned on purpose. Called by `__main__`.

kopf only watches here: no handler of ours makes it write, so its finalizer and annotations are named but unused.
Timeouts are set because kopf's defaults leave a silent watch or a hung request unseen for minutes.
"""

from __future__ import annotations

import logging

import kopf

from lorapool_api.common import GROUP, LABEL_BASE


def pinned_settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.inactivity_timeout = 70
    settings.watching.connect_timeout = 10
    settings.watching.label_selectors["pods"] = LABEL_BASE
    settings.watching.label_selectors["deployments.apps"] = LABEL_BASE
    settings.networking.request_timeout = 15
    settings.networking.error_backoffs = (1, 1, 2, 3, 5, 8)
    settings.queueing.error_delays = (1, 1, 2, 3, 5, 8, 13, 21, 30)
    settings.queueing.idle_timeout = 1.0  # a worker per object: thousands of them need not linger
    settings.execution.default_backoff = 5
    settings.scanning.disabled = True  # CRDs and namespaces are not ours to list
    settings.posting.enabled = False  # our own events, few
    settings.posting.level = logging.WARNING
    settings.persistence.finalizer = f"{GROUP}/never-used"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=GROUP)
    settings.process.ultimate_exiting_timeout = 20
    settings.background.cancellation_polling = 5
    settings.peering.standalone = True
    return settings
