"""openai_server: models that another server runs, over an OpenAI-compatible API: llama-server, vLLM, SGLang, this program elsewhere, a service.

The address comes from the person's own settings; nothing else decides where a request goes, and no redirect is followed.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

from modules.backends.base import Backend, CancelToken, Loader, Progress
from modules.backends.openai_server.options import OpenAIServerOptions, key_of
from modules.backends.openai_server.payload import SAMPLERS
from modules.connections import checked_url, is_loopback
from modules.errors import ModelError, UserError
from modules.log import logger
from modules.options import Options

PREFIX = "openai:"
"""A model's name here is this and the name at its server. It is no path: loaders are given `Path(name)`."""
LIST_SECONDS = 30.0
_listed: dict[tuple[str, str], tuple[float, list[str]]] = {}
_listing = threading.Lock()


def root_of(options: OpenAIServerOptions) -> str:
    """The server's address without /v1. Raises ModelError, SettingsError."""
    if not options.server_url:
        raise ModelError("No server is named. Give its address with --server-url, like http://127.0.0.1:8080/v1.")
    return checked_url(options.server_url, "server_url", True).removesuffix("/v1").rstrip("/")


def models(options: Options) -> list[str]:
    """Names of the server's models, for the list of models; empty when no server is named or it does not answer. At most some seconds, then kept."""
    wanted = cast(OpenAIServerOptions, options)
    if not wanted.server_url:
        return []
    from modules.backends.openai_server.probe import model_entries
    from modules.backends.openai_server.wire import Refused, Wire

    place = (wanted.server_url, wanted.server_model)
    with _listing:
        at, names = _listed.get(place, (float("-inf"), []))
        if time.monotonic() - at < LIST_SECONDS:
            return names
        try:
            wire = Wire(root_of(wanted), key_of(), 5.0, 1)
            try:
                names = [PREFIX + entry["id"] for entry in model_entries(wire)]
            finally:
                wire.close()
        except (UserError, Refused) as error:
            logger.debug("No list of models from %s: %s", wanted.server_url, error)
            names = [PREFIX + wanted.server_model] if wanted.server_model else []
        _listed.clear()
        _listed[place] = time.monotonic(), names
        return names


def _load(path: Path, options: Options, progress: Progress, cancel: CancelToken) -> Backend:
    from modules.backends.openai_server.client import OpenAIServerBackend
    from modules.backends.openai_server.probe import look
    from modules.backends.openai_server.wire import Refused, Wire, error_of

    wanted = cast(OpenAIServerOptions, options)
    name = path.as_posix()
    model = name.removeprefix(PREFIX) if name.startswith(PREFIX) else wanted.server_model
    root, key = root_of(wanted), key_of()
    wire = Wire(root, key, wanted.server_timeout, wanted.server_parallel)
    if key and root.startswith("http://") and not is_loopback(urlsplit(root).hostname or ""):
        logger.warning("The key of %s travels unencrypted: its address is not https.", wire.host)
    try:
        server = look(wire, wanted, model, progress, cancel)
    except Refused as refused:
        wire.close()
        raise error_of(refused, wire.host, model) from None
    except BaseException:
        wire.close()
        raise
    progress(1.0, "Connected")
    return OpenAIServerBackend(wire, server, wanted)


LOADER = Loader(name="openai_server", options=OpenAIServerOptions, detect=lambda _path: False, load=_load, samplers=SAMPLERS, elsewhere=True)
