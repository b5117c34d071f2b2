"""The page in a real browser: nothing is cut off at 1400 and 390 px, light, dark and printed, with everything unfolded."""

import os
import shutil

import pytest
from full_folder import grpo, make

from plopfast.report.page import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
browser = next(filter(None, map(shutil.which, BROWSERS)), None)
driver = shutil.which("chromedriver")
webdriver = pytest.importorskip("selenium.webdriver", reason="no browser is driven here: selenium is not installed")
pytestmark = pytest.mark.skipif(
    not (browser and driver), reason=f"no browser here: none of {', '.join(BROWSERS)}, or no chromedriver"
)

WIDTHS = {"desktop": 1400, "tablet": 800, "phone": 390, "small phone": 320, "print": 690}
CUT = """
const wide = document.documentElement.clientWidth, found = [];
for (const e of document.querySelectorAll('body *')) {
  const box = e.getBoundingClientRect(), style = getComputedStyle(e);
  if (!box.width || style.visibility == 'hidden' || e.closest('svg') || e.closest('.kv thead')) continue;
  if (box.right > wide + 1 || box.left < -1) found.push('out of the page: ' + e.className + ' ' + e.textContent.slice(0, 60));
  if (['hidden', 'clip'].includes(style.overflowX) && e.scrollWidth > e.clientWidth + 1 && style.textOverflow != 'ellipsis')
    found.push('cut: ' + e.className + ' ' + e.textContent.slice(0, 60));
}
return found;
"""
OVERLAPS = """
const found = [];
for (const axis of document.querySelectorAll('.ax, .plot')) {
  const labels = [...axis.querySelectorAll(':scope > span:not(.y):not(.lab):not(.xn)')].filter(e => e.getBoundingClientRect().width);
  labels.sort((a, b) => a.getBoundingClientRect().left - b.getBoundingClientRect().left);
  for (let i = 1; i < labels.length; i++) {
    const a = labels[i - 1].getBoundingClientRect(), b = labels[i].getBoundingClientRect();
    if (a.right > b.left + 0.5 && a.bottom > b.top && a.top < b.bottom) found.push(labels[i - 1].textContent + ' | ' + labels[i].textContent);
  }
}
return found;
"""


@pytest.fixture(scope="module")
def window():
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-sandbox"):
        options.add_argument(argument)
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver, env={**os.environ, "LC_ALL": "C"}))
    yield made
    made.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser") / "full"
    make(folder)
    grpo(folder)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    return write_report(folder)


def shown(window, page, where: str, mode: str) -> None:
    """Opens the page in so wide a window, everything unfolded."""
    window.get(page.as_uri())
    media = {
        "media": "print" if where == "print" else "screen",
        "features": [{"name": "prefers-color-scheme", "value": mode}],
    }
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": WIDTHS[where], "height": 900, "deviceScaleFactor": 1, "mobile": "phone" in where}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    if where != "print":  # which unfolds them by itself
        window.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")


@pytest.mark.parametrize("where", WIDTHS)
def test_nothing_is_cut_off(window, page, where):
    shown(window, page, where, "light")
    wide, seen = window.execute_script("const e = document.documentElement; return [e.scrollWidth, e.clientWidth]")
    assert wide == seen == WIDTHS[where]
    assert window.execute_script(CUT) == []


@pytest.mark.parametrize("where", ["desktop", "phone"])
def test_no_tick_label_lies_on_another(window, page, where):
    shown(window, page, where, "light")
    assert window.execute_script(OVERLAPS) == []


@pytest.mark.parametrize(("where", "mode", "paper"), [("desktop", "dark", "rgb(17, 20, 23)"), ("desktop", "light", "rgb(255, 255, 255)"), ("print", "dark", "rgb(255, 255, 255)")])  # fmt: skip
def test_the_readers_colours(window, page, where, mode, paper):
    shown(window, page, where, mode)
    assert window.execute_script("return getComputedStyle(document.body).backgroundColor") == paper


def test_on_a_phone_each_cell_of_a_wide_table_says_its_heading(window, page):
    shown(window, page, "phone", "light")
    heads, cells = window.execute_script("""
        return [[...document.querySelectorAll('.wr thead')].filter(e => e.getBoundingClientRect().height).length,
            [...document.querySelectorAll('.wr td')].filter(e => e.textContent).map(e =>
                [e.dataset.l, getComputedStyle(e, ':before').content])]""")
    assert heads == 0 and len(cells) > 100
    assert all(heading in said for heading, said in cells)


def test_print_shows_what_is_folded(window, page):
    shown(window, page, "print", "light")
    hidden = window.execute_script(
        "return [...document.querySelectorAll('details .body')].filter(e => !e.getBoundingClientRect().height).length"
    )
    assert hidden == 0


def test_it_asks_for_nothing_and_logs_nothing(window, page):
    shown(window, page, "desktop", "light")
    assert window.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert [entry for entry in window.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_figures_fill_their_column(window, page):
    shown(window, page, "desktop", "light")
    narrow = window.execute_script("""
        return [...document.querySelectorAll('section .body > figure > :is(.gt, .heat, .plot, .bars, .sams)')].filter(e =>
            e.getBoundingClientRect().width < 0.9 * e.closest('.body').getBoundingClientRect().width).map(e => e.className)""")
    assert narrow == []
