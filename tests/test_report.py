"""The report: what is in the file, and what a browser makes of it."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from ood_heatmap import figures
from ood_heatmap.figures import Card
from ood_heatmap.pipeline.gallery import _MAX_CARDS
from ood_heatmap.report import render_report

NASTY = "<script>alert(1)</script>\"'&{{ data }}</td>"
METRICS = ("auroc", "aupr_in", "aupr_out", "fpr95_id_pos", "fpr95_ood_pos")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMEDRIVER = shutil.which("chromedriver")


def make_scores(*, count=400):
    """Return scores with many ties, and some on the grid of the slider."""
    rng = np.random.default_rng(0)
    spread = {"id": 0.1, "far": 0.3, NASTY: 0.2}
    scores = {name: rng.gamma(2, value / 2, count) for name, value in spread.items()}
    for values in scores.values():
        values[: count // 2] = values[: count // 2].round(3)
    return {name: values.astype(np.float32) for name, values in scores.items()}


def make_cards(scores, *, each=4, size=16):
    rng = np.random.default_rng(1)
    return [
        Card(
            set_name=name,
            name=f"{number:03d} {NASTY if name == NASTY else name}.png",
            image=rng.integers(0, 256, (3, size, size)).astype(np.uint8),
            pixel_score=rng.random((size, size)).astype(np.float32),
            nearest=rng.integers(0, 256, (3, size, size)).astype(np.uint8),
            score=float(scores[name][number]),
            distance=float(rng.gamma(9)),
            prediction=f"class {NASTY}",
            p_value=None if number == 0 else 0.25,
        )
        for name in scores
        for number in range(each)
    ]


def make_metrics(scores):
    """Return a table in which the heatmap is best everywhere, but for a tie on paper."""
    rows = []
    for number, method in enumerate(("heatmap", "knn")):
        for name in [name for name in scores if name != "id"]:
            better, worse = 0.9 - 0.1 * number, 0.3 + 0.1 * number
            numbers = (better, better, 0.800001 + 1e-6 * number, worse, worse)
            values = dict(zip(METRICS, numbers, strict=True))
            rows.append({"method": method, "set": name, **values, "prevalence_ood": 0.5})
    rows[0]["intervals"] = {"auroc": [0.8912, 0.9087]}
    return {"table": rows, "id_accuracy": 0.9487}


def make_arguments(**changes):
    scores = make_scores()
    curve = ([0.0, 0.1, 1.0], [0.0, 0.8, 1.0])
    return {
        "title": f"A report {NASTY}",
        "metrics": make_metrics(scores),
        "scores": scores,
        "roc": {name: {"heatmap": curve, "knn": curve} for name in ("far", NASTY)},
        "cards": make_cards(scores),
        "color_max": 0.8,
        "threshold": None,
        "classes": ["cat", NASTY],
        **changes,
    }


class Page(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def arguments():
    return make_arguments(warnings=["accuracy 10.00 % is that of chance", "x" * 300])


@pytest.fixture(scope="module")
def text(arguments):
    return render_report(**arguments)


@pytest.fixture(scope="module")
def path(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(text, "utf-8")
    return path


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def embedded(text):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1]
    )


def picture(source):
    head, content = source.split(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


def test_names_cannot_become_markup(page, text, arguments):
    assert len(page.all("script")) == 2  # the data and the program
    assert "<script>alert" not in text
    assert text.count("<title>") == 1
    names = [attributes["alt"] for attributes in page.all("img")]
    assert sum(NASTY in name for name in names) == 3 * 4
    assert [one["name"] for one in embedded(text)["sets"]] == list(arguments["scores"])


def test_nothing_is_loaded_from_elsewhere(page, text):
    sources = [
        value
        for _, attributes in page.tags
        for key, value in attributes.items()
        if key in ("src", "href", "srcset", "action", "data", "poster", "background")
    ]
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(", text)
    assert set(re.findall(r"https?://[^\s\"'<]*", text)) == {"http://www.w3.org/2000/svg"}
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_same_input_gives_the_same_page(text, arguments):
    assert render_report(**arguments) == text


def test_a_large_report_stays_small():
    scores = make_scores(count=10_000)
    scores.update({f"set {number}": scores["far"] for number in range(7)})
    cards = make_cards(scores, each=20, size=32)  # 200, of noise, which no PNG can make smaller
    text = render_report(**make_arguments(scores=scores, cards=cards))
    assert len(text.encode()) < 5e6


def test_a_full_gallery_of_photos_stays_below_ten_megabytes():
    """Of noise, which nothing can make smaller; as many cards as an evaluation shows at most."""
    scores = make_scores()
    cards = make_cards(scores, each=8, size=224)
    cards = (cards * (_MAX_CARDS // len(cards) + 1))[:_MAX_CARDS]
    text = render_report(**make_arguments(cards=cards))
    assert len(text.encode()) < 10e6


def test_large_pictures_are_made_smaller():
    scores = make_scores()
    cards = make_cards(scores, each=1, size=224)
    text = render_report(**make_arguments(cards=cards))
    images = Page(text).all("img")[1:]  # after the colour scale
    assert {(image["width"], image["height"]) for image in images} == {("96", "96")}
    assert all(picture(image["src"]).shape == (96, 96, 3) for image in images)


def test_every_card_is_there_pixel_by_pixel(page, arguments):
    items = [attributes for attributes in page.all("li") if attributes.get("class") == "card"]
    cards = arguments["cards"]
    assert [float(item["data-score"]) for item in items] == [card.score for card in cards]
    assert [float(item["data-distance"]) for item in items] == [card.distance for card in cards]
    images = page.all("img")[1:]  # after the colour scale
    assert len(images) == 3 * len(cards)
    for number, card in enumerate(cards):
        image, heatmap, nearest = (picture(one["src"]) for one in images[3 * number :][:3])
        np.testing.assert_array_equal(image, card.image.transpose(1, 2, 0))
        np.testing.assert_array_equal(nearest, card.nearest.transpose(1, 2, 0))
        share = np.clip(card.pixel_score / arguments["color_max"], 0, 1)
        colors = colormaps["inferno"](share, bytes=True)[..., :3]
        np.testing.assert_array_equal(heatmap, colors)
        assert card.name in images[3 * number]["alt"]


def test_a_decoder_that_answers_nothing_gives_dark_heatmaps():
    card = replace(make_cards(make_scores())[0], pixel_score=np.zeros((2, 2), np.float32))
    page = Page(render_report(**make_arguments(cards=[card], color_max=0.0)))
    darkest = colormaps["inferno"](0, bytes=True)[:3]
    heatmap = picture(page.all("img")[2]["src"])
    np.testing.assert_array_equal(heatmap, np.broadcast_to(darkest, (2, 2, 3)))
    # on an overlay the image shows through
    drawn = figures.overlay(card.image[:, :2, :2], card.pixel_score, 0.0, size=2)
    np.testing.assert_array_equal(np.asarray(drawn), card.image[:, :2, :2].transpose(1, 2, 0))


def test_scores_come_back_bit_for_bit(text, arguments):
    for one in embedded(text)["sets"]:
        decoded = np.frombuffer(base64.b64decode(one["scores"]), "<f4")
        np.testing.assert_array_equal(decoded, np.sort(arguments["scores"][one["name"]]))


def rows_of(text):
    """Return the metrics of each set and method, as the table shows them."""
    found, name = {}, ""
    for row in re.findall(r"<tr>(.*?)</tr>", text[text.index('<table id="metrics">') :]):
        if group := re.search(r'<th scope="rowgroup"[^>]*>(.*?)</th>', row):
            name = unescape(group[1])
        if method := re.search(r'<th scope="row">(.*?)</th>', row):
            found[name, method[1]] = re.findall(r"<td[^>]*>(.*?)</td>", row)
    return found


def test_the_table_is_in_percent_with_the_best_in_bold_and_ties_too(text):
    rows, bold = rows_of(text), "<strong>{}</strong>".format
    assert rows["far", "heatmap"] == [
        bold("90.00"), "89.12&ndash;90.87", bold("90.00"), bold("80.00"), bold("30.00"),
        bold("30.00"), "50.0",
    ]  # fmt: skip
    assert rows["far", "knn"] == [
        "80.00", "", "80.00", bold("80.00"), "40.00", "40.00", "50.0"
    ]  # fmt: skip
    assert rows[NASTY, "heatmap"][0] == bold("90.00")


def test_a_metric_that_is_missing_is_a_dash():
    table = [
        {"method": "heatmap", "set": "far", "auroc": 0.5, "aupr_in": float("nan")},
        {"method": "knn", "set": "far", "auroc": 0.25, "aupr_in": 0.125},
    ]
    text = render_report(**make_arguments(metrics={"table": table}))
    rows = rows_of(text)
    assert rows["far", "heatmap"] == ["<strong>50.00</strong>", *["&ndash;"] * 4]
    assert rows["far", "knn"][1] == "<strong>12.50</strong>"


def test_a_file_name_that_is_not_utf8_is_written():
    cards = [
        replace(make_cards(make_scores())[0], name=b"\xff.png".decode("utf-8", "surrogateescape"))
    ]
    text = render_report(**make_arguments(cards=cards))
    assert "\\udcff.png" in text
    text.encode()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"far": np.ones(3, np.float32)}, "must have the set 'id'"),
        ({"id": np.ones(0, np.float32)}, "'id' must be finite and not empty"),
        ({"id": np.ones(3), "far": np.array([1, np.nan])}, "'far' must be finite"),
    ],
)
def test_scores_that_cannot_be_counted_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        render_report(**make_arguments(scores=changed))


@pytest.mark.parametrize("scale", [1e-6, 0.37, 1.0, 25.0, 3e4])
def test_the_slider_covers_every_score_in_fine_round_steps(scale):
    scores = {
        "id": np.array([0.1, 0.5], np.float32) * np.float32(scale),
        "far": np.array([scale], np.float32),
    }
    low, high, step = slider_of(scores, 0.2 * scale)
    assert low == 0
    assert high >= np.float32(scale)
    assert 1000 <= (high - low) / step <= 10_100
    assert float(f"{step:.0e}") == step


def test_the_slider_of_equal_scores_is_not_an_empty_range():
    assert slider_of({"id": np.zeros(3, np.float32)}, 0.0)[:2] == [0, 1]


def slider_of(scores, threshold):
    page = Page(render_report(**make_arguments(scores=scores, threshold=threshold, cards=[])))
    (slider,) = [tag for tag in page.all("input") if tag["type"] == "range"]
    return [float(slider[name]) for name in ("min", "max", "step")]


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_colours_are_told_apart_in_light_and_dark(text):
    """WCAG 2 AA: 4.5 for text, 3 for lines that carry meaning."""
    styles = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    for style in styles:
        colors = dict(re.findall(r"--([\w-]+): (#\w{6})", style))
        for name in ("text", "muted", "accent"):
            for ground in ("page", "raised"):
                assert contrast(colors[name], colors[ground]) >= 4.5, (name, ground)
        for name in ("edge", "id", *(f"curve-{number}" for number in range(6))):
            assert contrast(colors[name], colors["page"]) >= 3, name
    assert len(styles) == 2


def test_warnings_of_the_stages_come_first_and_escaped():
    warnings = [f"accuracy 10.00 % {NASTY}", "line one\nline two"]
    text = render_report(**make_arguments(warnings=warnings))
    box = text[text.index('<section class="warnings"') : text.index('id="metrics-title"')]
    items = [unescape(item) for item in re.findall(r"<li>(.*?)</li>", box, re.DOTALL)]
    assert items == [warnings[0], "line one\\nline two"]
    assert 'class="warnings"' not in render_report(**make_arguments())


def test_a_missing_threshold_is_explained():
    decisions = {"level": 0.01, "num_calibration": 60, "threshold": None}
    metrics = make_metrics(make_scores()) | {"decisions": decisions}
    text = render_report(**make_arguments(metrics=metrics))
    assert "no threshold, 60 held-out ID images are too few for a false-alarm level of 0.01" in text
    assert "no threshold" not in render_report(**make_arguments())


# ---- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Return a headless Chromium with a profile of its own."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("no chromium and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "disable-dev-shm-usage", f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(CHROMEDRIVER)
    with webdriver.Chrome(options=options, service=service) as driver:
        yield driver


@pytest.fixture
def opened(browser, path):
    """Return the browser with the report freshly open; its console must stay empty."""
    browser.get(path.as_uri())
    yield browser
    assert browser.get_log("browser") == []


def set_value(browser, element, value, event):
    browser.execute_script(
        "const it = document.getElementById(arguments[0]); it.value = arguments[1];"
        "it.dispatchEvent(new Event(arguments[2], { bubbles: true }));",
        element, value, event,
    )  # fmt: skip


def get(browser, expression):
    return browser.execute_script(f"return {expression}")


def counts(browser):
    rows = get(
        browser,
        "[...document.querySelectorAll('#counts tbody tr')].map(row => "
        "[...row.cells].map(cell => cell.textContent))",
    )
    return [(int(row[1].replace(",", "")), int(row[2].replace(",", "")), row[3]) for row in rows]


def expected_counts(scores, threshold):
    flagged = {name: int((values > np.float32(threshold)).sum()) for name, values in scores.items()}
    return [
        (len(scores[name]), count, f"{100 * count / len(scores[name]):.2f}")
        for name, count in flagged.items()
    ]


@pytest.mark.browser
def test_it_draws_every_set(opened, arguments):
    script = "document.querySelectorAll('{}').length"
    assert get(opened, script.format("#histograms svg")) == 2
    assert get(opened, script.format("#roc svg")) == 2
    assert get(opened, script.format("#roc .curve")) == 4
    assert get(opened, "[...document.images].every(image => image.naturalWidth > 0)")
    assert opened.title == arguments["title"]
    assert (
        get(opened, "document.querySelector('#histograms .swatch:not(.id)').textContent") == "far"
    )
    assert NASTY in get(opened, "document.getElementById('histograms').textContent")


@pytest.mark.browser
def test_warnings_are_in_sight_when_the_page_opens(opened):
    box = "document.querySelector('.warnings')"
    assert get(opened, f"{box}.innerText").splitlines()[:2] == [
        "Warnings", "accuracy 10.00 % is that of chance"
    ]  # fmt: skip
    assert get(opened, f"{box}.getBoundingClientRect().top < window.innerHeight")


@pytest.mark.browser
def test_it_starts_at_the_95th_percentile_of_the_id_scores(opened, arguments):
    scores = arguments["scores"]
    start = np.quantile(scores["id"], 0.95)
    assert np.float32(get(opened, "document.getElementById('threshold-number').value")) == start
    assert counts(opened) == expected_counts(scores, start)
    assert counts(opened)[0][2] == "5.00"


@pytest.mark.browser
def test_it_starts_at_a_threshold_that_is_given(opened, tmp_path):
    arguments = make_arguments(threshold=0.123456789012)
    (tmp_path / "report.html").write_text(render_report(**arguments), "utf-8")
    opened.get((tmp_path / "report.html").as_uri())
    assert counts(opened) == expected_counts(arguments["scores"], 0.123456789012)


@pytest.mark.browser
@pytest.mark.parametrize("threshold", ["0", "0.05", "0.1", "0.123", "0.2", "0.3333333", "99"])
def test_the_slider_counts_what_numpy_counts(opened, arguments, threshold):
    set_value(opened, "threshold-slider", threshold, "input")
    used = float(get(opened, "document.getElementById('threshold-slider').value"))
    assert used == pytest.approx(float(threshold), abs=1e-3) or threshold == "99"
    assert float(get(opened, "document.getElementById('threshold-number').value")) == used
    assert counts(opened) == expected_counts(arguments["scores"], used)


@pytest.mark.browser
def test_a_typed_threshold_on_a_score_does_not_flag_that_score(opened, arguments):
    for score in arguments["scores"]["id"][::40]:
        set_value(opened, "threshold-number", str(score), "input")
        assert counts(opened) == expected_counts(arguments["scores"], score)


@pytest.mark.browser
def test_the_threshold_is_marked_in_every_plot(opened):
    where = (
        "[...document.querySelectorAll('#histograms .mark')].map(mark => mark.getAttribute('x1'))"
        ".concat([...document.querySelectorAll('#roc .point')].map(p => p.getAttribute('cx')))"
    )
    before = get(opened, where)
    set_value(opened, "threshold-slider", "0.05", "input")
    after = get(opened, where)
    assert len(before) == 4
    assert all(float(one) > float(other) for one, other in zip(before[:2], after[:2], strict=True))
    assert all(float(one) < float(other) for one, other in zip(before[2:], after[2:], strict=True))
    opened.execute_script("document.getElementById('threshold-reset').click()")
    assert get(opened, where) == before


@pytest.mark.browser
def test_cards_above_the_threshold_are_flagged(opened, arguments):
    set_value(opened, "threshold-slider", "0.1", "input")
    flags = get(opened, "[...document.querySelectorAll('.flag')].map(flag => !flag.hidden)")
    assert flags == [card.score > np.float32(0.1) for card in arguments["cards"]]
    assert True in flags
    assert False in flags


def shown_cards(browser, key):
    return get(
        browser,
        f"[...document.querySelectorAll('.card:not([hidden])')].map(card => card.dataset.{key})",
    )


@pytest.mark.browser
@pytest.mark.parametrize("key", ["score", "distance"])
@pytest.mark.parametrize("way", ["up", "down"])
def test_the_gallery_sorts(opened, arguments, key, way):
    given = [getattr(card, key) for card in arguments["cards"]]
    set_value(opened, "gallery-order", f"{key}-{way}", "change")
    assert [float(one) for one in shown_cards(opened, key)] == sorted(given, reverse=way == "down")
    set_value(opened, "gallery-order", "", "change")
    assert [float(one) for one in shown_cards(opened, key)] == given


@pytest.mark.browser
def test_the_gallery_and_the_table_filter_by_set(opened):
    names = get(opened, "[...document.getElementById('gallery-set').options].map(o => o.text)")
    assert names[:3] == ["all", "id", "far"]
    set_value(opened, "gallery-set", "1", "change")
    assert shown_cards(opened, "set") == ["1"] * 4
    assert get(opened, "document.getElementById('gallery-status').textContent") == "4 of 12 images"
    set_value(opened, "table-set", "0", "change")
    visible = "[...document.querySelectorAll('#metrics tbody:not([hidden]) [scope=rowgroup]')]"
    assert get(opened, f"{visible}.map(head => head.textContent)") == ["far"]
    set_value(opened, "table-set", "", "change")
    assert get(opened, f"{visible}.length") == 2


@pytest.mark.browser
def test_every_control_is_reached_and_moved_by_keyboard(opened):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    stops = [
        "ID classes", "table-set", "Table of metrics", "threshold-number", "threshold-reset",
        "threshold-slider", "Flagged images by set", "gallery-set", "gallery-order",
    ]  # fmt: skip
    for stop in stops:
        opened.switch_to.active_element.send_keys(keys.TAB)
        at = opened.switch_to.active_element
        names = (at.get_attribute("id"), at.get_attribute("aria-label"), at.text)
        assert any(stop in name for name in names if name)
        assert at.value_of_css_property("outline-style") == "solid"
    before = counts(opened)
    opened.execute_script("document.getElementById('threshold-slider').focus()")
    opened.switch_to.active_element.send_keys(keys.HOME)
    assert counts(opened) != before
    assert get(opened, "document.getElementById('threshold-number').value") == "0"


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 360, 1200])
def test_the_page_never_scrolls_sideways(opened, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 1000}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert get(opened, "document.documentElement.scrollWidth") <= width
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
