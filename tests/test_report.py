"""The page of a run, and that a browser shows and plays what is in it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vrnn_lightning import UserError
from vrnn_lightning.callbacks.media import Media, save_picture
from vrnn_lightning.report import write_report

RATE = 16000


def fill(folder: Path) -> Path:
    """Make a run's folder with a bit of everything."""
    samples, forecast = folder / "samples", folder / "predictions" / "forecast"
    tone = torch.sin(torch.arange(6 * RATE) / 20).view(-1, 200)
    strokes = torch.tensor([[0.0, 0.0, 0.0], [9.0, 5.0, 1.0], [3.0, 0.0, 0.0], [0.0, 4.0, 1.0]])
    audio, pen = (
        Media(SimpleNamespace(modality="audio", sample_rate=RATE)),
        Media(SimpleNamespace(modality="strokes")),
    )
    series = Media(SimpleNamespace(modality="series"))
    for step in (5, 10):
        audio.write({"real": [tone[:40], tone], "sampled": [tone[:40]]}, samples, f"step_{step:07d}")
        save_picture(series.draw({"real": [torch.randn(9, 2)]}), samples / f"step_{step:07d}.png")
    pen.write({"sampled": [strokes]}, samples, "step_0000010")
    pen.write({"path_1": [strokes]}, forecast, "test")
    save_picture(series.draw({"real": [torch.randn(9, 2)]}), forecast / "test.png")
    (forecast / "figures.json").write_text('{"forecast": {"CRPS": 1.25}, "seasonal <naive>": {"CRPS": 2.5, "MASE": 1}}')
    wide = dict.fromkeys(("coverage", "coverage_50", *(f"figure_{i}" for i in range(20))), 0.5)
    (forecast / "figures_1.json").write_text(json.dumps({"forecast": wide}))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "best.ckpt").touch()
    (samples / "step_0000010_<i>own.png").write_bytes((samples / "step_0000010.png").read_bytes())
    (samples / "step_0000010_table.csv").write_text("kind,name,elbo,sound\nreal,<b>odd</b>,-1.5,a.wav\n")
    (folder / "metrics.csv").write_text(
        "epoch,step,train/elbo,train/beta,train/grad_norm,val/elbo,val/kl,val/active_units,test/elbo,test/elbo_stderr\n"
        "0,4,-3.0,0.5,9.0,,,,,\n0,4,,,,-2.5,0.25,1,,\n1,9,-2.0,1.0,nan,,,,,\n1,9,,,,-2.75,0.5,2,,\n1,9,,,,,,,-2.625,0.125\n1,1"
    )
    (folder / "config.yaml").write_text("data: <script>alert(1)</script>\n")
    np.savez(
        folder / "evaluation.npz",
        test_elbo=np.array([-3.0, -8.0]),
        test_lengths=np.array([1, 2]),
        test_kl_per_dim=np.array([0.1, 0.4]),
    )
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    torch.manual_seed(0)
    return write_report(fill(tmp_path_factory.mktemp("runs") / "sines" / "version_0"))


def test_a_page_is_whole_and_holds_the_figures(page):
    text = page.read_text()
    addresses = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(addresses) == 11  # six pictures, two drawings, three sounds
    assert all(address.startswith("data:") for address in addresses)
    for figure in (
        "-2.5</b><span>best val/elbo",
        "-2.625 ± 0.12",
        "0.5</b><span>last val/kl",
        "optimiser steps: 10, epochs: 2<",
    ):
        assert figure in text
    assert "<tr><td>seasonal &lt;naive&gt;</td><td>2.5</td><td>1</td></tr>" in text
    assert "<td>&lt;b&gt;odd&lt;/b&gt;</td>" in text
    assert "<figcaption>&lt;i&gt;own</figcaption>" in text
    assert "<script" not in text
    assert text.count("share of the true values") == 1, "of the table that has coverages alone"
    assert "a.wav" not in text
    assert "At step 5" in text


def test_a_page_of_little(tmp_path):
    """A run that was stopped at once, and a folder that is none."""
    (tmp_path / "metrics.csv").write_text("")
    assert "no figures yet" in write_report(tmp_path).read_text()
    with pytest.raises(UserError, match=r"nothing: is not a run's folder"):
        write_report(tmp_path / "nothing")


def test_a_page_from_inside_the_folder_says_where_it_is(tmp_path, monkeypatch):
    folder = tmp_path / "my runs" / "sines" / "version_0"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "best.ckpt").touch()
    (folder / "metrics.csv").write_text("epoch,step,val/kl\n0,4,3.0\n3,19,1.5\n0,4,3.0\n")
    monkeypatch.chdir(folder)
    assert write_report(".") == Path("report.html")
    text = Path("report.html").read_text()
    assert "--ckpt_path &#39;my runs/sines/version_0/checkpoints/best.ckpt&#39;</code>" in text
    assert "optimiser steps: 20, epochs: 4<" in text, "a validation of an earlier checkpoint comes last in the file"
    assert "1.5</b><span>last val/kl" in text


def test_what_several_processes_left_is_shown(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,test/elbo\n4,-2.5\n")
    sample = tmp_path / "predictions" / "sample"
    audio = Media(SimpleNamespace(modality="audio", sample_rate=RATE))
    audio.write({"sampled": [torch.zeros(40, 200)]}, sample, "test_0")
    save_picture(audio.draw({"real": [torch.zeros(40, 200)]}), tmp_path / "encodings_0.png")
    for process, nats in enumerate(([-1.0, -2.0], [-3.0])):
        lengths = np.ones(len(nats), int)
        np.savez(tmp_path / f"evaluation_{process}.npz", test_elbo=nats, test_lengths=lengths, test_kl_per_dim=[0.5])
    text = write_report(tmp_path).read_text()
    assert "<h3>sampled</h3>" in text
    assert "<h2>Prediction: encode</h2>" in text
    assert 'alt="evaluation"' in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.csv", b"step,val/elbo\n1,\x00\xff\n"),
        ("evaluation.npz", b"PK\x03\x04cut off"),
        ("evaluation.npz", b""),
        ("predictions/forecast/figures.json", b"{"),
        ("predictions/forecast/figures.json", b"[1]"),
    ],
)
def test_a_damaged_file_is_named_and_the_last_page_kept(tmp_path, name, content):
    folder = fill(tmp_path)
    (folder / "report.html").write_text("as it was")
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: (is damaged|can't be read as|cannot be read as) .*\(.*\)"):
        write_report(folder)
    assert (folder / "report.html").read_text() == "as it was"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    program, driver = next(filter(None, found), None), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no Chromium with its chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "no-first-run",
        "disable-background-networking",
        "mute-audio",
    ):
        options.add_argument(f"--{word}")
    options.add_argument("--autoplay-policy=no-user-gesture-required")
    options.add_argument("--window-size=1200,900")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options, Service(driver))
    yield opened
    opened.quit()


TOO_WIDE = "return document.documentElement.scrollWidth - window.innerWidth"
PLAYED = """
const done = arguments[0];
Promise.all([...document.querySelectorAll('audio')].map(async sound => {
  await new Promise(ready => sound.readyState ? ready() : sound.addEventListener('loadedmetadata', ready));
  await sound.play();
  await new Promise(moved => sound.addEventListener('timeupdate', () => sound.currentTime > 0 && moved()));
  sound.pause();
  return sound.duration;
})).then(done, error => done(String(error)));
"""


@pytest.mark.browser
def test_a_browser_shows_and_plays_it(page, browser):
    browser.get(page.as_uri())
    widths = browser.execute_script("return [...document.images].map(i => [i.alt, i.complete, i.naturalWidth])")
    assert len(widths) >= 7
    assert all(complete and width > 0 for _, complete, width in widths), widths
    assert browser.execute_async_script(PLAYED) == pytest.approx([0.5, 6.0, 0.5], abs=0.1)
    assert browser.execute_script(TOO_WIDE) <= 0
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_a_narrow_window_scrolls_what_is_wide_and_not_the_page(page, browser):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    browser.get(page.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert browser.execute_script(TOO_WIDE) <= 0
    width = browser.execute_script("return document.querySelector('figure img').getBoundingClientRect().width")
    assert width >= 700, "pictures stay readable"
