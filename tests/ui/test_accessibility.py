"""axe-core finds no serious or critical fault: the chat page with all that opens over it, in light and dark, in each style, and the other tabs."""

import pytest

from tests.ui.acting import ask, filled
from tests.ui.test_browser_look import STYLED, STYLES, WIDE, mode, opened, panel, style

pytestmark = pytest.mark.browser

base = pytest.importorskip("axe_playwright_python.base")
expect = pytest.importorskip("playwright.sync_api").expect

RICH = """# A title

Some `code`, **bold** and a [link](https://example.org), then $x^2$.

```python
def f(x): return x + 1  # a comment
```

| a | b |
|---|---|
| 1 | 2 |

> A quotation
"""
SCHEMES = ("light", "dark")
SETTLED = """async (dark) => {
  const frame = () => new Promise((next) => requestAnimationFrame(next));
  for (let still = 0, left = 1000; still < 10; left--) {
    await frame();
    const moving = document.getAnimations().some((each) => each instanceof CSSTransition);
    still = document.body.classList.contains('dark') === dark && !moving ? still + 1 : 0;
    if (!left) throw new Error('the colours did not settle');
  }
}"""
"""The page has the colours asked for; none of them is on its way to another."""


def faults(tab) -> list[str]:
    """What axe-core says that is serious or critical, in light and in dark. The script is put in by the test: the page's policy takes none."""
    tab.evaluate(base.AXE_SCRIPT)
    told = []
    for scheme in SCHEMES:
        tab.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        tab.evaluate(SETTLED, scheme == "dark")
        found = tab.evaluate("axe.run(document, { resultTypes: ['violations'] }).then((told) => told.violations)")
        told += [
            f"{each['id']}: {scheme}: {node['html'][:160]} ({node['failureSummary'][:200]})"
            for each in found
            if each["impact"] in ("serious", "critical")
            for node in each["nodes"]
        ]
    return told


@pytest.fixture
def tab(live_server, new_tab):
    """A conversation with two messages, the panel beside it."""
    page = new_tab("/", WIDE)
    filled(page)
    live_server.backend.script = [RICH]
    ask(page, "Hello there")
    page.locator(".tgw-msg.assistant .tgw-figures").wait_for()
    page.mouse.move(5, 5)
    return page


def test_axe_finds_what_is_wrong(tab):
    """So that an empty list means something."""
    tab.evaluate("document.querySelector('.tgw-welcome').insertAdjacentElement('afterend', document.createElement('img'))")
    assert [fault for fault in faults(tab) if fault.startswith("image-alt")]


def test_the_conversation_with_the_panel(tab):
    expect(panel(tab)).to_be_visible()
    assert faults(tab) == []
    mode(tab, "chat-instruct")
    expect(tab.locator(".tgw-people")).to_be_visible()
    assert faults(tab) == []


def test_an_empty_page(new_tab):
    assert faults(new_tab()) == []


def test_an_open_dialog(tab):
    tab.keyboard.press("Control+/")
    tab.locator("dialog[open]").wait_for()
    assert faults(tab) == []
    tab.keyboard.press("Escape")
    tab.locator(".tgw-msg.assistant").get_by_role("button", name="tokens").or_(tab.locator(".tgw-figures")).first.click()
    tab.locator("dialog[open]").wait_for()
    assert faults(tab) == []


def test_an_open_menu(tab):
    tab.locator(".tgw-msg.assistant").get_by_label("More to do with this message").click()
    tab.get_by_role("menu").wait_for()
    assert faults(tab) == []
    tab.keyboard.press("Escape")
    tab.locator(".tgw-composer textarea").press_sequentially("/")
    tab.get_by_role("listbox", name="Commands").wait_for()
    assert faults(tab) == []


def test_a_message_being_edited_and_a_toast(tab):
    tab.locator(".tgw-msg.user").get_by_label("Edit", exact=True).click()
    tab.locator(".tgw-edit textarea").wait_for()
    tab.evaluate("window.tgw.call('GET', 'chat/conversations/none')")
    tab.locator(".tgw-toast").wait_for()
    assert faults(tab) == []


def test_replies_side_by_side(tab, live_server):
    tab.locator(".tgw-composer textarea").fill("Again")
    tab.get_by_label("More to do", exact=True).click()
    tab.get_by_role("menuitem", name="Several answers…").click()
    tab.get_by_role("menuitem", name="2 answers").click()
    expect(tab.get_by_role("button", name="Choose this one")).to_have_count(2)
    assert faults(tab) == []


def test_each_style(tab):
    for name in [*(name for name in STYLES if name != "modern"), "modern"]:
        style(tab, name)
        tab.wait_for_function(STYLED, arg=name)
        assert faults(tab) == [], name


def test_the_other_tabs(tab):
    for name in ("Parameters", "Model"):
        tab.get_by_role("tab", name=name).click()
        tab.locator(".tgw-page:visible").first.wait_for()
        assert faults(tab) == [], name


def test_a_telephone(live_server, new_browser):
    tab = opened(new_browser(viewport={"width": 390, "height": 844}, has_touch=True).new_page(), live_server)
    ask(tab, "Hello")
    assert faults(tab) == []
    tab.get_by_role("button", name="Show conversations").tap()
    assert faults(tab) == []
