"""Formulas of the pages as MathML, which browsers show without a script.

A page has them as GitHub reads them, `$...$` and `$$...$$`; pymdownx.arithmatex finds them.
"""

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>',
    re.DOTALL,
)


def on_page_content(content, **_):
    """Replaces the TeX of a page by MathML."""

    def mathml(formula):
        display = "block" if formula["tag"] == "div" else "inline"
        return convert(html.unescape(formula["tex"]), display=display)

    return _FORMULA.sub(mathml, content)
