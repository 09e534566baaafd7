"""Pages in a real browser: no warnings, every plot is drawn and legible, on a phone and on a desktop.

Requires Chromium and its driver (Debian: apt-get install chromium chromium-driver).
"""

import shutil

import pytest
from test_run_report import log_lines

from comparison_results import result
from flashmhf.reports.comparison import write_report
from flashmhf.reports.run import write_run_report
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
MIN_TEXT_PIXELS = 6.0

PLOTS = """
return Array.from(document.querySelectorAll('figure')).map(figure => {
  const svg = figure.querySelector('svg'), box = svg.getBoundingClientRect();
  const drawn = Array.from(svg.querySelectorAll('path')).filter(p => {
    const b = p.getBoundingClientRect(); return b.width > 0 || b.height > 0;
  });
  const text = Array.from(svg.querySelectorAll('g[id^=text_]')).map(t => t.getBoundingClientRect().height);
  return {name: figure.getAttribute('aria-label'), width: box.width, height: box.height, right: box.right,
          paths: drawn.length, text: Math.min(...text.filter(h => h > 0))};
});
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
    write_report(result(), tmp_path / "comparison.html")
    row = {"tokens_per_second": 1000.0, "memory_mib": 512.0, "grad_norm": 1.0}
    log_lines(
        tmp_path,
        {"start": 0, "time": 0.0},
        *({"step": step, "time": float(step), "loss": 5.0 - step / 10, **row} for step in range(1, 31)),
    )
    write_run_report(tmp_path, tmp_path / "run.html")
    write_sweep_report(tuning_result(tmp_path / "sweep"), tmp_path / "sweep.html", tmp_path / "sweep")
    return {"comparison": 10, "run": 5, "sweep": 2}


@pytest.mark.parametrize("width", [390, 1280])
def test_reports_are_drawn_and_legible(browser, pages, tmp_path, width):
    for name, plots in pages.items():
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 2400, "deviceScaleFactor": 1, "mobile": False},
        )
        browser.get((tmp_path / f"{name}.html").as_uri())
        assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
        assert browser.execute_script("return window.innerWidth") == width
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width, (
            "the page scrolls sideways"
        )
        found = browser.execute_script(PLOTS)
        assert len(found) == plots
        for plot in found:
            assert plot["width"] > 250, plot
            assert plot["height"] > 60, plot
            assert plot["right"] <= width, plot
            assert plot["paths"] >= 4, plot
            assert plot["text"] >= MIN_TEXT_PIXELS, plot
        browser.save_screenshot(str(tmp_path / f"{name}-{width}.png"))
