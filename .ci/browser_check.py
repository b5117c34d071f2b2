"""Opens pages in headless Chromium at desktop and phone widths and says what is wrong with them.

    python .ci/browser_check.py [--screenshots DIR] PAGE.html ...
    python .ci/browser_check.py --self-test       # proves that each check fails where it should

Needs Debian's chromium and chromium-driver, and selenium. Exit code 1 if anything is wrong.
"""

import argparse
import base64
import json
import shutil
import sys
import tempfile
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

SIZES = ((1280, 800), (390, 844))
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # a request to the outside is seen, and goes nowhere
)  # fmt: skip

# Contrast is that of WCAG 2, which knows lightness alone: it is the contrast on a black-and-white print. A picture's frequent
# colours must stay apart there too: two that differ much in colour may not share a grey.
LOOK = r"""
const width = arguments[0], wrong = [];
const grey = ([r, g, b]) => [r, g, b].map(c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
const rgba = text => { const n = text.match(/[\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n };
const named = e => `<${e.tagName.toLowerCase()}> ${(e.textContent || e.alt || '').trim().slice(0, 40)}`;

const wide = document.documentElement.scrollWidth;
if (wide > width) wrong.push(`overflow: the page is ${wide} px wide`);
if (!document.documentElement.lang) wrong.push('no lang');
for (const img of document.images) {
  if (!img.complete || !img.naturalWidth) wrong.push(`image not loaded: ${named(img)}`);
  else if (!img.getClientRects().length) wrong.push(`image not shown: ${named(img)}`);
  if ((img.getAttribute('alt') || '').trim().length < 10) wrong.push(`image without alt text: ${img.src.slice(0, 40)}`);
}
const levels = [...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(h => +h.tagName[1]);
if (levels.filter(l => l == 1).length != 1 || levels[0] != 1 || levels.some((l, i) => i && l > levels[i - 1] + 1))
  wrong.push(`headings out of order: ${levels}`);
for (const th of document.querySelectorAll('th:not([scope])')) wrong.push(`th without scope: ${named(th)}`);

const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), seen = new Set();
for (let node; node = texts.nextNode();) {
  const e = node.parentElement;
  if (!node.textContent.trim() || seen.has(e) || !e.getClientRects().length) continue;
  seen.add(e);
  let behind = [255, 255, 255];
  for (let up = e; up; up = up.parentElement) {
    const c = rgba(getComputedStyle(up).backgroundColor);
    if (c[3] == 1) { behind = c; break }
    if (c[3] > 0) wrong.push(`half-transparent background, contrast unknown: ${named(up)}`);
  }
  const [a, b] = [grey(rgba(getComputedStyle(e).color)), grey(behind)];
  const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  if (contrast < 4.5) wrong.push(`contrast ${contrast.toFixed(1)} in black and white: ${named(e)}`);
}

for (const img of document.images) {
  if (!img.naturalWidth || !img.src.startsWith('data:')) continue;
  const canvas = Object.assign(document.createElement('canvas'), {width: img.naturalWidth, height: img.naturalHeight});
  const paint = canvas.getContext('2d');
  paint.fillStyle = 'white';
  paint.fillRect(0, 0, canvas.width, canvas.height);
  paint.drawImage(img, 0, 0);
  const pixels = paint.getImageData(0, 0, canvas.width, canvas.height).data, count = new Map();
  for (let i = 0; i < pixels.length; i += 4) {
    const key = (pixels[i] >> 4) << 8 | (pixels[i + 1] >> 4) << 4 | pixels[i + 2] >> 4;
    count.set(key, (count.get(key) || 0) + 1);
  }
  const often = [...count].filter(([, n]) => n > .003 * pixels.length / 4).map(([k]) => [k >> 8, k >> 4 & 15, k & 15].map(c => 17 * c));
  const luma = c => .299 * c[0] + .587 * c[1] + .114 * c[2];
  const same = often.some((a, i) => often.slice(i + 1).some(b => Math.hypot(...a.map((c, j) => c - b[j])) > 100 && Math.abs(luma(a) - luma(b)) < 15));
  if (same) wrong.push(`colours that black and white cannot tell apart: ${named(img)}`);
  const greys = new Set([...count].filter(([, n]) => n > .0005 * pixels.length / 4).map(([k]) => luma([k >> 8, k >> 4 & 15, k & 15].map(c => 17 * c)) >> 5));
  if (greys.size < 3) wrong.push(`only ${greys.size} levels of grey: ${named(img)}`);
}
return wrong;
"""


class Browser:
    def __init__(self) -> None:
        self.profile = tempfile.mkdtemp(prefix="browser-check-")
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or sys.exit("chromium is missing: apt-get install chromium")
        for flag in (*FLAGS, f"--user-data-dir={self.profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = shutil.which("chromedriver") or sys.exit("chromedriver is missing: apt-get install chromium-driver")
        self.driver = webdriver.Chrome(options, Service(driver))

    def close(self) -> None:
        self.driver.quit()
        shutil.rmtree(self.profile, ignore_errors=True)

    def wrong(self, page: Path, screenshots: Path | None = None) -> list[str]:
        """What is wrong with a page, at each size."""
        found = []
        for width, height in SIZES:
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            for log in ("browser", "performance"):
                self.driver.get_log(log)  # what an earlier page left
            self.driver.get(page.resolve().as_uri())
            said = self.driver.execute_script(LOOK, width)
            said += [
                f"{e['level'].lower()} on the console: {e['message'][:200]}" for e in self.driver.get_log("browser")
            ]
            for entry in self.driver.get_log("performance"):
                event = json.loads(entry["message"])["message"]
                url = (
                    event["params"].get("request", {}).get("url", "")
                    if event["method"] == "Network.requestWillBeSent"
                    else ""
                )
                if url and not url.startswith("data:") and url.partition("#")[0] != page.resolve().as_uri():
                    said.append(f"request: {url[:100]}")
            found += [f"{page.name} at {width}x{height}: {text}" for text in said]
            if screenshots:
                screenshots.mkdir(parents=True, exist_ok=True)
                shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
                name = f"{page.resolve().parent.name}-{page.stem}-{width}.png"
                (screenshots / name).write_bytes(base64.b64decode(shot["data"]))
        return found


def picture(*colors: str, alt: str = "three grey squares side by side") -> str:
    squares = "".join(f"<rect x='{30 * i}' width='30' height='30' fill='{c}'/>" for i, c in enumerate(colors))
    svg = f"<svg xmlns='http://www.w3.org/2000/svg' width='{30 * len(colors)}' height='30'>{squares}</svg>"
    return f'<img alt="{alt}" src="data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}">'


GREYS = ("white", "#888888", "black")
BROKEN = {  # what the check must say, and a body of which it must say that alone
    "": picture(*GREYS),
    "on the console": "<script>throw new Error('broken')</script>",
    "overflow": "<div style='width:1500px'>wide</div>",
    "image without alt text": picture(*GREYS, alt=""),
    "image not loaded": '<img alt="a picture that is damaged" src="data:image/png;base64,AAAA">',
    "request: https://example.invalid": '<link rel="stylesheet" href="https://example.invalid/style.css">',
    "headings out of order": "<h3>too deep</h3>",
    "th without scope": "<table><tr><th>head</th></tr></table>",
    "contrast 1.": "<p style='color:#f00;background:#0a0'>red on green</p>",
    "cannot tell apart": picture("white", "#ff0000", "#008300", "black"),
    "levels of grey": picture("white", "black"),
}


def self_test(browser: Browser) -> list[str]:
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (want, body) in enumerate(BROKEN.items()):
            page = Path(folder) / f"page{number}.html"
            page.write_text(
                f'<!doctype html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,"></head>'
                f"<body><h1>A page</h1>{body}</body></html>"
            )
            said = browser.wrong(page)
            if want:
                # a style sheet that cannot be had is an error on the console, too
                others = [text for text in said if want not in text and "ERR_NAME_NOT_RESOLVED" not in text]
                for width, _ in SIZES:
                    if not any(want in text and f" {width}x" in text for text in said):
                        failed.append(f"self-test: nothing said of {want!r} at {width}")
                failed += [f"self-test: {want!r} is not alone: {text}" for text in others]
            else:
                failed += [f"self-test: the sound page: {text}" for text in said]
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--self-test", action="store_true")
    parser.add_argument("--screenshots", type=Path, metavar="DIR", help="keep a picture of each page at each size")
    arguments = parser.parse_args()
    if not arguments.pages and not arguments.self_test:
        parser.error("no page given")
    if absent := [str(page) for page in arguments.pages if not page.is_file()]:
        parser.error(f"no such file: {', '.join(absent)}")
    browser = Browser()
    try:
        wrong = self_test(browser) if arguments.self_test else []
        for page in arguments.pages:
            wrong += browser.wrong(page, arguments.screenshots)
    finally:
        browser.close()
    tested = f"self-test of {len(BROKEN)} pages passed; " if arguments.self_test else ""
    print("\n".join(wrong) or f"{tested}{len(arguments.pages)} pages checked: nothing wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
