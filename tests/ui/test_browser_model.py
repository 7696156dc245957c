"""The Model tab's card in a real browser: what the engine does, kept up to date while somebody looks."""

from dataclasses import replace

import pytest

from modules.backends.base import EngineStats
from tests.fakes import FakeBackend, until

pytestmark = pytest.mark.browser

expect = pytest.importorskip("playwright.sync_api").expect

WORKING = EngineStats(2, 4, 1, 64, 8192, 2048, 5, 12, 89_000_000, 300_000_000)
SEEN = """() => new Promise((done) => {
    const observer = new IntersectionObserver((seen) => { observer.disconnect(); done(seen.at(-1).isIntersecting); });
    observer.observe(document.querySelector('#tgw-status .tgw-card'));
})"""
HIDE = """(value) => {
    Object.defineProperty(document, 'hidden', { value, configurable: true });
    document.dispatchEvent(new Event('visibilitychange'));
}"""


@pytest.fixture
def measured(live_server):
    """The server, its model with stats."""
    live_server.engine.make = lambda: FakeBackend(features=frozenset({"stats"}))
    live_server.app.models.load(live_server.app.models.choose("model.fake"))
    live_server.backend.told = WORKING
    return live_server


@pytest.fixture
def card(measured, new_tab):
    """A tab that shows the card, with a clock that goes on only when it is told; `asked`: the requests so far."""
    tab = new_tab()
    tab.clock.install()
    tab.asked = []
    tab.on("request", lambda request: tab.asked.append(request.url) if request.url.endswith("/models/status") else None)
    open_tab(tab, "Model")
    expect(fact(tab, "Waiting")).to_have_text("1")
    return tab


def open_tab(tab, name):
    tab.get_by_role("tab", name=name).click()


def fact(tab, name):
    return tab.locator("#tgw-status dl > div", has=tab.get_by_text(name, exact=True)).locator("dd")


def in_use(tab):
    """The part of the bar that is coloured."""
    return tab.get_by_role("meter", name="Cache in use").evaluate("(bar) => bar.value / bar.max")


def seen(tab) -> bool:
    """Whether the card can be seen; the page's own observer has heard of it then."""
    return tab.evaluate(SEEN)


def let_pass(tab):
    """Time for several requests, each of them answered: the answer of one sets the clock for the next."""
    for _ in range(4):
        tab.evaluate("fetch('models').then((answer) => answer.text())")
        tab.clock.run_for(2000)
    tab.evaluate("fetch('models').then((answer) => answer.text())")


def test_the_card_shows_what_the_engine_does_and_keeps_up(card, measured):
    expect(fact(card, "Replies under way")).to_have_text("2 of 4")
    expect(fact(card, "Chats kept")).to_have_text("5 + 12 in main memory (85 MiB)")
    expect(card.locator(".tgw-cache")).to_contain_text("2,048 of 8,192 tokens")
    assert in_use(card) == 0.25
    card.evaluate("window.before = document.querySelector('.tgw-card dl dd')")
    measured.backend.told = replace(WORKING, busy_sequences=3, waiting=0, cells_used=4096, spilled_sequences=0)
    measured.backend.memory = lambda: 3 * 2**30
    card.clock.run_for(2000)
    expect(fact(card, "Replies under way")).to_have_text("3 of 4")
    expect(fact(card, "Memory")).to_have_text("3.0 GiB")
    expect(fact(card, "Chats kept")).to_have_text("5")
    assert in_use(card) == 0.5
    assert card.evaluate("window.before.isConnected")  # changed in place: selected text stays selected
    assert card.locator("[aria-live] dl, [aria-live] .tgw-cache").count() == 0  # numbers are not read out again and again


def test_the_server_is_asked_only_while_the_card_is_seen(card):
    assert seen(card)
    asked = len(card.asked)
    card.clock.run_for(2000)
    until(lambda: card.evaluate("1") and len(card.asked) == asked + 1)
    open_tab(card, "Chat")
    assert not seen(card)
    asked = len(card.asked)
    let_pass(card)
    assert len(card.asked) == asked
    open_tab(card, "Model")
    until(lambda: card.evaluate("1") and len(card.asked) == asked + 1)  # at once
    card.evaluate(HIDE, True)
    asked = len(card.asked)
    let_pass(card)
    assert len(card.asked) == asked
    card.evaluate(HIDE, False)
    until(lambda: card.evaluate("1") and len(card.asked) == asked + 1)


def test_it_goes_on_after_a_break_in_the_connection(card, measured):
    card.route("**/models/status", lambda route: route.abort())
    card.clock.run_for(2000)
    card.unroute("**/models/status")
    measured.backend.told = replace(WORKING, waiting=9)
    until(lambda: card.clock.run_for(2000) or fact(card, "Waiting").text_content() == "9")


def test_with_the_model_the_figures_go_and_another_brings_its_own(card, measured):
    measured.app.models.unload()
    expect(card.locator("#tgw-status header")).to_contain_text("No model is loaded")
    expect(card.locator(".tgw-cache")).to_be_hidden()
    expect(card.locator("#tgw-status dd")).to_have_count(0)
    asked = len(card.asked)
    let_pass(card)
    assert len(card.asked) == asked
    measured.app.models.load(measured.app.models.choose("other.fake"))
    expect(fact(card, "Replies under way")).to_have_text("0 of 1")  # at once
    expect(card.locator(".tgw-cache")).to_be_hidden()  # an engine without cells


def test_an_engine_that_tells_nothing_has_a_card_without_figures(live_server, new_tab):
    tab = new_tab()
    with tab.expect_response("**/models/status"):
        open_tab(tab, "Model")
    expect(fact(tab, "Context")).to_have_text("2,048 tokens")
    expect(fact(tab, "Waiting")).to_have_count(0)
    expect(tab.locator(".tgw-cache")).to_be_hidden()


@pytest.mark.parametrize("width", [390, 1280])
def test_the_card_fits(card, measured, width):
    measured.backend.told = EngineStats(128, 128, 10_000, 0, 10**7, 9_999_999, 1000, 10_000, 10**12, 10**12)
    card.clock.run_for(2000)
    expect(fact(card, "Waiting")).to_have_text("10,000")
    card.set_viewport_size({"width": width, "height": 844})
    inside = "(card) => [...card.querySelectorAll('*')].every((e) => e.getBoundingClientRect().right <= card.getBoundingClientRect().right)"
    assert card.locator("#tgw-status .tgw-card").evaluate(inside)
    assert card.evaluate("document.documentElement.scrollWidth <= innerWidth")
