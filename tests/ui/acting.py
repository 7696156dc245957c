"""What tests of the page do in a tab, by the names that people use."""

from playwright.sync_api import expect

SLOW_FRAMES = "const soon = window.requestAnimationFrame; window.requestAnimationFrame = (draw) => setTimeout(() => soon(draw), 300);"
"""A script: what is done in the next frame is done 300 ms later, as on a machine with much to do."""


def box(tab):
    """Where a message is typed."""
    return tab.locator(".tgw-composer textarea")


def send(tab, text):
    box(tab).fill(text)
    box(tab).press("Enter")


def user(tab):
    """The last message of the user."""
    return tab.locator(".tgw-msg.user").last


def reply(tab):
    """The last message of the model."""
    return tab.locator(".tgw-msg.assistant").last


def finished(tab):
    """Nothing is being written, and the page waits for no answer of the server."""
    expect(tab.locator(".tgw-send")).to_have_attribute("aria-label", "Send")
    expect(tab.locator(".tgw-composer")).to_have_attribute("aria-busy", "false")


def ask(tab, text):
    """Send a message, on a telephone too, and wait for the end of the reply."""
    box(tab).fill(text)
    tab.get_by_role("button", name="Send", exact=True).click()
    expect(user(tab)).to_contain_text(text)
    finished(tab)


def two_frames(tab):
    """What was to be done in the next frame, or the one after it, is done."""
    tab.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def filled(tab):
    """The controls show what is in effect."""
    tab.wait_for_function("window.tgw?.painted()")


def parameters(tab):
    """Go to the Parameters tab, which shows what is in effect."""
    tab.get_by_role("tab", name="Parameters").click()
    tab.locator(".knob-temperature").wait_for()
    filled(tab)
