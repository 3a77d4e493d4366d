import re
from dataclasses import replace

import pytest
from playwright.sync_api import expect
from tests.http.fakes import a_job, a_worker, an_event

pytestmark = pytest.mark.needs("chromium")

TITLES = [
    "Loss and gradient norm",
    "Where a step’s time goes",
    "Update RMS and clip ratio",
    "Bytes per step",
]


@pytest.fixture
def site(site):
    """A job that has taken 400 steps."""
    site.call(lambda: site.training.run(400))
    return site


def value(page, tile):
    return page.locator(f"#tile-{tile} .value")


def note(page, tile):
    return page.locator(f"#tile-{tile} .note")


def chart(page, title):
    return page.get_by_role("region", name=title)


def test_the_page_shows_the_job_at_a_glance(open_page):
    page = open_page()
    expect(value(page, "step")).to_have_text("400")
    expect(value(page, "state")).to_have_text("23.4KiB")
    expect(note(page, "state")).to_have_text("0.23 % of Adam’s")
    expect(value(page, "weights")).to_have_text("4.96MiB")
    expect(note(page, "weights")).to_have_text("1.30 M in 27 tensors")
    expect(value(page, "workers")).to_have_text("2")
    expect(value(page, "generation")).to_have_text("3")
    expect(value(page, "loss")).to_have_text(re.compile(r"^2\.\d{3}$"))
    expect(value(page, "speed")).to_have_text(re.compile(r"^\d+\.\d+$"))
    expect(page.locator("#job-status")).to_have_text("Running")
    expect(page.locator("#live")).to_have_text("Live")
    expect(page).to_have_title("400 · demo · adashard")


def test_numbers_and_charts_move_as_steps_arrive(open_page, site):
    page = open_page()
    plots = page.locator(".plot")
    expect(plots).to_have_count(4)
    for index in range(4):
        expect(plots.nth(index)).to_have_attribute("aria-label", re.compile("Steps 1 to 400"))
    loss = value(page, "loss").inner_text()
    for step in (401, 402):
        point = site.call(lambda: site.training.run(1))
        expect(value(page, "step")).to_have_text(str(step))
        expect(value(page, "loss")).to_have_text(f"{point.loss:.3f}")
    assert value(page, "loss").inner_text() != loss
    for index in range(4):
        expect(plots.nth(index)).to_have_attribute("aria-label", re.compile("Steps 1 to 402"))


def test_members_and_events_come_and_go(open_page, site):
    page = open_page()
    expect(page.locator("#shards tbody tr")).to_have_count(2)
    expect(page.locator("#workers tbody tr")).to_have_count(2)

    def join():
        site.view.workers.append(a_worker(2, status="joining"))
        site.view.told.append(an_event(1, text="Worker worker-2 joined"))

    site.call(join)
    row = page.locator("#workers tbody tr").nth(2)
    expect(row).to_contain_text("worker-2")
    expect(row).to_contain_text("Joining")
    expect(page.locator("#events li")).to_have_text([re.compile("Worker worker-2 joined")])
    site.call(site.view.workers.clear)
    expect(page.locator("#no-workers")).to_contain_text("run the training script")


def test_every_chart_is_a_sentence_and_a_table_too(open_page):
    page = open_page()
    for title in TITLES:
        card = chart(page, title)
        sentence = card.get_by_role("img").get_attribute("aria-label")
        assert re.match(rf"{title}\. Steps 1 to 400\. Newest: .+ \d.*\.$", sentence), sentence
        card.get_by_role("button", name="Show as table").click()
        expect(card.locator("tbody tr")).to_have_count(25)
        expect(card.locator("tbody tr").first).to_contain_text("400")
        card.get_by_role("button", name="Older").click()
        expect(card.locator("tbody tr").first).to_contain_text("375")
        card.get_by_role("button", name="Show as chart").click()
        expect(card.get_by_role("img")).to_be_visible()


def test_the_keyboard_reads_a_chart_step_by_step(open_page):
    page = open_page()
    plot = chart(page, TITLES[0]).get_by_role("img")
    plot.focus()
    page.keyboard.press("Home")
    expect(page.locator("#announcer")).to_have_text(re.compile(r"^Step 1: Gradient norm [\d.]+"))
    page.keyboard.press("ArrowRight")
    expect(page.locator("#announcer")).to_have_text(re.compile(r"^Step 2: .*Loss [\d.]+$"))


def test_fewer_steps_can_be_drawn(open_page):
    page = open_page()
    page.get_by_text("Last 200").click()
    expect(page.locator(".plot").first).to_have_attribute(
        "aria-label", re.compile("Steps 201 to 400")
    )


def test_a_job_is_chosen_by_the_address_and_by_the_picker(open_page, site):
    def add():
        site.view.jobs.append(a_job("größe/2 %", version=7, status="waiting"))

    site.call(add)
    page = open_page("/?job=gr%C3%B6%C3%9Fe%2F2%20%25")
    expect(value(page, "step")).to_have_text("7")
    expect(page.locator("#job-status")).to_have_text("Waiting")
    expect(page.locator("#no-steps")).to_be_visible()
    page.locator("#job").select_option("demo")
    expect(value(page, "step")).to_have_text("400")
    expect(page).to_have_url(re.compile(r"\?job=demo$"))
    page.go_back()
    expect(value(page, "step")).to_have_text("7")


def test_a_page_without_a_job_teaches_how_one_begins_and_shows_it_when_it_does(open_page, site):
    jobs = site.view.jobs

    def end():
        site.view.jobs, site.view.not_ready = [], ("1 more shard is needed",)

    site.call(end)
    page = open_page()
    code = page.locator("#lesson-code")
    expect(code).to_contain_text('address="127.0.0.1:50051"')
    assert len(code.inner_text().splitlines()) == 4
    expect(page.locator("#lesson-ready")).to_contain_text("1 more shard is needed")
    site.call(lambda: setattr(site.view, "jobs", jobs))
    expect(value(page, "step")).to_have_text("400")
    expect(code).to_be_hidden()


def test_a_job_that_is_not_there_is_said_so(open_page):
    page = open_page("/?job=nope")
    expect(page.get_by_role("heading", level=1)).to_have_text("There is no job “nope”")
    expect(page.locator("#lesson-code")).to_contain_text('job="nope"')


def test_a_job_without_a_loss_says_how_to_show_one(open_page, site):
    def silence():
        site.history.forget("demo")
        site.view.workers.clear()  # the training logs one loss a worker
        site.training.run(3)

    site.call(silence)
    page = open_page()
    expect(note(page, "loss")).to_have_text("opt.log(loss=…) shows it")
    expect(chart(page, TITLES[0]).locator(".legend li:visible")).to_have_count(1)


def test_a_job_that_begins_anew_is_drawn_from_its_first_step(open_page, site):
    page = open_page()
    expect(value(page, "step")).to_have_text("400")

    def replace_job():
        site.history.forget("demo")
        site.view.jobs = [replace(site.view.jobs[0], version=0)]

    def run_three():
        site.training.step = 0
        site.training.run(3)

    site.call(replace_job)
    site.call(run_three)
    expect(value(page, "step")).to_have_text("3")
    expect(page.locator(".plot").first).to_have_attribute(
        "aria-label", re.compile("Steps 1 to 3[.]")
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_scheme(open_page, scheme):
    page = open_page(color_scheme=scheme)
    expect(value(page, "step")).to_have_text("400")
    colours = page.evaluate(
        """() => [document.body, document.querySelector("#tile-step .value")]
            .map((element) => getComputedStyle(element))
            .map((style) => [style.backgroundColor, style.color])"""
    )
    ground, ink = (
        sum(map(int, re.findall(r"\d+", one)[:3])) for one in (colours[0][0], colours[1][1])
    )
    assert (ground > ink) == (scheme == "light")


def test_nothing_runs_over_the_edge_of_a_narrow_window(open_page):
    page = open_page(viewport={"width": 400, "height": 800})
    expect(value(page, "step")).to_have_text("400")
    width, room = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= room


def test_the_api_is_described_without_another_host(open_page):
    page = open_page("/docs")
    expect(page.locator(".opblock").first).to_be_visible()
    assert page.locator(".opblock").count() > 10


def test_a_lost_connection_greys_the_page_and_a_new_one_clears_it(browser, site):
    # Not a watched page: the browser itself writes the refused connection to the console.
    with browser.new_context() as context:
        page = context.new_page()
        page.clock.install()
        page.goto(site.url)
        expect(value(page, "step")).to_have_text("400")
        page.context.set_offline(True)
        site.stop_serving()
        page.clock.run_for(6000)
        expect(page.locator("body")).to_have_class("stale")
        expect(page.get_by_role("alert")).to_have_text(re.compile(r"What you see is \d s old"))
        expect(page.locator("#live")).to_have_text("Not live")
