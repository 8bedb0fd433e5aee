"""The pages in a real browser, over a real server: what people see, and that nothing else is loaded, logged or executed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY_RUN, write_book
from tests.serve.serving import DEADLINE, Server, wait_for

CHROMIUM = Path("/usr/bin/chromium")
if not CHROMIUM.exists():
    pytest.skip(f"the pages are tested in Debian's Chromium, which is not at {CHROMIUM}", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api")
Axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe
expect = sync_api.expect
expect.set_options(timeout=1000 * DEADLINE / 4)

HOSTILE = "<img src=x onerror=document.title='hacked'>"
SIZES = {"phone": {"width": 360, "height": 740}, "desk": {"width": 1280, "height": 800}}
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update"]

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def watched(runs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server over a folder of runs that the tests may change: with a run whose name and samples are markup."""
    folder = tmp_path_factory.mktemp("watched")
    runs = Path(shutil.copytree(runs_folder, folder / "runs"))
    shutil.copytree(runs / "first", runs / HOSTILE)
    samples = sorted((runs / HOSTILE / "samples").iterdir())
    samples[-1].write_text(f"Once </script>{HOSTILE} upon a time", encoding="utf-8")
    with Server(folder, "--model", f"talker={runs / 'talker'}", runs) as server:
        yield server, runs


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Opens a page in a window of its own. At the end: it logged no error, and asked no other host."""
    wrong: list[str] = []
    contexts = []

    def open_at(url: str, size: str = "desk", scheme: str = "light") -> Any:
        context = browser.new_context(viewport=SIZES[size], color_scheme=scheme, reduced_motion="reduce")
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        own = re.match(r"https?://[^/]+/", url)
        assert own is not None
        page.on("request", lambda sent: None if sent.url.startswith((own[0], "data:")) else wrong.append(sent.url))
        page.goto(url)
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def write_page(served: Server, open_page: Open) -> Any:
    """The Write page, with the talker chosen."""
    page = open_page(f"{served.url}/?model=talker")
    expect(page.get_by_role("button", name="Write", exact=False).first).to_be_enabled()
    return page


def text_of(page: Any) -> Any:
    return page.get_by_role("textbox", name="Text", exact=True)


def layer(page: Any) -> Any:
    """Where the text is shown, in its colours."""
    return page.get_by_role("region", name="Text and model").locator(".layer")


def button(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=re.compile(f"^{name}"))


def write(page: Any, text: str, tokens: int) -> None:
    """With a seed that is known not to draw the end of a text within the first tokens, which any of the page's own may."""
    page.get_by_label("Seed").fill("1234")
    page.get_by_label("Max tokens").fill(str(tokens))
    text_of(page).fill(text)
    text_of(page).press("Control+Enter")


def write_to_the_end(page: Any, text: str, tokens: int) -> str:
    """The text with its continuation."""
    write(page, text, tokens)
    expect(page.get_by_text(re.compile(rf"^{tokens} tokens .*seed \d+"))).to_be_visible()
    expect(button(page, "Stop")).to_be_disabled()
    return str(text_of(page).input_value())


def violations(page: Any) -> str:
    results = Axe().run(page)
    return str(results.generate_report()) if results.violations_count else ""


# -- Write


def test_writing_shows_the_continuation_after_the_text_in_another_colour(write_page: Any) -> None:
    text = write_to_the_end(write_page, "The lamp", 12)
    assert text.startswith("The lamp")
    written = layer(write_page).locator(".model")
    assert "The lamp" + "".join(written.all_text_contents()) == text
    colors = [each.evaluate("node => getComputedStyle(node).color") for each in (written.first, layer(write_page))]
    assert colors[0] != colors[1]


def test_stop_ends_the_request_in_the_server_and_keeps_what_came(served: Server, write_page: Any) -> None:
    write(write_page, "The river", 2048)
    expect(layer(write_page).locator(".model").nth(3)).to_be_attached()
    write_page.keyboard.press("Escape")
    expect(write_page.get_by_text(re.compile("tokens .*stopped"))).to_be_visible()
    served.wait_until_idle()
    assert text_of(write_page).input_value().startswith("The river")
    assert layer(write_page).locator(".model").count() < 2048


def test_an_alternative_is_chosen_and_the_text_goes_on_from_it(write_page: Any) -> None:
    write_to_the_end(write_page, "The stone", 12)
    parts = layer(write_page).locator("span")
    before = parts.all_text_contents()
    sent: list[Any] = []
    write_page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    place = next(each for each in range(3, len(before)) if before[each].strip())  # a token with a text of its own
    text = text_of(write_page)
    text.focus()
    caret = "".join(before[:place])
    text.evaluate("(area, before) => area.setSelectionRange(before.length, before.length)", caret)
    alternatives = write_page.get_by_role("group", name="Token and its alternatives").get_by_role("button")
    expect(alternatives.first).to_be_visible()
    assert alternatives.count() in (5, 6)
    chosen = alternatives.filter(has_not_text="part of").and_(write_page.locator(":not([aria-current])")).last
    text.press("Alt+ArrowDown")
    expect(alternatives.first).to_be_focused()
    chosen.press("Enter")
    expect(write_page.get_by_text(re.compile(r"^12 tokens .*seed \d+"))).to_be_visible()
    expect(parts).to_have_count(place + 1 + 12)
    after = parts.all_text_contents()
    assert after[:place] == before[:place]
    assert after[place] != before[place]
    prompt = sent[-1]["prompt"]
    assert len(prompt) >= place
    assert all(isinstance(each, int) for each in prompt)
    button(write_page, "Undo").click()
    expect(text).to_have_value("".join(before))


def test_text_settings_and_seed_survive_a_reload(write_page: Any) -> None:
    text = write_to_the_end(write_page, "The garden", 8)
    write_page.reload()
    expect(button(write_page, "Write")).to_be_enabled()
    expect(text_of(write_page)).to_have_value(text)
    expect(write_page.get_by_label("Seed")).to_have_value("1234")
    assert "".join(layer(write_page).locator(".model").all_text_contents()) == text.removeprefix("The garden")
    assert write_to_the_end(write_page, "The garden", 8) == text, "a fixed seed gives the same text"
    button(write_page, "Retry").click()
    expect(write_page.get_by_text(re.compile(r"^8 tokens .*seed 1234"))).to_be_visible()


def test_what_is_typed_within_a_continuation_stays_where_it_was_typed(write_page: Any) -> None:
    text = write_to_the_end(write_page, "The island", 8)
    area = text_of(write_page)
    area.press("Control+Home")
    area.press_sequentially("Look: aa")
    expect(area).to_have_value("Look: aa" + text)
    assert layer(write_page).text_content().removesuffix("\u200b") == "Look: aa" + text
    area.press("Control+z")
    expect(area).to_have_value(text)


def test_two_models_write_on_from_the_same_text_with_the_same_seed(served: Server, write_page: Any) -> None:
    sent = []
    write_page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    write_page.get_by_label("Compare two models").check()
    write_page.get_by_label("Model to compare", exact=True).select_option("first")
    write(write_page, "The mirror", 8)
    expect(write_page.get_by_text(re.compile(r"seed \d+"))).to_have_count(2)
    assert {each["model"] for each in sent} == {"talker", "first"}
    assert len({(each["seed"], each["prompt"]) for each in sent}) == 1
    for name in ("Text", "Text to compare"):
        assert write_page.get_by_role("textbox", name=name, exact=True).input_value().startswith("The mirror")


def test_a_conversation_is_written_retried_and_undone(write_page: Any) -> None:
    write_page.get_by_label("Max tokens").fill("8")
    button(write_page, "Chat").click()
    write_page.get_by_role("textbox", name="Message", exact=True).fill("Hello <b>there</b>")
    button(write_page, "Send").click()
    messages = write_page.get_by_role("list", name="Messages").get_by_role("listitem")
    expect(messages).to_have_count(2)
    expect(button(write_page, "Stop")).to_be_disabled()
    expect(messages.first).to_contain_text("Hello <b>there</b>")
    button(write_page, "Retry").click()
    expect(button(write_page, "Stop")).to_be_disabled()
    button(write_page, "Undo").click()
    button(write_page, "Undo").click()
    expect(messages).to_have_count(0)


def test_an_error_is_the_servers_sentence_and_the_text_is_kept(served: Server, browser: Any) -> None:
    page = browser.new_context().new_page()  # not open_page: the browser itself logs an answer of 400
    page.goto(f"{served.url}/?model=talker")
    expect(button(page, "Write")).to_be_enabled()
    page.route("**/v1/completions", lambda route: route.continue_(post_data={**route.request.post_data_json, "top_p": 7}))
    write(page, "The harvest", 8)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("top_p")
    expect(text_of(page)).to_have_value("The harvest")
    page.unroute("**/v1/completions")
    alert.get_by_role("button", name="Try again").click()
    expect(page.get_by_text(re.compile(r"^8 tokens"))).to_be_visible()
    expect(alert.get_by_role("button")).to_have_count(0)
    page.context.close()


def test_code_to_copy_is_that_of_the_current_request(write_page: Any) -> None:
    text_of(write_page).fill('It\'s "here"')
    button(write_page, "Copy as curl").click()
    code = write_page.get_by_role("dialog").locator("pre")
    expect(code).to_contain_text("""It'\\''s \\"here\\\"""")
    button(write_page, "Close").click()
    button(write_page, "Copy as Python").click()
    compile(code.text_content(), "copied", "exec")


# -- Runs


def test_a_live_run_is_drawn_while_it_trains(watched: tuple[Server, Path], open_page: Open) -> None:
    server, runs = watched
    page = open_page(f"{server.url}/runs")
    expect(page.get_by_role("link", name="first", exact=True)).to_be_visible()
    command = [sys.executable, "-m", "onym", "train", "--data", write_book(runs.parent), *TINY_RUN, "--steps", "1000000"]
    command += ["--save-every", "50", "--name", "growing", "--compile", "off"]
    environment = {**os.environ, "ONYM_CACHE_DIR": str(runs.parent / "cache"), "OMP_NUM_THREADS": "1"}
    log = (runs.parent / "train.log").open("w")
    training = subprocess.Popen([*map(str, command)], cwd=runs.parent, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        row = page.get_by_role("row").filter(has=page.get_by_role("link", name="growing"))
        expect(row).to_contain_text("running")
        expect(row.get_by_role("checkbox")).to_be_checked()
        chart = page.get_by_role("region", name="Loss", exact=True)
        expect(chart).to_contain_text(re.compile(r"growing\s*training"))
        assert _colored(page, row) > 0
        page.get_by_role("button", name="Table of Loss").click()
        rows = chart.locator("tbody tr")
        seen = rows.count()
        wait_for(lambda: bool(page.evaluate("1")) and rows.count() > seen, "more of the run on the chart")
    finally:
        training.kill()
        training.wait()
        log.close()
    expect(row).to_contain_text(re.compile("killed|interrupted"))


def _colored(page: Any, row: Any) -> int:
    """Pixels of the loss chart in the run's colour."""
    color = row.locator(".swatch").evaluate("node => getComputedStyle(node).backgroundColor")
    wanted = [int(each) for each in re.findall(r"\d+", color)[:3]]
    return int(
        page.locator("canvas").first.evaluate(
            """(canvas, [r, g, b]) => {
              const { width, height } = canvas;
              const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
              let found = 0;
              for (let i = 0; i < data.length; i += 4) found += data[i] === r && data[i + 1] === g && data[i + 2] === b;
              return found;
            }""",
            wanted,
        )
    )


def test_what_was_drawn_is_dropped_when_a_resume_shortens_the_file(watched: tuple[Server, Path], open_page: Open) -> None:
    server, runs = watched
    metrics = shutil.copytree(runs / "first", runs / "resumed") / "metrics.jsonl"
    page = open_page(f"{server.url}/runs#run=resumed")
    page.get_by_role("button", name="Table of Learning rate").click()
    steps = page.get_by_role("region", name="Learning rate", exact=True).locator("tbody th")
    expect(steps.last).to_have_text("30")
    rows = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    metrics.write_text("".join(rows[: len(rows) // 2]), encoding="utf-8")
    expect(steps.last).not_to_have_text("30")
    shown = [int(each) for each in steps.all_text_contents()]
    with metrics.open("a", encoding="utf-8") as file:
        file.writelines(rows[len(rows) // 2 :])
    expect(steps.last).to_have_text("30")
    drawn = [int(each) for each in steps.all_text_contents()]
    assert drawn[: len(shown)] == shown
    assert drawn == sorted(set(drawn))


def test_names_and_samples_that_are_markup_are_shown_as_text(watched: tuple[Server, Path], open_page: Open) -> None:
    page = open_page(f"{watched[0].url}/runs")
    page.get_by_role("link", name=HOSTILE).click()
    expect(page.get_by_role("heading", name=HOSTILE)).to_be_visible()
    expect(page.get_by_role("region", name="Sample", exact=True)).to_contain_text(f"</script>{HOSTILE}")
    expect(page.get_by_role("region", name="Loss", exact=True)).to_contain_text(HOSTILE)
    assert page.evaluate("document.images.length") == 0
    assert page.title() == f"{HOSTILE} · Onym"


def test_a_dragged_range_is_fetched_again_and_a_double_click_shows_all(served: Server, open_page: Open) -> None:
    page = open_page(f"{served.url}/runs#run=first")
    expect(page.get_by_role("region", name="Loss", exact=True)).to_contain_text("training")
    plot = page.locator(".u-over").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    across = [box["x"] + share * box["width"] for share in (0.25, 0.75)]
    with page.expect_request(re.compile("metrics.*from=.*to=")):
        page.mouse.move(across[0], box["y"] + 60)
        page.mouse.down()
        page.mouse.move(across[1], box["y"] + 60, steps=5)
        page.mouse.up()
    expect(page.get_by_label("From")).not_to_have_value("")
    with page.expect_request(lambda request: "metrics?" in request.url and "from=" not in request.url):
        page.mouse.dblclick(across[0], box["y"] + 60)
    expect(page.get_by_label("From")).to_have_value("")


def test_a_saved_step_is_verified_and_written_with(served: Server, open_page: Open) -> None:
    page = open_page(f"{served.url}/runs#run=first")
    page.get_by_role("button", name="Verify step 20").click()
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name="Write with step 20"))
    expect(row).to_contain_text("verified")
    page.get_by_role("link", name="Write with step 20").click()
    expect(button(page, "Write")).to_be_enabled()
    expect(page.get_by_label("Model: step", exact=True)).to_have_value("20")
    with page.expect_request("**/v1/completions") as sent:
        write(page, "The window", 4)
    assert sent.value.post_data_json["model"] == "first@20"
    expect(page.get_by_text(re.compile(r"tokens .*seed \d+"))).to_be_visible()


# -- both, for everybody


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_write_has_no_violation_of_accessibility_rules(served: Server, open_page: Open, size: str, scheme: str) -> None:
    page = open_page(f"{served.url}/?model=talker", size, scheme)
    expect(button(page, "Write")).to_be_enabled()
    assert violations(page) == ""
    if size == "phone":
        page.get_by_text("Sampling").click()
    write_to_the_end(page, "The engine", 8)
    layer(page).locator(".model").filter(has_text=re.compile(r"\S")).first.hover(force=True)
    expect(page.get_by_role("group", name="Token and its alternatives")).to_be_visible()
    page.get_by_label("Compare two models").check()
    assert violations(page) == ""
    page.get_by_label("Compare two models").uncheck()
    button(page, "Chat").click()
    assert violations(page) == ""
    _fits(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_runs_has_no_violation_of_accessibility_rules(served: Server, open_page: Open, size: str, scheme: str) -> None:
    page = open_page(f"{served.url}/runs", size, scheme)
    expect(page.get_by_role("region", name="Loss", exact=True)).to_contain_text("training")
    page.get_by_role("button", name="Table of Loss").click()
    assert violations(page) == ""
    _fits(page)
    page.get_by_role("link", name="first", exact=True).click()
    expect(page.get_by_role("link", name="Write with step 20")).to_be_visible()
    assert violations(page) == ""
    _fits(page)


def _fits(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the window"
