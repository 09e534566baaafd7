"""Pages in a real browser: no warnings, everything is drawn and legible, on a phone and on a desktop, dark and light.

Requires Chromium and its driver (Debian: apt-get install chromium chromium-driver).
"""

import shutil

import pytest
from test_runs_page import run_folder

from benchmark_results import result as benchmark_result
from benchmark_results import row as benchmark_row
from comparison_results import result
from flashmhf.reports.benchmark_page import write_results
from flashmhf.reports.comparison import write_report
from flashmhf.reports.run import write_run_report
from flashmhf.reports.runs import write_runs_report
from flashmhf.reports.sweep import write_report as write_sweep_report
from made_up_sweeps import tuning_result

selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="no Chromium with its driver here"),
]
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-sync",
)
MIN_FONT_PIXELS = 8.0
MIN_CONTRAST = 3.0  # of what carries meaning, as WCAG has it for graphics
MAX_HEADER = 18  # characters

# Figures that are shown; a figure without its picture has no paths.
PLOTS = """
return Array.from(document.querySelectorAll('figure')).filter(f => f.offsetParent !== null).map(figure => {
  const svg = figure.querySelector('svg'), name = figure.getAttribute('aria-label');
  if (svg === null) return {name: name, width: 0, height: 0, right: 0, paths: 0, text: 0};
  const box = svg.getBoundingClientRect();
  const drawn = Array.from(svg.querySelectorAll('path')).filter(p => {
    const b = p.getBoundingClientRect(); return b.width > 0 || b.height > 0;
  });
  const scale = box.width / svg.viewBox.baseVal.width;  // glyphs are drawn in hundredths of the font's size
  const fonts = Array.from(svg.querySelectorAll('g[id^=text_] g[transform*=scale]')).map(
    g => 100 * scale * parseFloat(g.getAttribute('transform').split('scale(')[1]));
  return {name: name, width: box.width, height: box.height, right: box.right,
          paths: drawn.length, text: Math.min(...fonts)};
});
"""
# Whatever ends to the right of the window or of the element around it that scrolls.
TOO_WIDE = """
const width = window.innerWidth;
return Array.from(document.body.querySelectorAll('*')).filter(e => !e.closest('svg') && e.offsetParent !== null
    && e.getBoundingClientRect().right > width + 1).map(e => e.tagName + ': ' + e.textContent.slice(0, 40))
  .concat(Array.from(document.querySelectorAll('.scroll')).filter(e => e.scrollWidth > e.clientWidth + 1)
    .map(e => 'cut off: ' + e.textContent.slice(0, 40)));
"""
HEADERS = "return Array.from(document.querySelectorAll('th')).map(e => e.textContent);"
# The contrast of an SVG's text, and of each line, with the page.
CONTRAST = """
const channel = v => { v /= 255; return v <= 0.03928 ? v / 12.92 : Math.pow((v + 0.055) / 1.055, 2.4); };
const luminance = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(channel);
                         return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const paper = luminance(getComputedStyle(document.body).backgroundColor);
const contrast = c => { const l = luminance(c); return (Math.max(l, paper) + 0.05) / (Math.min(l, paper) + 0.05); };
const found = {text: contrast(getComputedStyle(document.body).color)};
for (const use of document.querySelectorAll('figure svg use')) {
  const fill = getComputedStyle(use).fill, axes = use.closest('g[id^=axes]');
  if (axes !== null && axes.querySelector('image') !== null) continue;  // numbers on a map
  if (fill.startsWith('rgb')) found['glyph ' + fill] = contrast(fill);
}
for (const path of document.querySelectorAll('figure svg g[id^=line2d] > path')) {
  const stroke = getComputedStyle(path).stroke, above = path.parentElement.parentElement.id;
  if (stroke.startsWith('rgb') && above.startsWith('axes')) found['line ' + stroke] = contrast(stroke);
}
return found;
"""


@pytest.fixture
def browser():
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture
def pages(tmp_path):
    """The number of figures of each page, with one choice of each switch."""
    (tmp_path / "comparison").mkdir()
    for run in result().runs:
        run_folder(tmp_path / "comparison/runs" / run.folder, seed=run.seed, ffn_type=run.ffn_type)
    write_report(result(), tmp_path / "comparison.html", tmp_path / "comparison")
    folders = [run_folder(tmp_path / f"run-{seed}", seed=seed, rate=2e-3) for seed in (0, 1)]
    write_run_report(folders[0], tmp_path / "run.html")
    folders.append(run_folder(tmp_path / "other", ffn_type="flashmhf"))
    write_runs_report(folders, tmp_path / "runs.html")
    write_sweep_report(tuning_result(tmp_path / "sweep"), tmp_path / "sweep.html", tmp_path / "sweep")
    rows = [benchmark_row(variant, tokens=tokens) for variant in ("flashmhf", "swiglu") for tokens in (64, 128, 1024)]
    measured = benchmark_result(*rows)
    write_results(measured.compared_with(measured), tmp_path / "bench")
    (tmp_path / "bench/report.html").rename(tmp_path / "bench.html")
    return {"comparison": 5, "run": 1, "runs": 3, "sweep": 2, "bench": 2}


def show(browser, file, width, scheme="light"):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 2400, "deviceScaleFactor": 1, "mobile": False},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get(file.as_uri())


def check_figures(found, plots, width):
    assert len(found) == plots
    for plot in found:
        assert plot["width"] > 250, plot
        assert plot["height"] > 60, plot
        assert plot["right"] <= width, plot
        assert plot["paths"] >= 4, plot
        assert plot["text"] >= MIN_FONT_PIXELS, plot


@pytest.mark.parametrize("width", [390, 1280])
def test_pages_are_drawn_and_legible(browser, pages, tmp_path, width):
    for name, plots in pages.items():
        show(browser, tmp_path / f"{name}.html", width)
        assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
        assert browser.execute_script("return window.innerWidth") == width
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width, (
            "the page scrolls sideways"
        )
        assert browser.execute_script(TOO_WIDE) == [], name
        assert [header for header in browser.execute_script(HEADERS) if len(header) > MAX_HEADER] == [], name
        choices = browser.find_elements("css selector", ".switch label")
        assert [choice.text for choice in choices] in ([], ["steps", "tokens", "time"]), name
        shown = set()
        for choice in choices or [None]:
            if choice is not None:
                choice.click()
            found = browser.execute_script(PLOTS)
            check_figures(found, plots, width)
            shown.add(found[0]["name"] + found[-1]["name"] + str([plot["name"] for plot in found]))
        assert len(shown) == len(choices or [None])
        browser.save_screenshot(str(tmp_path / f"{name}-{width}.png"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_from_the_page(browser, pages, tmp_path, scheme):
    for name in pages:
        show(browser, tmp_path / f"{name}.html", 1280, scheme)
        found = browser.execute_script(CONTRAST)
        assert found["text"] > 7
        assert any(key.startswith("glyph") for key in found), name
        assert {key: value for key, value in found.items() if value < MIN_CONTRAST} == {}, name


def test_pages_use_the_width(browser, pages, tmp_path):
    """Two figures side by side on a desktop, one below the other on a phone."""
    for width, columns in ((390, 1), (1280, 2)):
        show(browser, tmp_path / "runs.html", width)
        lefts = browser.execute_script(
            "return Array.from(document.querySelectorAll('figure svg')).map(e => e.getBoundingClientRect())"
            ".filter(b => b.width > 0).map(b => Math.round(b.left));"
        )
        assert len(set(lefts)) >= columns if columns > 1 else len(set(lefts)) == 1
        assert browser.execute_script("return document.body.clientWidth") > 0.95 * width
