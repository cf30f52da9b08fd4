"""The documents: what they name exists, their links lead somewhere, and nothing is asked of the network."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "compose/README.md")
PAGES = (*TOP, *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")))
PACKAGES = ("broker", "scheduler", "edge_worker", "cloud_worker")
FOLDERS = (*PACKAGES, "perllm", "compose", "tests", "benchmarks", "docs", "scripts", ".ci", ".github")
#: Results of runs that need a GPU, or ten minutes: named as the place where they go.
TO_BE_RECORDED = {"benchmarks/results/cloud.json"}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def prose(page: str) -> str:
    """A page without its blocks of code."""
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?:^|\n)\n(?: {4}.*\n?)+", "\n\n", text)


def spans(page: str) -> list[str]:
    """What stands in code font in its prose."""
    return re.findall(r"`([^`\n]+)`", prose(page))


@cache
def anchors(page: str) -> frozenset[str]:
    """Of its headings, as GitHub and mkdocs make them where both agree."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return frozenset(re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())) for heading in headings)


@pytest.mark.parametrize("document", ["reliability.md", "security.md"])
def test_every_test_the_promises_name_exists(document: str) -> None:
    named, file = 0, Path()
    text = read(f"docs/{document}")
    for path, function in re.findall(r"`([\w/]+\.py)?(?:::(\w+))?`", text.replace("tests/", "")):
        file = ROOT / "tests" / path if path else file
        if path:
            assert file.exists() or (ROOT / path).exists(), path
        if function:
            assert f"def {function}(" in file.read_text(encoding="utf-8"), f"{file.name}::{function}"
            named += 1
    assert named > 20


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{link}: there is no such file"
        name = str(target.resolve().relative_to(ROOT))
        assert not page.startswith("docs/") or name.startswith("docs/"), f"{link}: the site of docs/ does not have it"
        assert not anchor or anchor in anchors(name), f"{link}: there is no such heading"


@pytest.mark.parametrize("page", PAGES)
def test_files_named_exist(page: str) -> None:
    for span in spans(page):
        path = span.partition("::")[0]
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", path) and path.partition("/")[0] in FOLDERS and "/" in path:
            assert (ROOT / path).exists() or path in TO_BE_RECORDED, path


def test_what_the_walks_name_exists() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    lua = read("broker/ledger/ledger.lua")
    for page in ("CONTRIBUTING.md", "docs/architecture.md"):
        for span in spans(page):
            if re.fullmatch(r"test_\w+", span):
                assert f"def {span}(" in tests, span
            if (operation := re.fullmatch(r"ops\.(\w+)", span)) and operation[1] != "yours":
                assert re.search(rf"function ops\.{operation[1]}\b|ops\['{operation[1]}'\]", lua), span


@pytest.mark.parametrize("package", PACKAGES)
def test_what_the_code_cites_of_the_documents_is_there(package: str) -> None:
    for path in sorted(ROOT.glob(f"{package}/**/*.*")):
        if path.suffix not in (".py", ".lua"):
            continue
        for page, heading in re.findall(r"\b(docs/[\w-]+\.md)(?:,\s+\"([^\"]+)\")?", path.read_text(encoding="utf-8")):
            known = (ROOT / page).exists() or page in ("docs/gguf.md", "docs/syntax.md")  # other projects'
            assert known, f"{path}: {page}"
            if heading:
                assert f"\n## {heading}\n" in read(page), f"{path}: {page} has no section {heading!r}"


def test_the_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= 150


def test_the_site_has_every_page() -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        inside = entry.values() if isinstance(entry, dict) else entry
        return [page for one in inside for page in pages(one)]  # type: ignore[attr-defined]

    listed = pages(yaml.safe_load(read("mkdocs.yml"))["nav"])
    assert sorted(listed) == [page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")]
