"""Pages of the site that lie outside docs/, and links between them and docs/.

Links are written as they work in a checkout, `../benchmarks/README.md`. Here those to
a page of the site become links inside it. Links to other files of the checkout lead to
the repository if `repo_url` in mkdocs.yml says where that is, else they become text.
A link that leads nowhere is left as it is: `mkdocs build --strict` refuses it.

A record, docs/results/records/NAME.toml, is a page as `benchmarks.records` writes it.
"""

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).resolve().parents[2]
# File of the checkout to page of the site.
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "develop.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/README.md": "examples.md",
    "experiments/README.md": "experiments.md",
}
RECORDS = {
    path.relative_to(ROOT).as_posix(): f"results/records/{path.stem}.md"
    for path in (ROOT / "docs" / "results" / "records").glob("*.toml")
}
PAGES = OUTSIDE | RECORDS
SOURCES = {page: source for source, page in PAGES.items()}
# A block of code, which stays as it is, or a link: its text, its path, its anchor.
_PART = re.compile(
    r"^(?P<fence>`{3,}).*?^(?P=fence)"
    r"|\[(?P<text>[^\[\]]*)\]\((?!\w+:)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)",
    re.MULTILINE | re.DOTALL,
)


def on_files(files, config):
    """Adds the pages that lie outside docs/, and those of the records."""
    if str(ROOT) not in sys.path:  # the command mkdocs does not look here
        sys.path.insert(0, str(ROOT))
    from benchmarks import records

    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for source, page in RECORDS.items():
        text = records.page(records.read(ROOT / source))
        level = InclusionLevel.NOT_IN_NAV  # the indexes list them
        files.append(File.generated(config, page, content=text, inclusion=level))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns the links of a page from the checkout's into the site's."""
    uri = page.file.src_uri
    source = SOURCES.get(uri, f"docs/{uri}")

    def rewritten(match):
        if match["fence"]:
            return match[0]
        path = posixpath.join(posixpath.dirname(source), match["path"])
        path = posixpath.normpath(path)
        inside = PAGES.get(path, path.removeprefix("docs/"))
        anchor = match["anchor"] or ""
        if files.get_file_from_path(inside):
            target = posixpath.relpath(inside, posixpath.dirname(uri) or ".")
        elif (ROOT / path).exists() and config.repo_url:
            target = f"{config.repo_url.rstrip('/')}/blob/main/{path}"
        elif (ROOT / path).exists():
            return match["text"]
        else:
            return match[0]
        return f"[{match['text']}]({target}{anchor})"

    return _PART.sub(rewritten, markdown)
