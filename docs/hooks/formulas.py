"""Formulas of the pages as MathML, which browsers show without a script.

A page has them as GitHub reads them, `$...$` and `$$...$$`, without a backslash before
punctuation, which Markdown takes for its own. pymdownx.arithmatex finds them. A command
that latex2mathml does not know ends the build: it would stand on the page as text.
"""

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)


def on_page_content(content, **_):
    """Replaces the TeX of a page by MathML, inside the element that may scroll."""
    return _FORMULA.sub(_mathml, content)


def _mathml(formula):
    tag, tex = formula[1], html.unescape(formula[2])
    math = convert(tex, display="block" if tag == "div" else "inline")
    if unknown := re.search(r"\\\w*", math):
        raise ValueError(f"latex2mathml has no {unknown[0]} of the formula {tex}")
    return f'<{tag} class="arithmatex">{math}</{tag}>'
