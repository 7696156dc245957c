"""OpenAIServerOptions: which server runs the model, and how long it may take. Its key is no option: see `key_of`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from modules.errors import SettingsError
from modules.options import Options, knob

GROUP = "OpenAI-compatible server"
KEY, KEY_FILE = "OPENAI_SERVER_KEY", "OPENAI_SERVER_KEY_FILE"


class OpenAIServerOptions(Options):
    """Options of the openai_server loader."""

    server_url: str = knob("", "Address of a server with an OpenAI-compatible API, like http://127.0.0.1:8080/v1.", group=GROUP, metavar="URL")
    server_model: str = knob("", "Model to use there, as that server names it. Empty is the first one of its list.", group=GROUP, metavar="NAME")
    server_context: int = knob(
        0, "Context of that model in tokens. 0 is what the server says.", range=(0, 131072, 256), bounds=(0, 2**31 - 1), group=GROUP
    )
    server_parallel: int = knob(8, "Replies asked for at the same time; more wait.", range=(1, 64, 1), bounds=(1, 256), group=GROUP)
    server_queue: int = knob(64, "Requests that may wait; further ones are told to come back.", range=(1, 1024, 1), bounds=(1, 100_000), group=GROUP)
    server_timeout: int = knob(300, "Seconds without an answer after which a reply is given up.", range=(5, 3600, 5), bounds=(1, 86_400), group=GROUP)


def key_of(environment: Mapping[str, str] = os.environ) -> str:
    """The server's key: OPENAI_SERVER_KEY, or the content of the file that OPENAI_SERVER_KEY_FILE names; "" for none. Raises SettingsError.

    From the environment alone, so that it is in no settings file, on no command line and in no status, and no page can make a file its key.
    """
    key, file = environment.get(KEY, ""), environment.get(KEY_FILE, "")
    if not key and file:
        try:
            with Path(file).expanduser().open(encoding="ascii") as opened:
                key = opened.read(4096)
        except (OSError, ValueError):
            raise SettingsError(f"The file that {KEY_FILE} names cannot be read. Correct the variable, or the file.") from None
    key = key.strip()
    if not re.fullmatch(r"[!-~]{0,4000}", key):
        raise SettingsError(f"{KEY} is no key: it holds a character that keys cannot have. Correct it.")
    return key
