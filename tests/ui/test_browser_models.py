"""The Model tab in a real browser: choosing, the card, memory, options, loading, adapters, downloads, conversions."""

import hashlib
import threading
from contextlib import contextmanager
from unittest import mock

import pytest

from modules import app as building
from modules.downloads import Downloads
from tests import hub_server
from tests.fakes import WAIT, until
from tests.ui.acting import SLOW_FRAMES, two_frames
from tests.ui.conftest import Live, serving
from tests.ui.model_help import BROKEN, GIB, OTHER, TINY, built, machine
from tests.ui.test_accessibility import faults

pytestmark = pytest.mark.browser

expect = pytest.importorskip("playwright.sync_api").expect

STILL = """const sheet = new CSSStyleSheet();
sheet.replaceSync('*, ::before, ::after { transition: none !important }');
document.adoptedStyleSheets.push(sheet);"""
"""Colours change at once, so that none is measured on its way to another."""
TOUCHED = "#tgw-tab-model :is(button, input:not([type=checkbox], [type=radio], [type=range]), select)"


@contextmanager
def live(folder, listener, *flags, empty=False):
    with built(folder, *flags, empty=empty) as (engine, app, who), serving(app, who, listener) as url:
        yield Live(app, who, engine, url)


@pytest.fixture
def live_server(tmp_path, listener, request):
    """The server of `new_tab`, on a machine with 1 GiB free and a GPU of 1 GiB."""
    with machine(of_gpu=GIB), live(tmp_path, listener, *getattr(request, "param", ())) as made:
        yield made


@pytest.fixture
def tab(new_tab):
    """The Model tab, with the model in use chosen."""
    page = new_tab()
    open_tab(page)
    expect(card(page)).to_contain_text("2,048 tokens")
    expect(memory(page)).to_contain_text("It fits")
    painted(page)
    return page


def painted(tab):
    """The options shown are those of the model chosen: what is typed from now on is not painted over."""
    tab.wait_for_function("window.tgwModel.painted()")


def open_tab(page):
    page.get_by_role("tab", name="Model").click()


def card(tab):
    return tab.locator("#tgw-model-card section")


def memory(tab):
    return tab.locator(".tgw-memory")


def menu(tab, name):
    """One of the menus above: Model, Loader, Template."""
    return tab.locator(".tgw-choose").get_by_label(name, exact=True)


def choose(tab, name, menu_name="Model"):
    """With the keyboard, as one who types a part of the name."""
    menu(tab, menu_name).click()
    menu(tab, menu_name).fill(name)
    offered(tab).filter(has_text=name).first.wait_for()
    menu(tab, menu_name).press("Enter")
    expect(menu(tab, menu_name)).to_have_value(name)


def offered(tab):
    """What an open menu above offers."""
    return tab.locator("li[role=option]")


def unfold(tab, title):
    tab.locator("#tgw-tab-model button.label-wrap", has_text=title).click()
    painted(tab)


def press(tab, name):
    tab.locator("#tgw-tab-model").get_by_role("button", name=name, exact=True).click()


def context(tab):
    """The number of the context's slider."""
    return tab.locator("#tgw-tab-model .loader-fake .knob-ctx_size input[type=number]")


def answer(tab, name):
    tab.get_by_role("dialog").get_by_role("button", name=name, exact=True).click()
    expect(tab.get_by_role("dialog")).to_have_count(0)


def ready(tab, live_server, name):
    expect(tab.locator("#tgw-status")).to_contain_text(name)
    until(lambda: live_server.app.models.status().state == "ready")


def test_a_model_is_looked_at_and_another_is_found_by_typing(tab, live_server):
    expect(card(tab)).to_contain_text("Chat template")
    press(tab, "Compute the SHA-256 of the file")
    expect(card(tab).locator("code")).to_have_text(hashlib.sha256((live_server.app.data.models / TINY).read_bytes()).hexdigest())
    choose(tab, OTHER)
    expect(card(tab)).to_contain_text("Gemma 3")
    choose(tab, BROKEN)
    expect(card(tab).locator("pre")).to_contain_text(f"{BROKEN} is not a GGUF file")
    expect(memory(tab)).to_have_count(0)
    options = live_server.app.models.names()
    menu(tab, "Model").click()
    expect(offered(tab)).to_have_text([f"✓ {name}" for name in options])  # natural order
    assert options == [BROKEN, TINY, OTHER]


def test_memory_follows_the_options_and_sets_them(tab, live_server):
    words = memory(tab).get_by_role("img").last
    before = words.get_attribute("aria-label")
    unfold(tab, "fake: llama.cpp")
    context(tab).fill("512")
    context(tab).press("Enter")
    expect(words).not_to_have_attribute("aria-label", before)
    press(tab, "Largest context that fits: 2,048")
    expect(context(tab)).to_have_value("2048")
    press(tab, "Best number of GPU layers: 4")
    expect(tab.locator(".loader-fake .knob-gpu_layers input[type=number]")).to_have_value("4")
    press(tab, "Load")
    until(lambda: len(live_server.engine.asked) == 2)
    name, options = live_server.engine.asked[-1]
    assert (name, options.ctx_size, options.gpu_layers) == (TINY, 2048, 4)


def test_what_is_typed_at_first_sight_stands(new_tab, live_server):
    page = new_tab(script=SLOW_FRAMES)
    open_tab(page)
    expect(memory(page)).to_contain_text("It fits")
    two_frames(page)  # Gradio closes again what is opened before
    page.locator("#tgw-tab-model button.label-wrap", has_text="fake: llama.cpp").click()
    context(page).fill("512")
    two_frames(page)
    expect(context(page)).to_have_value("512")
    assert page.evaluate("tgwModel.changed") == {"ctx_size": 512}


def test_settings_are_kept_for_each_model(tab, live_server):
    unfold(tab, "fake: llama.cpp")
    context(tab).fill("512")
    context(tab).press("Enter")
    press(tab, "Save settings")
    expect(tab.get_by_text("Saved for this model.")).to_be_visible()
    painted(tab)
    choose(tab, "Alpaca", "Template")
    until(lambda: live_server.app.model_settings.get(TINY).instruction_template == "Alpaca")
    choose(tab, OTHER)
    expect(context(tab)).to_have_value("0")
    expect(menu(tab, "Template")).to_have_value("The model’s own")
    choose(tab, TINY)
    expect(context(tab)).to_have_value("512")
    expect(menu(tab, "Template")).to_have_value("Alpaca")
    assert live_server.app.model_settings.get(TINY).options == {"ctx_size": 512}
    press(tab, "Forget settings")
    expect(context(tab)).to_have_value("0")
    expect(menu(tab, "Template")).to_have_value("The model’s own")


def test_what_does_not_fit_is_asked_about(tab, live_server):
    choose(tab, OTHER)
    expect(card(tab)).to_contain_text("Gemma 3")
    with machine(free=1 << 20):
        press(tab, "Load")
        expect(tab.get_by_role("dialog")).to_contain_text("does not fit")
        answer(tab, "Cancel")
        assert live_server.app.models.status().name == TINY
        press(tab, "Refresh")
        expect(memory(tab)).to_contain_text("It does not fit")
        press(tab, "Load")
        answer(tab, "Load")
        ready(tab, live_server, OTHER)


def test_loading_shows_progress_is_cancelled_and_begun_again(tab, live_server):
    live_server.engine.go.clear()
    choose(tab, OTHER)
    press(tab, "Load")
    expect(tab.locator("#tgw-status progress")).to_have_js_property("value", 0.5)
    expect(tab.get_by_role("button", name="Load", exact=True)).to_be_hidden()
    press(tab, "Cancel")
    expect(tab.locator("#tgw-status")).to_contain_text("Loading was cancelled.")
    live_server.engine.go.set()
    ready(tab, live_server, TINY)
    loads = len(live_server.engine.asked)
    press(tab, "Reload")
    until(lambda: len(live_server.engine.asked) == loads + 1)
    assert live_server.engine.asked[-1][0] == TINY
    ready(tab, live_server, TINY)
    press(tab, "Unload")
    expect(tab.locator("#tgw-status")).to_contain_text("No model is loaded")


@pytest.mark.parametrize("live_server", [("--max-loaded-models", "2")], indirect=True)
def test_several_models_in_memory_are_listed(tab, live_server):
    live_server.app.models.load(live_server.app.models.choose(OTHER))
    listed = tab.get_by_role("list", name="Models in memory").get_by_role("listitem")
    expect(listed).to_have_count(2)
    press(tab, f"Unload {TINY}")
    expect(listed).to_have_count(0)
    assert [each.name for each in live_server.app.models.loaded()] == [OTHER]


def test_a_model_is_deleted_after_a_question(tab, live_server):
    press(tab, "Delete…")  # it is the one in use
    expect(tab.get_by_text("Unload it first")).to_be_visible()
    choose(tab, OTHER)
    expect(card(tab)).to_contain_text("Gemma 3")
    press(tab, "Delete…")
    expect(tab.get_by_role("dialog")).to_contain_text(OTHER)
    answer(tab, "Cancel")
    assert OTHER in live_server.app.models.names()
    press(tab, "Delete…")
    answer(tab, "Delete")
    expect(menu(tab, "Model")).to_have_value(TINY)
    assert live_server.app.models.names() == [BROKEN, TINY]


def test_adapters_are_chosen_with_scales(tab, live_server):
    unfold(tab, "LoRA adapters")
    tab.get_by_label("Scale of one.gguf").fill("0.25")
    expect(tab.get_by_label("one.gguf", exact=True)).to_be_checked()
    press(tab, "Apply")
    expect(tab.get_by_text("Adapters in use: 1.")).to_be_visible()
    assert [(each.path.name, each.scale) for each in live_server.app.models.adapters] == [("one.gguf", 0.25)]
    tab.get_by_label("bad.gguf", exact=True).check()
    press(tab, "Apply")
    expect(tab.get_by_text("does not fit this model")).to_be_visible()
    tab.get_by_label("bad.gguf", exact=True).uncheck()
    tab.get_by_label("one.gguf", exact=True).uncheck()
    press(tab, "Apply")
    expect(tab.get_by_text("No adapter is in use.")).to_be_visible()
    assert live_server.app.models.adapters == ()


@pytest.fixture
def hub():
    """A hub with a model that can be loaded, in two formats, one of them in two parts."""
    name = "some-{}.gguf"
    data = b"GGUF" + b"x" * 400_000
    files = {name.format("Q4_K_M"): data, name.format("F16-00001-of-00002"): data, name.format("F16-00002-of-00002"): data, "README.md": b"Hi"}
    with (
        hub_server.serving(files=files) as made,
        mock.patch.object(building, "Downloads", lambda data: Downloads(data, made.url, token="", pause=0.01)),
    ):
        yield made


def test_a_model_is_downloaded(hub, live_server, tab):
    hub.hold = threading.Event()
    unfold(tab, "Download a model")
    tab.get_by_label("Repository on the Hub").fill("some/none")
    press(tab, "Show files")
    expect(tab.locator(".tgw-plan pre")).to_be_visible()
    tab.get_by_label("Repository on the Hub").fill("some/model")
    press(tab, "Show files")
    rows = tab.locator(".tgw-files tbody tr")
    expect(rows).to_have_count(3)
    expect(tab.get_by_label("some-Q4_K_M.gguf")).to_be_checked()
    expect(rows.filter(has_text="F16")).to_contain_text("782 KiB")  # both parts
    rows.filter(has_text="F16").click()
    expect(tab.get_by_label("some-F16-…-of-00002.gguf")).to_be_checked()
    rows.filter(has_text="F16").click()
    press(tab, "Download 391 KiB")
    job = tab.get_by_role("list", name="Downloads").get_by_role("listitem")
    expect(job).to_contain_text("of 391 KiB")
    press(tab, "Pause: some-Q4_K_M.gguf")
    expect(job).to_contain_text("Paused")
    press(tab, "Resume: some-Q4_K_M.gguf")
    hub.hold.set()
    expect(job).to_contain_text("Done, 391 KiB")
    menu(tab, "Model").click()
    expect(offered(tab).filter(has_text="some-Q4_K_M.gguf")).to_be_visible()
    press(tab, "Take off the list: some-Q4_K_M.gguf")
    expect(job).to_have_count(0)


def test_a_model_is_converted(tab, live_server):
    models = live_server.app.data.models
    unfold(tab, "Convert a model")
    tab.get_by_label("Model or adapter").select_option(label=TINY)
    tab.get_by_label("Convert to").select_option(label="Hugging Face folder, bfloat16")
    press(tab, "Convert")
    expect(tab.locator(".tgw-jobs progress[aria-label=tiny-9-bfloat16]")).to_have_js_property("value", 0.25)
    press(tab, "Cancel the conversion")
    expect(tab.get_by_text("The conversion was cancelled.")).to_be_visible()
    (models / "go").touch()
    press(tab, "Convert")
    expect(tab.get_by_text("tiny-9-bfloat16 is ready.")).to_be_visible()
    press(tab, "Convert")
    expect(tab.get_by_text("exists already")).to_be_visible()


def test_without_models_it_says_what_to_do(tmp_path, listener, chromium):
    with machine(), live(tmp_path, listener, empty=True) as made:
        context = chromium.new_context()
        tab = context.new_page()
        tab.set_default_timeout(WAIT * 1000)
        tab.goto(made.url)
        tab.locator(".tgw-composer textarea").wait_for()
        open_tab(tab)
        expect(card(tab)).to_contain_text("No model yet: download one below")
        expect(tab.get_by_label("Repository on the Hub")).to_be_visible()
        assert tab.get_by_role("button", name="Delete…").is_hidden()
        context.close()


def test_on_a_telephone_all_is_within_reach(new_browser, live_server):
    tab = new_browser(viewport={"width": 390, "height": 844}, has_touch=True).new_page()
    tab.goto(live_server.url)
    tab.locator(".tgw-composer textarea").wait_for()
    open_tab(tab)
    expect(memory(tab)).to_contain_text("It fits")
    for title in ("LoRA adapters", "Download a model", "Convert a model"):
        unfold(tab, title)
    expect(tab.get_by_label("Scale of one.gguf")).to_be_visible()
    expect(tab.get_by_label("Model or adapter")).to_be_visible()
    assert tab.evaluate("document.querySelector('#tgw-tab-model').scrollWidth") <= 390
    small = "(all) => all.filter((e) => e.offsetParent && e.getBoundingClientRect().height < 40).map((e) => e.outerHTML.slice(0, 120))"
    assert tab.locator(TOUCHED).evaluate_all(small) == []


def test_axe_finds_no_fault_on_the_tab(hub, live_server, tab):
    """With a card, memory, all sections open, files offered, a question; and with a broken model."""
    hub.hold = threading.Event()
    tab.evaluate(STILL)
    for title in ("LoRA adapters", "Download a model", "Convert a model", "fake: llama.cpp"):
        unfold(tab, title)
    tab.get_by_label("Repository on the Hub").fill("some/model")
    press(tab, "Show files")
    press(tab, "Download 391 KiB")
    expect(tab.get_by_role("list", name="Downloads")).to_contain_text("of 391 KiB")
    press(tab, "Show files")
    expect(tab.locator(".tgw-files tbody tr")).to_have_count(3)
    expect(tab.get_by_label("Scale of one.gguf")).to_be_visible()
    tab.get_by_label("Model or adapter").select_option(label=BROKEN)
    press(tab, "Convert")
    expect(tab.get_by_role("button", name="Cancel the conversion")).to_be_visible()
    assert faults(tab) == []
    choose(tab, OTHER)
    press(tab, "Delete…")
    expect(tab.get_by_role("dialog")).to_be_visible()
    assert faults(tab) == []
    answer(tab, "Cancel")
    choose(tab, BROKEN)
    expect(card(tab).locator("pre")).to_be_visible()
    assert faults(tab) == []
