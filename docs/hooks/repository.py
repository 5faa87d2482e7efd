"""Pages and files of the repository outside `docs/` that pages of the site link to, at the same relative places."""

import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[2]
# Page of the repository -> its place in the site. The site has a README of its own.
PAGES = {
    "README.md": "README_of_the_repository.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "BUILD_NOTES.md": "BUILD_NOTES.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "benchmarks/README.md": "benchmarks/README.md",
}
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)\s]*)?(\))")
CODE = re.compile(r"(^```.*?^```|^(?: {4}|\t).*?$|`[^`\n]*`)", re.DOTALL | re.MULTILINE)


def source_of(file):
    """Path of a page in the repository."""
    places = {place: path for path, place in PAGES.items()}
    return places.get(file.src_uri, f"docs/{file.src_uri}")


def place_of(path):
    """Place in the site of a path of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PAGES.get(path, f"repository/{path}")


def rewritten(markdown, source, place):
    """Markdown with its relative links, right in the repository, right in the site.

    Args:
      source, place: of the page, in the repository and in the site.
    """

    def link(match):
        before, target, anchor, after = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        found = posixpath.relpath(place_of(path), posixpath.dirname(place) or ".")
        return f"{before}{found}{anchor or ''}{after}"

    parts = CODE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(link, part) for i, part in enumerate(parts))


def linked_files():
    """Paths of files outside `docs/`, no pages, that pages link to."""
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / path for path in PAGES)]
    for page in pages:
        for _, target, _, _ in LINK.findall(page.read_text(encoding="utf-8")):
            path = (page.parent / target).resolve()
            if path.is_file() and path.is_relative_to(ROOT):
                name = path.relative_to(ROOT).as_posix()
                if not name.startswith("docs/") and name not in PAGES:
                    yield name


def on_files(files, config):
    for path, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / path).read_text(encoding="utf-8")))
    for name in sorted(set(linked_files())):
        files.append(File.generated(config, place_of(name), abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]
    return rewritten(markdown, source_of(page.file), page.file.src_uri)
