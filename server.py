"""Starts everything: settings -> App -> model -> serve. `python start.py` installs what is needed first and then runs this."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from modules import app, auth, launch, log, places, system
from modules.errors import UserError
from modules.log import logger
from modules.paths import UserData
from modules.settings import Configuration
from modules.ui.views import BlockPresenter

ROOT = Path(__file__).resolve().parent


def main(argv: Sequence[str]) -> int:
    """Run the server until a signal ends it; the result is the process's exit code."""
    log.setup()
    system.exit_when_terminated()
    try:
        configuration = launch.configure(ROOT, argv)
        log.setup(configuration.settings.verbose)
        for warning in configuration.warnings:
            logger.warning("%s", warning)
        data = launch.user_data(ROOT, configuration.settings)
        data.create()
        os.environ.update(system.program_environment(data.root))
        with system.lock_file(data.lock, "server", "Stop it, or start this one with another --user-data-dir."):
            return run(configuration, data)
    except UserError as error:
        logger.error("%s", error)
        return 1
    except KeyboardInterrupt:
        return 130


def run(configuration: Configuration, data: UserData) -> int:
    """Build the App, begin to load the model, serve the page, the API or both."""
    settings = configuration.settings
    who = auth.Auth(logins(configuration), data.sessions, cookie_secure=bool(settings.ssl_certfile))
    caches = {} if settings.only_own_models else places.other_programs(os.environ, Path.home())
    built = app.build(configuration, data, launch.open_store(data, settings.multi_user), BlockPresenter, caches)
    try:
        launch.load_first_model(built.models, settings)
        if settings.nowebui:
            from modules.api import server

            server.serve_alone(built)
            return 0
        from modules.ui import serve  # Gradio takes seconds to import: the engine loads the model meanwhile

        serve.serve(built, who)
    finally:
        built.close()
    return 0


def logins(configuration: Configuration) -> dict[str, str]:
    """The configured logins; one is made up and printed when others can reach the page and none is configured."""
    settings = configuration.settings
    path = Path(settings.gradio_auth_path).expanduser() if settings.gradio_auth_path else None
    users, made_up = auth.require_login(settings.listen or settings.share, auth.read_users(settings.gradio_auth, path))
    if made_up:
        logger.warning("Others can reach this page, so it needs a login. For this run: user admin, password %s (or give --gradio-auth).", made_up)
    return users


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
