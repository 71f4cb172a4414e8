"""Formulas of the pages as MathML, which browsers show without a script.

A page has them as GitHub reads them, `$...$` and `$$...$$`, without a backslash before
punctuation, which Markdown takes for its own. pymdownx.arithmatex finds them.
"""

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)


def on_page_content(content, **_):
    """Replaces the TeX of a page by MathML, inside the element that may scroll."""

    def mathml(formula):
        tag, tex = formula.groups()
        display = "block" if tag == "div" else "inline"
        math = convert(html.unescape(tex), display=display)
        return f'<{tag} class="arithmatex">{math}</{tag}>'

    return _FORMULA.sub(mathml, content)
