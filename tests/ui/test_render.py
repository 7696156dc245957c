"""Markdown -> safe HTML blocks: streaming equals whole, bounded work, nothing hostile gets through."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from time import thread_time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modules.ui import formulas, markdown, render
from modules.ui.render import BlockRenderer, BlockUpdate, render_blocks, render_plain

SAMPLE = r"""# Title

Some **bold**, *it*, ~~gone~~ and `code`
second line

Setext
===

1. one
2. two

   continued
   - nested
     ```py
     x = 1
     ```
3. three
lazy

- [ ] todo
- [x] done

> quote
> ```
> fence
> ```
lazy no more

| a | b |
|---|--:|
| 1 | 2 |
| 3 | 4 |
text row

```python
def f():
    return "```"
  ~~~
```
~~~
other
~~~

    indented

    code

$$
a
- b
$$
\[ x^2
= y \]
It is $5 and $10, $x$ and \(y\).
[a]: http://x.org "title
over lines"

***
```unclosed
end"""


def text_of(fragment: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", fragment))


def stream(pieces: list[str]) -> tuple[list[str], list[BlockUpdate]]:
    """What a listener has on its page at the end, applying updates as the page does; checks the rules of updates on the way."""
    renderer, page, closed, sent = BlockRenderer(), [], set(), []

    def apply(updates: list[BlockUpdate]) -> None:
        for update in updates:
            assert update.index not in closed, "a closed block was sent again"
            assert update.index <= len(page)
            sent.append(update)
            if update.append:
                assert page[update.index].count("</code>") == 1 and "<" not in update.html
                page[update.index] = page[update.index].replace("</code>", update.html + "</code>")
            else:
                page[update.index : update.index + 1] = [update.html]
            if update.closed:
                closed.add(update.index)
        assert page == renderer.blocks(), "the snapshot is what the listeners have"

    for piece in pieces:
        renderer.feed(piece)
        apply(renderer.updates())
    apply(renderer.finish())
    assert renderer.finish() == []
    assert closed == set(range(len(page)))
    return page, sent


# Streaming equals whole ---------------------------------------------------------------------------------------------------------------------

LINES = st.sampled_from(
    [
        *(
            "",
            "",
            " ",
            "text",
            "text",
            "    code",
            "  two",
            "- a",
            "- a",
            "  - b",
            "    - c",
            "-",
            "* x",
            "1. a",
            "2. b",
            "1) c",
            "> q",
            "> - q",
            ">",
        ),
        *(
            "```",
            "```py",
            "````",
            "~~~",
            " ```",
            "   - ```",
            "> ```",
            "a | b",
            "--|--",
            "|-|",
            "| x | y |",
            "===",
            "---",
            "# h",
            "##",
            "$$",
            "$$ x",
            "x $$",
        ),
        *(
            "$$x$$",
            "\\[",
            "\\]",
            "\\[ a \\]",
            "  $$",
            "- $$",
            "[a]: /u",
            '[a]: /u "t',
            '"',
            "'t'",
            "<div>",
            "</div>",
            "<!--",
            "-->",
            "\t- t",
            "\tx",
            "***",
        ),
    ]
)
MARKDOWN = st.lists(LINES, max_size=14).map("\n".join)
CHARACTERS = st.text(alphabet=" \t\n\n\n\r`~*_-+>#|$\\[]()!<&:=1.ab\0\ud800\u2028\f", max_size=80)


@settings(max_examples=400, deadline=None)
@given(text=MARKDOWN | CHARACTERS, data=st.data())
def test_any_cut_gives_the_blocks_of_the_whole_text(text, data):
    whole = render_blocks(text)
    assert stream(list(text))[0] == whole
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    assert stream([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)])[0] == whole


@example(text="  $$\n~~~\n---\n```py\n> > a\n\\]\n\tx\n~~~\nx $$\n- $$\n> q\n   - ```\n- $$\n\t- t\n  two\n10. x\n2. b", step=1)
@settings(max_examples=150, deadline=None)
@given(text=st.lists(LINES, min_size=10, max_size=60).map("\n".join), step=st.integers(1, 50))
def test_cuts_inside_long_blocks_do_not_depend_on_the_deltas(text, step):
    patch = pytest.MonkeyPatch()
    patch.setattr(render, "WINDOW", 20)
    patch.setattr(render, "WINDOW_MAX", 80)
    patch.setattr(render, "OPEN_LIMIT", 40)
    patch.setattr(render, "HEADER_LIMIT", 30)
    try:
        whole = render_blocks(text)
        assert stream([text[i : i + step] for i in range(0, len(text), step)])[0] == whole
    finally:
        patch.undo()


@pytest.mark.parametrize("step", [1, 2, 3, 7, 50])
def test_sample_streams_to_the_same_blocks(step):
    pieces = [SAMPLE[i : i + step] for i in range(0, len(SAMPLE), step)]
    assert stream(pieces)[0] == render_blocks(SAMPLE)


def test_sample_has_the_expected_blocks():
    kinds = [re.match(r"<(\w+)", block)[1] for block in render_blocks(SAMPLE)]
    assert kinds == ["h1", "p", "h1", "ol", "ul", "blockquote", "p", "div", "div", "div", "div", "p", "p", "p", "hr", "div"]


def test_no_text_is_lost():
    words = re.findall(r"[A-Za-z]{2,}", SAMPLE.replace("```py\n", "").replace("```python", ""))
    shown = text_of("".join(render_blocks(SAMPLE)))
    assert [word for word in words if word not in shown] == []


def test_a_closed_block_is_parsed_once(monkeypatch):
    """Work counted, not timed: the characters given to the parser per token do not grow with the reply."""
    parsed = []
    original = render.to_html
    monkeypatch.setattr(render, "to_html", lambda source, still_open=False: parsed.append(len(source)) or original(source, still_open))
    renderer = BlockRenderer()
    work = []
    for number in range(200):
        renderer.feed(f"Paragraph {number} with some **words** in it.\n\n")
        renderer.updates()
        work.append(sum(parsed))
        parsed.clear()
    assert max(work[150:]) <= max(work[:50]) + 10


def test_boundaries_look_at_the_open_source_only(monkeypatch):
    seen = []
    block = render.parser().block
    original = block.parse
    monkeypatch.setattr(block, "parse", lambda source, *rest: seen.append(len(source)) or original(source, *rest))
    renderer = BlockRenderer()
    for number in range(600):
        renderer.feed(f"{number + 1}. item number {number}\n")
        renderer.updates()
    assert max(seen) <= render.WINDOW + 100
    assert len(renderer.blocks()) > 2, "a long list is cut between its items"


# Open blocks --------------------------------------------------------------------------------------------------------------------------------


def test_open_fence_sends_deltas_only():
    line = 'print("<&>") # something\n'
    page, sent = stream(["```python\n", *([line] * 5_000), "```", "\n"])
    appended = [update for update in sent if update.append]
    assert len(appended) == 4_999 or len(appended) == 5_000
    assert all(update.html == html.escape(line, quote=False) for update in appended)
    assert text_of(page[0]).endswith("Copy" + line * 5_000)


def test_closing_mark_is_never_shown_as_code():
    page, sent = stream([*"````md\n```\na\n````\nend"])
    assert "".join(update.html for update in sent if update.append) == "```\na\n"
    assert text_of(page[0]) == "mdCopy```\na\n"
    assert page[1] == "<p>end</p>"


def test_code_is_coloured_when_it_closes():
    renderer = BlockRenderer()
    renderer.feed("```python\ndef f(): pass\n")
    (open_update,) = renderer.updates()
    assert not open_update.closed and "<span class=" not in open_update.html.split("<code")[1]
    renderer.feed("```\n")
    (closed,) = renderer.updates()
    assert closed.closed and '<code class="language-python"><span class="k">def</span>' in closed.html
    assert '<button type="button" class="tgw-copy" data-copy="">Copy</button>' in closed.html


@pytest.mark.parametrize("language", ["python", "c++", "html", "nosuchlanguage", "", "json", "erb", "text"])
def test_code_is_shown_to_the_letter(language):
    code = '\n\n  def f(a):\n\t"""x"""\n\n    return `x` & <b> "\'\n\n'
    (block,) = render_blocks(f"```{language}\n{code}```")
    assert text_of(block) == f"{language or 'text'}Copy{code}"


def test_language_name_cannot_leave_its_place():
    (block,) = render_blocks('```py"><img/src=x>{onerror=alert}\nx\n```')
    assert '<code class="language-pyimgsrcxonerroralert">' in block


def test_slow_or_long_code_stays_plain(monkeypatch):
    assert "<span" not in markdown.highlight("x = 1\n" * 20_000, "python")
    assert "<span" not in markdown.highlight("x = " + "1" * 500, "python")
    assert "<span" not in markdown.highlight("x = 1\n" + "\n" * 200 + "y", "java")
    monkeypatch.setattr(markdown, "HIGHLIGHT_SECONDS", -1)
    assert markdown.highlight("x = 2\n", "python") == "x = 2\n"


def test_code_in_an_open_list_is_coloured_only_when_complete():
    renderer = BlockRenderer()
    renderer.feed("- a\n  ```py\n  x = 1\n")
    assert "<span class=" not in renderer.updates()[0].html.split("<code")[1]
    renderer.feed("  ```\n- b")
    assert '<span class="n">x</span>' in renderer.updates()[0].html


def test_unchanged_block_is_not_sent_again():
    renderer = BlockRenderer()
    renderer.feed("word")
    assert len(renderer.updates()) == 1
    assert renderer.updates() == []
    renderer.feed(" ")
    assert renderer.updates() == []


def test_long_open_block_is_shown_as_growing_text():
    page, sent = stream(["word <b> " * 50 for _ in range(80)])
    appended = [update for update in sent if update.append]
    assert len(appended) > 30
    assert all(len(update.html) <= 9 * 50 * 2 for update in appended)
    assert len(page) == 1 and page[0].startswith("<p>word &lt;b&gt; word")


def test_long_open_block_rests_after_being_drawn(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(render, "perf_counter", lambda: clock.append(clock[-1] + 1.0) or clock[-1])
    renderer = BlockRenderer()
    renderer.feed("a " * 2_000)
    assert len(renderer.updates()) == 1
    renderer.feed("b")
    assert renderer.updates() == []
    clock.append(100.0)
    assert renderer.updates()[0].html.endswith("b</p>")


def test_enormous_line_stays_text():
    (block,) = render_blocks("*a* " * 20_000)
    assert block.startswith('<pre class="tgw-plain"><code>*a* *a*')


def test_long_table_repeats_its_header():
    rows = "".join(f"| row {number} | {'x' * 40} |\n" for number in range(1_500))
    blocks = render_blocks("| name | value |\n|---|---|\n" + rows)
    assert len(blocks) > 1
    assert all(block.count("<th>name</th>") == 1 for block in blocks)
    assert [int(n) for n in re.findall(r">row (\d+)<", "".join(blocks))] == list(range(1_500))


def test_long_list_goes_on_counting():
    blocks = render_blocks("".join(f"{number}. item {'x' * 40}\n" for number in range(1, 401)))
    assert len(blocks) > 2
    assert [int(n) for n in re.findall(r'<ol start="(\d+)"', "".join(blocks[1:]))] == [
        1 + sum(b.count("<li>") for b in blocks[:k]) for k in range(1, len(blocks))
    ]


def test_list_that_does_not_count_is_not_cut():
    assert len(render_blocks("1. item xxxxxxxxxxxxxxx\n" * 400)) == 1


def test_line_ends():
    assert stream(["a\r", "\nb\r", "c\r\n", "\r\n", "d"])[0] == ["<p>a<br>\nb<br>\nc</p>", "<p>d</p>"]


def test_blank_text_has_no_blocks():
    assert render_blocks("\n" * 10_000 + "   \n\t") == []
    assert stream([" ", "\n"] * 50)[0] == []


def test_nul_and_surrogates():
    assert stream(["a\0", "\ud83d", "\ude00b"])[0] == ["<p>a\ufffd\ufffd\ufffdb</p>"]


def test_render_plain():
    assert render_plain('<b>\r\n "x" & \0') == '<div class="tgw-plain">&lt;b&gt;\n "x" &amp; \ufffd</div>'


# Markdown -----------------------------------------------------------------------------------------------------------------------------------


def test_references_are_text():
    assert render_blocks("[x][a]\n\n[a]: /u") == ["<p>[x][a]</p>", "<p>[a]: /u</p>"]


def test_table():
    (block,) = render_blocks("a|b\n-|-:\n1|2")
    assert block.startswith('<div class="tgw-table"><table>') and '<td align="right">2</td>' in block and "style" not in block


def test_task_list():
    (block,) = render_blocks("- [x] done\n- [ ] open")
    assert block.count('type="checkbox"') == block.count('disabled=""') == 2 and block.count('checked=""') == 1


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("see https://a.org/b_c?d=1&e=2.", "https://a.org/b_c?d=1&e=2"),
        ("(https://a.org/x_(y))", "https://a.org/x_(y)"),
        ("**http://a.org**", "http://a.org"),
        ("<https://a.org>", "https://a.org"),
        ("[x](mailto:a@b.c)", "mailto:a@b.c"),
    ],
)
def test_links(text, address):
    (block,) = render_blocks(text)
    assert f'<a href="{html.escape(address)}" target="_blank" rel="noopener noreferrer nofollow">' in block


@pytest.mark.parametrize("text", ["xhttp://a.org", "http://", "a: b", "`http://a.org`", "ftp://a.org", "[x](/relative)", "[x](//a.org)", "[x](#id)"])
def test_not_links(text):
    assert "<a" not in render_blocks(text)[0]


def test_remote_image_is_a_link():
    (block,) = render_blocks("![a *cat*](https://a.org/x.png)")
    assert "<img" not in block and '<a href="https://a.org/x.png"' in block and "🖼 a *cat*</a>" in block
    (block,) = render_blocks("[![in a link](https://a.org/x.png)](https://b.org)")
    assert block.count("<a ") == 1 and 'href="https://b.org"' in block


def test_inline_image():
    assert '<img src="data:image/png;base64,iVBORw0=" alt="dot">' in render_blocks("![dot](data:image/png;base64,iVBORw0=)")[0]


# Formulas -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["$x$", r"\(x\)", r"is $x$, and", "**$x$**", "- $x$", "a ($x$)", "|$x$|b|\n|-|-|"])
def test_inline_formula(text):
    assert '<math display="inline"><mrow><mi>x</mi></mrow></math>' in "".join(render_blocks(text))


@pytest.mark.parametrize(
    "text",
    ["$$x$$", "$$\nx\n$$", r"\[x\]", "\\[\nx\n\\]", "Text:\n\\[\nx\n\\]\nmore", "```math\nx\n```", "- $$\n  x\n  $$", "a $$x$$ b", "> $$\n> x\n> $$"],
)
def test_display_formula(text):
    assert '<span class="tgw-display"><math display="block"><mrow><mi>x</mi></mrow></math></span>' in "".join(render_blocks(text))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "$5 and $10",
            "US$5 or US$6",
            "from $5-$10",
            "$5 for one, 6$ for two",
            "costs 5$ and 6$",
            r"\$x\$",
            "$ x $",
            "`$x$`",
            "$$$ cheap $$$ x",
            "$x",
        ),
        *("$$\nx", "\\(x", "\\[\nx\n\ny\\]", "a $x\n\ny$"),
    ],
)
def test_no_formula(text):
    joined = "".join(render_blocks(text))
    assert "<math" not in joined and "tgw-math-error" not in joined


@pytest.mark.parametrize(
    "latex", [r"\frac{a", r"\nosuch{x}", "x^", r"\left( x", r"\begin{cases} 1", r"\newcommand{\a}{\a\a}\a", r"\def\a{\a\a}\a", "y" * 1_990, ""]
)
def test_failed_formula_shows_its_source(latex, monkeypatch):
    monkeypatch.setattr(formulas, "FORMULA_LIMIT", 1_000) if latex.startswith("yy") else None
    joined = "".join(render_blocks(f"```math\n{latex}\n```")) if len(latex) != 1_990 else formulas.formula(latex, True, latex)
    if latex:
        assert f'<code class="tgw-math-error">{html.escape(latex)}' in joined.replace("&gt;", "&gt;")


def test_open_formula_shows_its_source():
    renderer = BlockRenderer()
    renderer.feed("so $$\\frac12 + ")
    assert renderer.updates()[0].html == "<p>so $$\\frac12 +</p>"


@pytest.mark.parametrize(
    ("latex", "part"),
    [
        (r"\begin{aligned} a &= b \\ c &= d \end{aligned}", "<mtable"),
        (r"\lim_{x\to0} f", "<munder><mo>lim</mo>"),
        (r"a \pm b", "±</mo>"),
        (r"x < y", "<mo>&lt;</mo>"),
        (r"\text{<b>&}", "<mtext>&lt;b&gt;&amp;</mtext>"),
        (r"\text{&#xD800;}", "<mtext>\ufffd</mtext>"),
    ],
)
def test_mathml(latex, part):
    assert part in "".join(render_blocks(f"$$\n{latex}\n$$"))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                *"{}[]()^_&'$#%|1xy<>~",
                "\\\\",
                "\\frac",
                "\\sqrt",
                "\\left",
                "\\right",
                "\\begin{cases}",
                "\\end{cases}",
                "\\begin{array}",
                "\\begin{align}",
                "\\end{align}",
                "\\text{",
                "\\color",
                "\\sum",
                "\\lim",
                "\\hspace",
                "\\genfrac",
                "\\limits",
                "\\not",
                "\\href",
                "\\skew",
                "\\tag",
                "\\big",
                "\\unicode",
                "\\rule",
                "\\middle",
                "\\substack",
                "\\overset",
                "\\xrightarrow",
                "\\sideset",
                "\\mathbb",
                "\\style",
                "\\class",
                "\\verb",
                "\\operatorname",
                "\\bra",
                "\\pmod",
            ]
        ),
        max_size=20,
    )
)
def test_no_formula_breaks_the_message(parts):
    (block,) = render_blocks("a \\(" + " ".join(parts) + " z\\) b")
    assert "<math" in block or "tgw-math-error" in block or "(" in block
    assert_safe(block)


# Safety -------------------------------------------------------------------------------------------------------------------------------------

XSS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "[a](javascript:alert(1))",
    "[a](JaVaScRiPt:alert(1))",
    "[a](  javascript:alert(1))",
    "[a](java\tscript:alert(1))",
    "[a](&#106;avascript:alert(1))",
    "[a](&#x6A;avascript&colon;alert(1))",
    "[a](javascript&Tab;:alert(1))",
    "[a](\x01javascript:alert(1))",
    "[a](vbscript:x)",
    "[a](data:text/html;base64,PHNjcmlwdD4=)",
    "[a](data:image/png;base64,AAAA)",
    "[a](file:///etc/passwd)",
    "[a](blob:http://x)",
    "<javascript:alert(1)>",
    "<data:text/html,x>",
    "![a](javascript:alert(1))",
    "![a](data:image/svg+xml;base64,PHN2Zz4=)",
    "![a](data:text/html,x)",
    "![a](http://evil.example/track.gif)",
    "![a](//evil.example/track.gif)",
    '![a](http://evil.example/"onerror="alert(1))',
    '[a](http://x "title\\" onmouseover=\\"alert(1)")',
    '![" onerror="alert(1)](data:image/png;base64,AAAA)',
    "http://x.org/'onmouseover='alert(1)",
    'http://x.org/"onmouseover="alert(1)',
    r"$\href{javascript:alert(1)}{x}$",
    r"$\style{background:url(http://evil.example)}{x}$",
    r"$\class{evil}{x}$",
    r"$\text{<img src=x onerror=alert(1)>}$",
    r"$\text{</mtext></math><script>alert(1)</script>}$",
    r"$\color{red;background:url(http://evil.example)}{x}$",
    r'$\color{"onclick="alert(1)}{x}$',
    r"$\unicode{x3cscript}$",
    r"$\text{&#x3c;script&#x3e;alert(1)}$",
    "$<script>alert(1)</script>$",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "<math><annotation-xml encoding='text/html'><img src=x onerror=alert(1)></annotation-xml></math>",
    "<form><math><mtext></form><form><mglyph><svg><mtext><style><path id='</style><img onerror=alert(1) src>'>",
    "<p style='background:url(http://evil.example)'>x</p>",
    "<a id=app name=app href=http://x>x</a>",
    "<iframe src=http://evil.example></iframe>",
    "<form action=http://evil.example><input name=x><button>b</button></form>",
    "<meta http-equiv=refresh content='0;url=http://evil.example'>",
    "<base href=http://evil.example>",
    "<link rel=stylesheet href=http://evil.example>",
    "<style>@import 'http://evil.example'</style>",
    "<object data=http://evil.example></object><embed src=x><video src=x><audio src=x>",
    '```"><script>alert(1)</script>\nx\n```',
    "```html\n<script>alert(1)</script>\n```",
    "`<script>alert(1)</script>`",
    "|<script>|\n|-|\n|<img onerror=x>|",
    "# <a id=x>\n- [x] <input onfocus=alert(1) autofocus>",
    "<!--><script>alert(1)</script>-->",
    "<![CDATA[<script>alert(1)</script>]]>",
    "<?php <script> ?>",
]
DANGEROUS_TAGS = frozenset(
    re.findall(
        r"\S+", "script style iframe object embed form svg meta base link video audio source template textarea select mglyph annotation-xml semantics"
    )
)


class Watch(HTMLParser):
    """Fails on anything a browser would run, fetch or let the content address."""

    def handle_starttag(self, tag, attrs):
        assert tag not in DANGEROUS_TAGS, tag
        names = dict(attrs)
        assert not {"style", "id", "name", "srcset", "action", "formaction", "background", "poster", "ping", "xlink:href"} & set(names), names
        assert not [name for name in names if name.startswith("on")], names
        assert "src" not in names or (tag == "img" and re.match(r"data:image/(png|jpeg|gif|webp);base64,[\w+/=]*$", names["src"]))
        assert "href" not in names or (tag == "a" and re.match(r"(https?://|mailto:)", names["href"], re.IGNORECASE)), names
        if tag == "a":
            assert names["rel"] == "noopener noreferrer nofollow" and names["target"] == "_blank"
        if tag == "input":
            assert names["type"] == "checkbox" and "disabled" in names
        if tag == "button":
            assert names == {"type": "button", "class": "tgw-copy", "data-copy": ""}


def assert_safe(fragment: str) -> None:
    watch = Watch()
    watch.feed(fragment)
    watch.close()


@pytest.mark.parametrize("text", XSS)
def test_hostile_text(text):
    for block in [*render_blocks(text), *render_blocks(f"- {text}"), *render_blocks(f"> {text}"), render_plain(text)]:
        assert_safe(block)
    for update in stream(list(text))[1]:
        assert_safe(update.html)


@pytest.mark.parametrize("text", XSS)
def test_sanitiser_alone_stops_raw_html(text):
    """The second wall: what a faulty parser would let through."""
    clean = markdown.cleaner().clean(text)
    for tag in (*DANGEROUS_TAGS, "onerror=alert", "onload="):
        assert not re.search(rf"<{tag}[\s>/]", clean)
    assert not re.search(r"<[^>]*\s(on\w+|style|id|name|src=.?http)", clean)
    assert not re.search(r"href=.?\s*(javascript|data|vbscript|file)", clean, re.IGNORECASE)


def test_sanitiser_limits_addresses():
    clean = markdown.cleaner().clean
    assert "href" not in clean('<a href="data:image/png;base64,AA">x</a>') and "href" not in clean('<a href="//evil.example">x</a>')
    assert "src" not in clean('<img src="https://evil.example/x.png">') and "src" not in clean('<img src="data:image/svg+xml;base64,AA">')
    assert clean('<input type="text" name="x">') == '<input type="checkbox">'


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(XSS + list("<>\"'&`$*[]()!\n\\")), max_size=6).map("".join))
def test_mixed_hostile_text(text):
    for block in render_blocks(text):
        assert_safe(block)


BOMBS = {
    **{mark: mark * 100_000 for mark in "[*_`$>:@<&\\~|#(!"},
    **{
        unit: unit * (50_000 // len(unit))
        for unit in (
            "[]",
            "![",
            "[](",
            "[a](",
            "[a][",
            "][",
            "![[",
            "*a_",
            "a**b",
            "**a *b ",
            "~~a",
            "> ",
            "- ",
            "1. ",
            "$a",
            "$x$ ",
            "\\(",
            "\\[",
            "&#x",
            "http://",
            "<a ",
            "www.",
            "http:",
            "![](http://a)",
            "- a\n",
            "a\n",
            "|a|\n",
            "|\n",
            "> ```\n",
            "\\[\n",
            "$$\n",
            "- $$\n",
            "a\n===\n",
            "[a]: b\n",
            "    a\n",
            "<div>\n",
            "~~~\n",
            "***\n",
            " \n",
            "\r",
        )
    },
    "nested list": "".join("  " * depth + "- a\n" for depth in range(440)),
    "nested brackets": "[" * 50_000 + "]" * 50_000,
    "nested emphasis": "*_" * 25_000 + "a" + "_*" * 25_000,
    "backticks": "".join("`" * length + " " for length in range(440)),
    "quotations": ("> " * 50 + "a\n") * 900,
    "table": "|a|b|\n|-|-|\n" + "|a|b|\n" * 5_000,
    "wide table": "|" + "a|" * 25_000 + "\n|" + "-|" * 25_000 + "\n",
    "fractions": "".join("$" + "\\frac12" * 280 + f"{number}$\n" for number in range(50)),
    "no fence": "``` `" + "*a_" * 30_000,
    "recursion": ("$" + "\\sqrt{" * 300 + "$\n") * 50,
    "java": "```java\n" + "\n" * 40_000 + "a " * 20_000 + "\n```",
    "comments": "```go\n" + "/*\n" * 30_000 + "```",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name, monkeypatch):
    """Bounded by construction (sizes of what the parser sees), with a generous guard on the time of this thread."""
    seen = []
    original = render.to_html
    monkeypatch.setattr(render, "to_html", lambda source, still_open=False: seen.append(source) or original(source, still_open))
    text = BOMBS[name]
    lines = "\n".join(text[i : i + 3_000] for i in range(0, len(text), 3_000))
    start = thread_time()
    blocks = [*render_blocks(text), *(render_blocks(lines) if "\n" not in text else [])]
    assert thread_time() - start < 8
    assert all(len(source) <= render.WINDOW_MAX + 100_000 for source in seen)
    for block in blocks:
        assert_safe(block)


def test_nothing_is_lost_in_deep_nesting():
    assert "the end" in "".join(render_blocks("> " * 200 + "the end"))
    assert "the end" in "".join(render_blocks("- " * 200 + "the end"))
