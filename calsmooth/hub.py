"""The Hugging Face hub, asked once whether it is there, so that having no network costs seconds and not a minute."""

import os
import socket
import sys
from functools import cache
from urllib.parse import urlsplit

CONNECT_SECONDS = 3.0


@cache
def prepare_hub() -> bool:
    """Whether the hub answers; where it doesn't, its libraries are switched to their offline mode.

    In that mode cached models and data sets still load, and anything else fails at once instead of after six retries
    of growing length. Call it before the first use of a hub id.
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy resolves names for us: only a request could tell
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname, port), timeout=CONNECT_SECONDS).close()
    except OSError:
        _go_offline()
        return False
    return True


def _go_offline() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Both libraries read the variable when they are imported, which may have happened already.
    for module, constant in (("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("datasets.config", "HF_HUB_OFFLINE")):
        if module in sys.modules:
            setattr(sys.modules[module], constant, True)
