"""How pages look: anchors as GitHub names them, equations as MathML, drawings that follow the theme, and a name of the
search for screen readers.
"""

import html
import pathlib
import re

from latex2mathml.converter import convert

DRAWING = re.compile(r'<img alt="([^"]*)" src="[^"]*?([\w-]+)\.drawing\.svg"\s*/?>')
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
SEARCH = 'data-md-component="search" role="dialog"'
ASSETS = pathlib.Path(__file__).parents[1] / "assets"


def slug(title, separator):
    """What GitHub calls a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", separator)


def on_config(config):
    config.mdx_configs["toc"]["slugify"] = slug
    return config


def equation(match):
    place, tex = match[1], html.unescape(match[2]).strip()
    if place == "span":
        return convert(tex, display="inline")
    return convert(tex, display="block").replace("<math ", '<math tabindex="0" ', 1)  # a wide one scrolls


def drawing(match):
    """The SVG itself, so that its colours are those of the theme."""
    alt, name = match.groups()
    svg = (ASSETS / f"{name}.drawing.svg").read_text(encoding="utf-8")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{alt}" ', 1)


def on_page_content(content, page, config, files):
    # A wide table scrolls by itself, not the page.
    return DRAWING.sub(drawing, EQUATION.sub(equation, content))


def on_post_page(output, page, config):
    return output.replace(SEARCH, f'{SEARCH} aria-label="Search"')
