"""The two addresses a book may have, and all that hangs on them.

``book_url`` is where the HTML is served, ``repository_url`` where its sources are kept. Both are optional:
where one is empty, whatever needs it is left out, so that no page names a place that does not exist. With
``book_url``: canonical links, ``sitemap.xml`` and the cards that other sites show for a link (Open Graph).
With ``repository_url``: the theme's repository and issue buttons.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ConfigError


def _checked(config: Config, name: str) -> str:
    value = getattr(config, name)
    if not isinstance(value, str) or (value and urlsplit(value).scheme not in ("http", "https")):
        raise ConfigError(
            f"{name}: expected an address that starts with http:// or https://, or '', got {value!r}"
        )
    return value.rstrip("/")


def page_address(app: Sphinx, docname: str) -> str:
    """The public address of a page, or '' where the book has none."""
    base = app.config.book_url
    if not base or app.builder.format != "html":
        return ""
    return base + app.builder.get_target_uri(docname)


def _configure(app: Sphinx, config: Config) -> None:
    book, repository = _checked(config, "book_url"), _checked(config, "repository_url")
    config.book_url = book + "/" if book else ""
    config.repository_url = repository
    config.html_baseurl = config.book_url
    if config.html_theme == "sphinx_book_theme":
        shown = {"use_repository_button": bool(repository), "use_issues_button": bool(repository)}
        config.html_theme_options = {**config.html_theme_options, "repository_url": repository, **shown}


def description(doctree: nodes.document | None) -> str:
    """The page's promise where it has a head, else its first paragraph."""
    if doctree is None:
        return ""
    for paragraph in doctree.findall(nodes.paragraph):
        if isinstance(paragraph.parent, nodes.section) or "promise" in paragraph["classes"]:
            text = " ".join(paragraph.astext().split())
            return text if len(text) <= 300 else text[:297].rsplit(" ", 1)[0] + "…"
    return ""


def _tags(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    if doctree is None:
        return
    about = description(doctree)
    tags = f'\n<meta name="description" content="{html.escape(about)}">' if about else ""
    address = page_address(app, page)
    if address:
        card = {
            "og:type": "article",
            "og:site_name": app.config.project,
            "og:title": app.env.titles[page].astext(),
            "og:description": about,
            "og:url": address,
        }
        tags += "".join(f'\n<meta property="{k}" content="{html.escape(v)}">' for k, v in card.items() if v)
    context["metatags"] = context.get("metatags", "") + tags


def _site_map(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.name != "html":
        return
    path = Path(app.outdir) / "sitemap.xml"
    if not app.config.book_url:
        path.unlink(missing_ok=True)
        return
    places = "".join(
        f"  <url><loc>{html.escape(page_address(app, name))}</loc></url>\n"
        for name in sorted(app.env.found_docs)
    )
    part = path.with_suffix(".part")
    part.write_text(
        '<?xml version="1.0" encoding="utf-8"?>\n'
        f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{places}</urlset>\n',
        "utf-8",
    )
    part.replace(path)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("book_url", "", "html", [str])
    app.add_config_value("repository_url", "", "html", [str])
    app.connect("config-inited", _configure, priority=100)  # before the theme reads its options
    app.connect("html-page-context", _tags, priority=900)
    app.connect("build-finished", _site_map)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
