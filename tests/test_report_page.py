"""The report's page in a browser: nothing fails in it, nothing is cut off, its players play, its tables sort."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
from factories import Case, Effect, write_rows

from harness.report import write_report
from harness.results import BASELINE, RunFolder
from harness.summarize import build_summary

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


def with_clips(parent: Path, case: Case, seconds: float = 1.0) -> RunFolder:
    """A run whose clips are there, loud for the baseline and less so for the combo."""
    folder = write_rows(parent, case)
    hiss = np.random.default_rng(0).normal(0, 0.05, round(24_000 * seconds))
    for row in folder.measurements()[0]:
        if row.audio:
            path = folder.path / row.audio
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, hiss if row.variant == BASELINE else hiss / 2, 24_000)
    folder.write_summary(build_summary(folder))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    parent = tmp_path_factory.mktemp("page")
    evidence = {"kv_cache": {"cat_calls": 0}}
    run = with_clips(parent / "runs", Case(effect=Effect(time=0.45, memory=0.8), evidence=evidence))
    return write_report([run], parent / "report").with_name("report.html")


class Elements(HTMLParser):
    """The page's elements with their attributes; every tag that opens closes, in order."""

    VOID = ("meta", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone(page):
    elements = Elements(page.read_text()).found
    sources = [attrs["src"] for _, attrs in elements if "src" in attrs]
    assert len(sources) == 12  # six clips of two variants
    assert all(source.startswith("data:audio/") for source in sources)
    assert not any(attrs.get("href", "#").startswith("http") for _, attrs in elements)
    assert sum(tag == "svg" for tag, _ in elements) == 4
    names = [attrs["id"] for _, attrs in elements if "id" in attrs]
    assert len(set(names)) == len(names)


def test_the_first_screen_tells_verdict_and_three_figures(page):
    text = page.read_text()
    front = text[: text.index('<details class="section"')]
    (fast,) = re.findall(r"is <strong>(2\.2\d) times as fast</strong> as the baseline", front)
    assert re.findall(r'class="large">([^<]+)<', front) == [fast, "80\N{NO-BREAK SPACE}%", "kept"]
    assert front.count("<svg") == 1


def test_drawings_answer_a_pointer(page):
    tips = [attrs["data-tip"] for _, attrs in Elements(page.read_text()).found if "data-tip" in attrs]
    assert any(re.fullmatch(r"production: time ratio 0\.45\d \(.+\), 16 pairs", tip) for tip in tips)
    assert any("generate_tokens 70 %" in tip for tip in tips)


def test_the_same_run_makes_the_same_page(page, tmp_path):
    (run,) = (page.parent.parent / "runs").iterdir()
    again = write_report([RunFolder(run)], tmp_path).with_name("report.html")
    assert again.read_text() == page.read_text()


@pytest.mark.slow
def test_a_long_workload_with_players_stays_small(tmp_path):
    run = with_clips(tmp_path / "runs", Case(texts=2), seconds=40.0)
    report = write_report([run], tmp_path / "report").with_name("report.html")
    assert 0 < report.read_text().count("<audio") < 12
    assert report.stat().st_size < 4_000_000


def test_clips_outside_the_run_are_not_read(tmp_path):
    folder = write_rows(tmp_path / "runs", Case())
    secret = tmp_path / "secret.wav"
    soundfile.write(secret, np.zeros(2400), 24_000)
    rows = [json.loads(line) for line in folder.utterances_file.read_text().splitlines()]
    rows = [{**row, "audio": "../../secret.wav" if row["audio"] else None} for row in rows]
    folder.utterances_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder.write_summary(build_summary(folder))
    assert "<audio" not in write_report([folder], tmp_path / "report").with_name("report.html").read_text()


PROBE = """
<script>
addEventListener("load", async () => {
  const found = {};
  const cut = (node) => node.scrollWidth > node.clientWidth + 1;
  found.cut = [...document.querySelectorAll("p, h1, h2, .tile, summary")].filter(cut).map((node) => node.textContent);
  found.wide = document.documentElement.scrollWidth > innerWidth;
  const drawn = [...document.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect());
  found.drawings = drawn.filter((box) => box.width > 300 && box.height > 80).length;
  found.outside = [...document.querySelectorAll("svg")].flatMap((svg) => {
    const frame = svg.getBoundingClientRect();
    return [...svg.querySelectorAll("text")].filter((text) => {
      const box = text.getBoundingClientRect();
      return box.width && (box.right > frame.right + 1 || box.left < frame.left - 1);
    }).map((text) => text.textContent);
  });

  const players = [...document.querySelectorAll("audio")];
  found.played = 0;
  for (const player of players.slice(0, 2)) {
    player.muted = true;
    await player.play();
    await new Promise((done) => player.addEventListener("ended", done));
    found.played += 1;
  }
  found.durations = players.map((player) => player.duration);

  const root = document.querySelector(".listening");
  const box = root.querySelector("input");
  box.click();
  found.blind = [...root.querySelectorAll(".name")].map((name) => name.textContent);
  const vote = (pair, index) => pair.querySelectorAll("button")[1 + index].click();
  const pairs = [...root.querySelectorAll(".pair")];
  pairs.forEach((pair, index) => vote(pair, [0, 1, 2][index % 3]));
  found.revealed = [...root.querySelectorAll(".name")].map((name) => name.textContent).sort();
  found.tally = root.querySelector("output").textContent;
  found.first = pairs[0].textContent;

  const table = [...document.querySelectorAll("table")].find((one) => one.textContent.includes("tokens_to_mel"));
  const column = () => [...table.tBodies[0].rows].map((row) => row.cells[1].textContent);
  table.closest("details").open = true;
  table.tHead.rows[0].cells[1].click();
  found.up = column();
  table.tHead.rows[0].cells[1].click();
  found.down = column();

  dispatchEvent(new Event("beforeprint"));
  found.closed = document.querySelectorAll("details:not([open])").length;
  await fetch("http://127.0.0.1:PORT/", { method: "POST", mode: "no-cors", body: JSON.stringify(found) });
});
</script>
"""


class Answers(BaseHTTPRequestHandler):
    """Keeps what the page reports of itself."""

    def do_POST(self):  # the base class's name for it
        self.server.found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


def browse(page: Path, probed: Path, *flags: str) -> tuple[dict, str]:
    """What the probe found in the page, and what the page said on its console."""
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        server.timeout, server.found = 60, {}
        script = PROBE.replace("PORT", str(server.server_port))
        probed.write_text(page.read_text().replace("</body>", f"{script}</body>"))
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
            "--autoplay-policy=no-user-gesture-required", f"--user-data-dir={probed.parent / 'profile'}",
            "--remote-debugging-port=0", *flags, probed.as_uri(),
        ]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as browser:
            server.handle_request()
            browser.terminate()
            _, said = browser.communicate(timeout=30)
        return server.found, "\n".join(line for line in said.splitlines() if "CONSOLE" in line)


@in_browser
@pytest.mark.parametrize("width", [1280, pytest.param(500, marks=pytest.mark.slow)])
def test_the_page_works_in_a_browser(page, tmp_path, width):
    found, console = browse(page, tmp_path / "probed.html", f"--window-size={width},1000")
    assert console == ""
    assert found["cut"] == []
    assert not found["wide"]
    assert found["outside"] == []
    assert found["played"] == 2
    assert all(duration == pytest.approx(1.0, abs=0.1) for duration in found["durations"])
    assert set(found["blind"]) == {"A", "B"}
    assert found["revealed"] == ["baseline"] * 6 + ["production"] * 6
    counted = re.match(r"baseline (\d), production (\d), no difference (\d) of 6\. Guessing .* \d+ %", found["tally"])
    assert sum(map(int, counted.groups())) == 6
    assert counted[3] == "2"
    assert found["up"] == found["down"][::-1] != found["down"]
    assert found["closed"] == 0
