"""What docs/adafactor.md names is there, and its table of semantics is that of the code."""

from __future__ import annotations

import ast
import pkgutil
import re
from pathlib import Path

import pytest

from adashard.knobs import KNOBS, SEMANTICS

PAGE = Path("docs/adafactor.md")
PAGES = (PAGE, Path("docs/decisions/0013-bits-by-a-written-order.md"))

FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
DOTTED = re.compile(r"[a-z]\w*(\.[A-Za-z_]\w*)+")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)[^)]*\)")
SECTION = re.compile(r'docs/adafactor\.md, "([^"]+)"')

PACKAGE_OF = {
    "optim": "adashard_server",
    "shard": "adashard_server",
    "wire": "adashard",
    "schedule": "adashard",
    "knobs": "adashard",
}
OTHERS = {"torch", "transformers", "optax"}  # libraries that are compared; optax is not installed


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / PAGE).read_text()


@pytest.fixture(scope="module")
def spans(page: str) -> set[str]:
    """What stands in code font inside the text."""
    return set(CODE.findall(FENCE.sub("", page)))


def test_every_dotted_name_on_the_page_is_a_name_in_the_code(spans: set[str]) -> None:
    names = {span for span in spans if DOTTED.fullmatch(span)}
    ours = {name for name in names if name.partition(".")[0] not in OTHERS}
    assert len(ours) > 40
    assert {name: _what_is_wrong_with(name) for name in ours if _what_is_wrong_with(name)} == {}


def test_the_check_of_names_finds_those_that_are_not_there() -> None:
    assert _what_is_wrong_with("optim.split.SliceStep.measure") is None
    assert _what_is_wrong_with("optim.adafactor.Settings.eps1") is None
    assert _what_is_wrong_with("optim.split.SliceStep.guess")
    assert _what_is_wrong_with("optim.guesses.SliceStep")
    assert _what_is_wrong_with("split.SliceStep")


def test_every_test_and_every_file_on_the_page_is_in_the_repository(
    spans: set[str], modules: dict[Path, ast.Module], root: Path
) -> None:
    functions = {
        node.name
        for path, module in modules.items()
        if path.parts[0] == "tests"
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef)
    }
    tests = {span for span in spans if span.startswith("test_")}
    files = {span for span in spans if "/" in span and span.endswith(".py")}
    assert len(tests) > 10
    assert tests - functions == set()
    assert {name for name in files if not (root / name).is_file()} == set()


@pytest.mark.parametrize("of_page", PAGES, ids=str)
def test_every_link_leads_somewhere(of_page: Path, root: Path) -> None:
    links = LINK.findall((root / of_page).read_text())
    assert links
    assert [link for link in links if not (root / of_page.parent / link).exists()] == []


def test_every_section_that_the_code_refers_to_is_on_the_page(
    page: str, texts: dict[Path, str]
) -> None:
    referred = {
        title
        for path, text in texts.items()
        if "src" in path.parts
        for title in SECTION.findall(text)
    }
    headings = {line.lstrip("# ") for line in page.splitlines() if line.startswith("#")}
    assert referred
    assert referred - headings == set()


def test_the_table_of_semantics_is_that_of_the_code(page: str) -> None:
    rows = [_cells(line) for line in page.splitlines() if line.startswith("| `")]
    (header,) = (row for row in _tables(page) if row[0] == "knob")
    assert [ast.literal_eval(cell.strip("`")) for cell in header[1:]] == list(SEMANTICS)
    knobs = {row[0].strip("`"): row[1:] for row in rows if row[0].strip("`") in KNOBS}
    assert tuple(knobs) == KNOBS
    for knob, cells in knobs.items():
        for cell, settings in zip(cells, SEMANTICS.values(), strict=True):
            said = ast.literal_eval((cell or cells[0]).strip("`"))
            assert said == _nearly(settings[knob]), (knob, cell)


def _what_is_wrong_with(name: str) -> str | None:
    """Why a dotted name is not one of the code; None for those that are."""
    package = PACKAGE_OF.get(name.partition(".")[0])
    if package is None:
        return "it begins with none of the rooms that the page speaks of"
    try:
        pkgutil.resolve_name(f"{package}.{name}")
    except (ImportError, AttributeError) as error:
        return str(error)
    return None


def _tables(page: str) -> list[list[str]]:
    return [_cells(line) for line in page.splitlines() if line.startswith("|")]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _nearly(setting: object) -> object:
    """Equal to the setting, and to its number with as many digits as people read."""
    if isinstance(setting, bool) or not isinstance(setting, float | tuple):
        return setting
    return pytest.approx(setting, rel=1e-7)
