import re

import pytest

from adashard_server.http.routes.site import DASHBOARD

PAGES = {"/": "index.html", "/docs": "docs.html"}
OWN = [
    path for path in sorted(DASHBOARD.rglob("*")) if path.is_file() and "vendor" not in path.parts
]


@pytest.mark.parametrize("path", PAGES)
def test_everything_that_a_page_names_is_there(get, path):
    page = get(path)
    assert page.headers["content-type"].startswith("text/html")
    names = re.findall(r'(?:src|href)="(static/[^"]+)"', page.text)
    assert len(names) >= 4
    for name in names:
        assert get(f"/{name}").status_code == 200, name


def test_every_module_that_is_imported_is_there(get):
    modules = [path for path in OWN if path.suffix == ".js"]
    imports = {name for path in modules for name in re.findall(r'from "\./(.+)"', path.read_text())}
    assert len(imports) > 5
    for name in imports:
        answer = get(f"/static/js/{name}")
        assert answer.status_code == 200, name
        assert "javascript" in answer.headers["content-type"]


@pytest.mark.parametrize(
    "path", [*PAGES, "/api/v1/jobs", "/nothing", "/static/page.css", "/metrics"]
)
def test_every_answer_forbids_the_browser_to_ask_other_hosts(get, path):
    headers = get(path).headers
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_no_file_of_ours_names_another_host_or_writes_code_into_a_page(path):
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"(https?:)?//[a-z0-9-]+\.[a-z]", text)
    if path.suffix == ".html":
        assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son[a-z]+=", text)


def test_files_with_a_version_in_their_path_are_kept_and_others_are_asked_for_again(get):
    (vendored,) = DASHBOARD.glob("vendor/uplot-*/uPlot.min.css")
    kept = get(f"/static/{vendored.relative_to(DASHBOARD)}")
    assert "immutable" in kept.headers["cache-control"]
    ours = get("/static/page.css")
    assert ours.headers["cache-control"] == "no-cache"
    again = get("/static/page.css", headers={"if-none-match": ours.headers["etag"]})
    assert again.status_code == 304
    assert "cache-control" not in get("/static/vendor/nothing.css").headers


def test_nothing_outside_the_folder_is_served(get):
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py"):
        assert get(path).status_code == 404
