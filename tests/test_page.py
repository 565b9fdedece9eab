"""The chat page in a real browser: headless Chromium. Skipped if it is not installed."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Served

pytest.importorskip("selenium")
from selenium.webdriver import Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

# Starts programs, jobs of several ranks, servers or a browser.
pytestmark = pytest.mark.slow

SCRIPTED = Path(__file__).with_name("serving.py")
FLAGS = ("--max_seq_len", "16384", "--max_batch_size", "2", "--dtype", "float32")
pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs chromium and chromedriver",
)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served(*FLAGS, script=SCRIPTED) as served:
        yield served
    assert served.status == 0, served.log


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1100,800",
    ):
        options.add_argument(flag)
    folder = str(tmp_path_factory.mktemp("downloads"))
    options.add_experimental_option("prefs", {"download.default_directory": folder})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    chrome.folder = folder  # type: ignore[attr-defined]
    chrome.set_script_timeout(60)
    yield chrome
    chrome.quit()


class Page:
    """The chat page as a person uses and sees it."""

    def __init__(self, chrome: Chrome, url: str):
        self.chrome, self.url = chrome, url
        chrome.get(url)
        chrome.execute_script("localStorage.clear(); sessionStorage.clear()")
        self.reload()

    def reload(self) -> None:
        self.chrome.get(self.url)
        self.until(lambda: "·" in self.chrome.title)

    def until(self, condition: Callable[[], Any], seconds: float = 120) -> Any:
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, self.text()
            time.sleep(0.02)
        return value

    def text(self) -> str:
        return self.chrome.find_element(By.TAG_NAME, "body").text

    def find(self, css: str) -> Any:
        return self.chrome.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
        texts: list[str] = self.chrome.execute_script(script, css)
        return texts

    def press(self, label: str, within: str = "body") -> None:
        script = """const found = [...document.querySelectorAll(`${arguments[1]} button`)]
            .filter((b) => b.textContent === arguments[0]); found.at(-1).click()"""
        self.chrome.execute_script(script, label, within)

    def ask(self, text: str) -> None:
        self.find("#draft").send_keys(text, Keys.ENTER)

    def idle(self) -> bool:
        return bool(self.find("#send").text == "Send")

    def answer(self, text: str) -> str:
        """Ask, wait for the complete answer and return it."""
        before = len(self.all(".assistant"))
        self.ask(text)
        self.until(lambda: self.idle() and len(self.all(".assistant")) > before)
        return self.all(".assistant .text")[-1]

    @property
    def alert(self) -> str:
        return "".join(self.all("#alert"))


@pytest.fixture
def page(chrome: Chrome, served: Served) -> Iterator[Page]:
    page = Page(chrome, served.url)
    yield page
    severe = [
        entry
        for entry in chrome.get_log("browser")
        if "Content Security Policy" in entry["message"]
    ]
    assert not severe, "the page needs nothing that its policy forbids"


def test_an_answer_streams_in_and_says_how_fast_it_was(page: Page) -> None:
    page.ask("slow:30")
    page.until(lambda: 3 < page.all(".assistant .text")[-1].count("fox") < 30)
    assert page.find("#send").text == "Stop"
    page.until(page.idle)
    assert page.all(".assistant .text")[-1].count("fox") == 30
    assert re.fullmatch(r"3\d tokens, \d+\.\d tokens/s", page.find("#state").text)


def test_stop_and_escape_keep_what_had_come(page: Page) -> None:
    for stop in (
        lambda: page.find("#send").click(),
        lambda: page.find("#draft").send_keys(Keys.ESCAPE),
    ):
        page.ask("slow:500")
        page.until(lambda: page.all(".assistant .text")[-1].count("fox") > 2)
        stop()
        page.until(page.idle)
        assert (
            2 < page.all(".assistant .text")[-1].count("fox") < 400
            and "stopped" in page.all(".assistant .tools")[-1]
        )


def test_an_answer_can_be_had_anew_and_a_message_edited(page: Page) -> None:
    assert page.answer("say:first") == "first"
    page.press("Regenerate")
    page.until(page.idle)
    assert page.all(".assistant .text") == ["first"]
    assert page.answer("say:second") == "second"
    page.press("Edit", ".message:nth-child(1)")
    assert page.find("#draft").get_attribute("value") == "say:first" and page.all(".message") == []
    page.press("Undo", "#alert")
    assert page.all(".assistant .text") == ["first", "second"]
    page.press("Edit", ".message:nth-child(3)")
    page.find("#draft").clear()
    assert page.answer("say:other") == "other"
    assert page.all(".assistant .text") == ["first", "other"]


def test_a_reload_keeps_conversations_drafts_and_what_had_come(page: Page) -> None:
    page.answer("say:kept")
    page.find("#draft").send_keys("not yet sent")
    page.reload()
    assert (
        page.all(".assistant .text") == ["kept"]
        and page.find("#draft").get_attribute("value") == "not yet sent"
    )
    page.find("#draft").clear()
    page.ask("slow:300")
    page.until(lambda: page.all(".assistant .text")[-1].count("fox") > 20)
    page.reload()
    assert (
        page.all(".assistant .text")[-1].count("fox") > 5
        and "interrupted" in page.all(".assistant .tools")[-1]
    )


def test_a_server_that_dies_in_mid_answer_loses_nothing_and_is_seen_to_be_back(
    chrome: Chrome,
) -> None:
    with Served(*FLAGS, script=SCRIPTED) as served:
        page = Page(chrome, served.url)
        page.ask("slow:900")
        page.until(lambda: page.all(".assistant .text")[-1].count("fox") > 5)
        served.job.kill()
        page.until(page.idle)
        assert page.all(".assistant .text")[-1].count("fox") > 5 and "kept" in page.alert
        page.press("Regenerate")
        page.until(lambda: "The server does not answer. Your message is kept." in page.alert)
        assert page.all(".user .text") == ["slow:900"]
        port = served.url.rsplit(":", 1)[1]
    with Served(*FLAGS, "--port", port, script=SCRIPTED):
        page.until(lambda: "The server is back." in page.alert)
        page.press("Edit")
        page.find("#draft").clear()
        assert page.answer("say:back again") == "back again" and page.alert == ""


def test_what_a_model_writes_never_becomes_markup(page: Page) -> None:
    evil = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script><b>bold</b>"
    assert page.answer(f"say:{evil}") == evil
    assert page.answer(f"say:```html {evil}") != ""
    made = page.chrome.execute_script(
        "return document.querySelectorAll('#log img, #log script, #log b, #log a').length"
    )
    assert made == 0 and "broken" not in page.chrome.title


def test_markdown_becomes_lists_code_and_emphasis(page: Page) -> None:
    text = "# Head\n\nSome **bold** and *slanted* `a*b*c`.\n\n- one\n- two\n\n3. three\n\n"
    text += "```python\nx = 1\n\ny = 2\n```\nEnd"
    script = """const target = document.createElement("div"), growing = new Growing(target), text = arguments[0];
        for (let n = 0; n <= text.length; n += arguments[1]) growing.show(text.slice(0, n));
        growing.show(text); return target.innerHTML"""
    whole = page.chrome.execute_script(script, text, len(text))
    for part in (
        "<h3>Head</h3>",
        "<strong>bold</strong>",
        "<em>slanted</em>",
        "<code>a*b*c</code>",
        "<li>two</li>",
    ):
        assert part in whole
    assert (
        '<ol start="3">' in whole
        and "<code>x = 1\n\ny = 2</code>" in whole
        and "<p>End</p>" in whole
    )
    for step in (1, 3, 7):  # however the stream is cut into pieces
        assert page.chrome.execute_script(script, text, step) == whole


def test_ten_thousand_tokens_stay_smooth(page: Page) -> None:
    page.chrome.execute_script(
        """window.longest = 0; let last = performance.now();
        (function tick() { const now = performance.now(); longest = Math.max(longest, now - last); last = now;
        requestAnimationFrame(tick); })()"""
    )
    # Send tokens as fast as the page can read them, which is faster than any model here.
    page.chrome.execute_script(
        """window.fetch = async () => { let n = 0; return new Response(new ReadableStream({async pull(to) {
            if (n === 10000) { to.enqueue(new TextEncoder().encode("data: [DONE]\\n\\n")); return to.close(); }
            if (++n % 50 === 0) await new Promise((then) => setTimeout(then));
            const text = n % 100 === 50 ? "\\n\\n- fox" : " fox";
            const event = {choices: [{index: 0, delta: {content: text}, finish_reason: null}]};
            to.enqueue(new TextEncoder().encode(`data: ${JSON.stringify(event)}\\n\\n`)); }})); }"""
    )
    page.ask("as many as you can")
    page.until(page.idle, 120)
    assert page.all(".assistant .text")[-1].count("fox") == 10000
    assert page.chrome.execute_script("return longest") < 1500, (
        "milliseconds without a frame, on a busy machine"
    )


def test_conversations_are_searched_renamed_deleted_and_brought_back(page: Page) -> None:
    page.answer("say:about hedgehogs")
    page.press("New chat")
    page.answer("say:about owls")
    assert len(page.all("#list li")) == 2
    page.find("#search").send_keys("HEDGEHOG")
    page.until(lambda: len(page.all("#list li")) == 1)
    page.find("#search").send_keys(Keys.BACKSPACE * 8)
    page.chrome.execute_script("window.prompt = () => 'My owls'")
    page.press("✎", "#list li[aria-current]")
    assert "My owls" in page.all("#list li")[0] and page.find("#title").text == "My owls"
    page.press("✕", "#list li[aria-current]")
    assert len(page.all("#list li")) == 1 and page.all(".assistant .text") == ["about hedgehogs"]
    page.press("Undo", "#alert")
    assert len(page.all("#list li")) == 2 and page.all(".assistant .text") == ["about owls"]


def test_conversations_go_out_as_json_and_come_in_again(page: Page, tmp_path: Path) -> None:
    page.answer("say:<b>exported</b>")
    page.press("Export")
    file = Path(page.chrome.folder) / "conversations.json"  # type: ignore[attr-defined]
    page.until(lambda: file.exists() and file.stat().st_size)
    assert json.loads(file.read_text())[0]["messages"][1]["content"] == "<b>exported</b>"
    page.chrome.execute_script("localStorage.clear()")
    page.reload()
    assert page.all("#list li") == []
    page.find("#file").send_keys(str(file))
    page.until(lambda: page.all(".assistant .text") == ["<b>exported</b>"])
    for name, content, sentence in (
        ("a.json", "{", "is not JSON"),
        ("b.json", '[{"messages": 3}]', "conversation 1"),
    ):
        (tmp_path / name).write_text(content)
        page.find("#file").send_keys(str(tmp_path / name))
        page.until(lambda sentence=sentence: sentence in page.alert)
    assert len(page.all("#list li")) == 1


def test_settings_are_sent_and_kept(page: Page) -> None:
    page.press("Settings")
    page.find("#system").send_keys("Be brief.")
    page.find("#max_tokens").send_keys("3")
    page.chrome.execute_script(
        """const asked = window.fetch;
        window.fetch = (url, how) => { window.sent = how?.body; return asked(url, how); };
        $("temperature").value = 1.5; $("temperature").oninput(); $("seed").value = 7; $("seed").oninput()"""
    )
    page.answer("long:9")
    sent = json.loads(page.chrome.execute_script("return window.sent"))
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["temperature"], sent["max_tokens"], sent["seed"]) == (1.5, 3, 7)
    assert "cut at the length limit" in page.all(".assistant .tools")[-1]
    page.reload()
    assert page.find("#system").get_attribute("value") == "Be brief."
    assert page.find("#max_tokens").get_attribute("value") == "3"


def test_two_tabs_do_not_undo_each_other(page: Page) -> None:
    page.answer("say:first tab")
    first = page.chrome.current_window_handle
    page.chrome.switch_to.new_window("tab")
    try:
        page.reload()
        page.press("New chat")
        page.answer("say:second tab")
        assert len(page.all("#list li")) == 2
    finally:
        page.chrome.close()
        page.chrome.switch_to.window(first)
    page.until(lambda: len(page.all("#list li")) == 2)
    assert page.all(".assistant .text") == ["first tab"]
    page.answer("say:more")
    page.reload()
    assert len(page.all("#list li")) == 2


def test_it_is_used_by_keyboard_and_fits_a_phone(page: Page) -> None:
    page.find("#draft").send_keys("line one", Keys.SHIFT + Keys.ENTER + Keys.NULL, "line two")
    assert (
        page.find("#draft").get_attribute("value") == "line one\nline two"
        and page.all(".message") == []
    )
    unnamed = page.chrome.execute_script(
        """return [...document.querySelectorAll("button, input, textarea, select")].filter((e) => !e.hidden &&
        !(e.textContent.trim() || e.ariaLabel || e.labels?.length)).map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    page.chrome.set_window_size(360, 740)
    try:
        page.chrome.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True},
        )
        assert page.chrome.execute_script("return document.documentElement.scrollWidth") <= 360
        assert not page.find("aside").is_displayed()
        page.find("#menu").click()
        assert page.find("aside").is_displayed()
        page.find("#new").click()
        page.until(lambda: not page.find("aside").is_displayed())
    finally:
        page.chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.chrome.set_window_size(1100, 800)


def test_a_key_is_asked_for_and_forgotten_with_the_tab(chrome: Chrome) -> None:
    with Served(*FLAGS, script=SCRIPTED, LLAMA_API_KEY="sesame") as served:
        chrome.get(served.url)
        page = Page.__new__(Page)
        page.chrome, page.url = chrome, served.url
        page.until(lambda: "This server requires an API key." in page.alert)
        page.press("Enter it", "#alert")
        page.find("#key").send_keys("sesame", Keys.TAB)
        page.until(lambda: "·" in chrome.title)
        assert page.answer("say:open") == "open"
        assert "sesame" not in json.dumps(chrome.execute_script("return {...localStorage}"))
