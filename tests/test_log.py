import io
import logging
import re

import pytest

from modules import log


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def former_handlers():
    kept = log.logger.handlers[:], log.logger.level, log.logger.propagate
    yield
    log.logger.handlers[:], log.logger.propagate = kept[0], kept[2]
    log.logger.setLevel(kept[1])  # forgets too which levels were found enabled


def test_plain_text_where_the_stream_is_no_terminal():
    stream = io.StringIO()
    log.setup(stream=stream)
    log.logger.info("Loaded %s", "a model")
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO    Loaded a model\n", stream.getvalue())


def test_colours_only_the_level(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    log.setup(stream=stream)
    log.logger.error("ERROR twice")
    assert stream.getvalue().count("\033[31m") == 1
    assert "\033[31mERROR\033[0m   ERROR twice" in stream.getvalue()


def test_no_color_is_honoured(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "")
    stream = Terminal()
    log.setup(stream=stream)
    log.logger.error("x")
    assert "\033" not in stream.getvalue()


def test_verbose_shows_debug_and_a_second_setup_replaces_the_first():
    first, second = io.StringIO(), io.StringIO()
    log.setup(verbose=False, stream=first)
    log.logger.debug("hidden")
    log.setup(verbose=True, stream=second)
    log.logger.debug("shown")
    assert first.getvalue() == ""
    assert second.getvalue().count("shown") == 1
    assert log.logger.level == logging.DEBUG and not log.logger.propagate
