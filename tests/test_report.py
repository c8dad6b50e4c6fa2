"""The report: what is in the file, and what a browser makes of it."""

import base64
import csv
import io
import json
import re
import shutil
import time
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ood_heatmap.figures import Card
from ood_heatmap.pictures import ColorScale, draw_overlay
from ood_heatmap.pipeline.gallery import _MAX_CARDS
from ood_heatmap.report import GalleryImage, render_report, report_content

NASTY = "<script>alert(1)</script>\"'&{{ data }}</td>"
SCALE = ColorScale(0.8, 0.5)
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


def make_images(scores, *, each=4, size=16):
    """Return gallery images; of the ID images every other one is of another class."""
    rng = np.random.default_rng(1)
    made = []
    for name in scores:
        for number in range(each):
            card = Card(
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
            photo = Image.fromarray(card.image.transpose(1, 2, 0).copy())
            overlay = draw_overlay(photo, card.pixel_score, (0, 0, size, size), SCALE)
            label = "" if name != "id" else (card.prediction, "another")[number % 2]
            made.append(GalleryImage(card, photo, overlay, label))
    return made


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
    """Return the arguments of ``report_content``."""
    scores = changes.get("scores") or make_scores()
    curve = ([0.0, 0.1, 1.0], [0.0, 0.8, 1.0])
    return {
        "scores": scores,
        "roc": {name: {"heatmap": curve, "knn": curve} for name in ("far", NASTY)},
        "images": make_images(scores) if "images" not in changes else [],
        "scale": SCALE,
        "threshold": None,
        "classes": ["cat", NASTY],
        **changes,
    }


FACTS = [("Run", f"runs/{NASTY}"), ("Weights (sha256)", "0123abcd" * 8), ("Version", "ood 1.2.3")]
COMMANDS = [f"ood-heatmap index runs/x --id '{NASTY}'", "ood-heatmap train runs/x"]


def render(metrics=None, *, title=f"A report {NASTY}", localization=None, **changes):
    """Return a page."""
    arguments = make_arguments(**changes)
    return render_report(
        json.loads(json.dumps(report_content(**arguments))),
        metrics or make_metrics(arguments["scores"]),
        title=title,
        facts=FACTS,
        commands=COMMANDS,
        localization=localization,
    )


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
    return render(**arguments)


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


PICTURES = ("photo", "overlay", "nearest")


def picture(encoded):
    pixels = decode(encoded["source"])
    assert pixels.shape == (encoded["height"], encoded["width"], 3)
    return pixels


def decode(source):
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
    # each place that text comes from: set, fact, command, class, title
    assert unescape(text).count(NASTY) > 4 * 4 + 5


def test_nothing_is_loaded_from_elsewhere(page, text):
    sources = [
        value
        for _, attributes in page.tags
        for key, value in attributes.items()
        if key in ("src", "href", "srcset", "action", "data", "poster", "background")
    ]
    assert sources
    anchors = {f"#{attributes['id']}" for _, attributes in page.tags if "id" in attributes}
    assert all(source.startswith("data:") or source in anchors for source in sources)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(", text)
    assert set(re.findall(r"https?://[^\s\"'<]*", text)) == {"http://www.w3.org/2000/svg"}
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_same_input_gives_the_same_page(text, arguments):
    assert render(**arguments) == text


def test_the_head_says_what_the_page_is_about(text):
    head = text[text.index('<dl class="facts"') : text.index("<main>")]
    found = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", head)
    assert [(unescape(name), unescape(value)) for name, value in found] == FACTS
    assert [unescape(one) for one in re.findall(r"<code>(.*?)</code>", head)] == COMMANDS


def test_the_verdict_comes_first_and_escaped():
    rows = [summary_row("heatmap", NASTY, 0.9), summary_row("knn", NASTY, 0.8)]
    text = render({"table": rows})
    (found,) = re.findall(r'<p class="verdict" id="verdict">(.*?)</p>', text)
    assert text.index(found) < text.index('id="facts"')
    assert unescape(found).startswith(f"On {NASTY}, the heatmap score has the highest AUROC")


def test_without_facts_commands_and_localization_the_page_has_no_place_for_them():
    page = render_report(
        report_content(**make_arguments()),
        {"table": make_metrics(make_scores())["table"]},
        title="x",
    )
    for name in ("facts", "commands", "localization"):
        assert f'id="{name}"' not in page


def test_a_large_report_stays_small():
    scores = make_scores(count=10_000)
    scores.update({f"set {number}": scores["far"] for number in range(7)})
    images = make_images(scores, each=20, size=32)  # 200, of noise, which no PNG can make smaller
    assert len(render(scores=scores, images=images).encode()) < 10e6


def test_a_full_gallery_of_photos_stays_below_ten_megabytes():
    """Of noise, which nothing can make smaller; as many cards as an evaluation shows at most."""
    images = make_images(make_scores(), each=2, size=256)
    images = (images * (_MAX_CARDS // len(images) + 1))[:_MAX_CARDS]
    assert len(render(images=images).encode()) < 10e6


def test_a_photo_is_as_large_as_there_is_room():
    content = report_content(**make_arguments(images=make_images(make_scores(), each=1, size=300)))
    (shape,) = {picture(card[kind]).shape for card in content["cards"] for kind in PICTURES}
    assert shape == (256, 256, 3)


def test_every_card_is_there_pixel_by_pixel(page, text, arguments):
    items = [attributes for attributes in page.all("li") if attributes.get("class") == "card"]
    images = arguments["images"]
    cards = [image.card for image in images]
    assert [float(item["data-score"]) for item in items] == [card.score for card in cards]
    assert [float(item["data-distance"]) for item in items] == [card.distance for card in cards]
    pictures = page.all("img")[1:]  # after the colour scale
    assert len(pictures) == 3 * len(cards)
    for number, (image, card) in enumerate(zip(images, cards, strict=True)):
        photo, overlay, nearest = (decode(one["src"]) for one in pictures[3 * number :][:3])
        np.testing.assert_array_equal(photo, card.image.transpose(1, 2, 0))
        np.testing.assert_array_equal(nearest, card.nearest.transpose(1, 2, 0))
        # larger, and JPEG
        assert np.abs(overlay.astype(int) - np.asarray(image.overlay)).mean() < 20
        assert card.name in pictures[3 * number]["alt"]
    assert [card["label"] for card in embedded(text)["cards"][:4]] == [
        image.label for image in images[:4]
    ]


def test_scores_come_back_bit_for_bit(text, arguments):
    for one in embedded(text)["sets"]:
        decoded = np.frombuffer(base64.b64decode(one["scores"]), "<f4")
        np.testing.assert_array_equal(decoded, np.sort(arguments["scores"][one["name"]]))


def rows_of(text):
    """Return the metrics of each set and method, as the table of all metrics shows them."""
    found, name = {}, ""
    for row in re.findall(r"<tr>(.*?)</tr>", text[text.index('<table id="metrics">') :], re.DOTALL):
        if group := re.search(r'<th scope="rowgroup"[^>]*>(.*?)</th>', row):
            name = unescape(group[1])
        if method := re.search(r'<th scope="row">(.*?)</th>', row):
            found[name, method[1]] = re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)
    return found


def summary_of(text):
    """Return the sets of the summary, and its cells by method, in order."""
    table = text[text.index('<table id="summary">') : text.index("</table>")]
    sets = [unescape(name) for name in re.findall(r'<th scope="colgroup"[^>]*>(.*?)</th>', table)]
    rows = re.findall(r'<th scope="row">([^<]*)(.*?)</tr>', table, re.DOTALL)
    cells = {
        method.strip(): [
            cell.strip() for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)
        ]
        for method, row in rows
    }
    return sets, cells


def test_all_metrics_are_in_percent_with_the_best_in_bold_and_ties_too(text):
    rows, bold = rows_of(text), "<strong>{}</strong>".format
    assert rows["far", "heatmap"] == [
        bold("90.00"), "[89.12, 90.87]", bold("90.00"), "", bold("80.00"), "", bold("30.00"), "",
        bold("30.00"), "", "50.0",
    ]  # fmt: skip
    assert rows["far", "knn"] == [
        "80.00", "", "80.00", "", bold("80.00"), "", "40.00", "", "40.00", "", "50.0"
    ]  # fmt: skip
    assert rows[NASTY, "heatmap"][0] == bold("90.00")


def test_a_metric_that_is_missing_is_a_dash():
    table = [
        {"method": "heatmap", "set": "far", "auroc": 0.5, "aupr_in": float("nan")},
        {"method": "knn", "set": "far", "auroc": 0.25, "aupr_in": 0.125},
    ]
    text = render({"table": table})
    rows = rows_of(text)
    assert rows["far", "heatmap"][::2] == ["<strong>50.00</strong>", *["–"] * 5]  # noqa: RUF001
    assert rows["far", "knn"][2] == "<strong>12.50</strong>"
    assert summary_of(text)[1]["heatmap"] == ["<strong>50.0</strong>", "–"]  # noqa: RUF001


def summary_row(method, name, auroc, **more):
    return {"method": method, "set": name, "auroc": auroc, "fpr95_id_pos": 1 - auroc, **more}


def test_the_summary_has_means_first_the_best_method_on_top_and_the_lead():
    lead = {"auroc": 0.0151, "intervals": {"auroc": (-0.0049, 0.0351)}}
    rows = [
        summary_row(method, name, auroc, **({"lead": lead} if method == "knn" else {}))
        for method, by_set in {
            "msp": (0.5, 0.7, 0.6),
            "combined": (0.9, 0.8, 0.85),
            "knn": (0.7, 0.97, 0.835),
        }.items()
        for name, auroc in zip(("near", "far", "mean all"), by_set, strict=True)
    ]
    methods = {
        "knn": {"label": "kNN", "sees_ood": False},
        "msp": {"label": "MSP", "sees_ood": True},
    }
    text = render({"table": rows, "default": "combined", "methods": methods})
    sets, cells = summary_of(text)
    best = "<strong>{}</strong>".format
    assert sets == ["mean all", "near", "far"]
    assert list(cells) == ["combined", "kNN", "MSP"]
    assert cells["combined"] == [
        "", best("85.0"), best("15.0"), best("90.0"), best("10.0"), "80.0", "20.0"
    ]  # fmt: skip
    assert cells["kNN"][0] == "+1.5 [-0.5, 3.5]"
    assert cells["kNN"][-2:] == [best("97.0"), best("3.0")]
    assert len(re.findall(r'<tr class="default"><th scope="row">combined', text)) == 1
    assert re.search(r'<th scope="row">MSP <small>sees OOD</small>', text)


def test_the_summary_has_no_mean_over_one_set():
    groups = ("near", "far", "mean near", "mean far", "mean all")
    rows = [summary_row("knn", name, 0.9) for name in groups]
    sets, cells = summary_of(render({"table": rows, "near": ["near"]}))
    assert sets == ["mean all", "near", "far"]
    assert len(cells["knn"]) == 2 * len(sets)


def test_an_evaluation_of_the_openood_protocol_shows_its_fpr95():
    metrics = make_metrics(make_scores()) | {"headline": ["auroc", "aupr_out", "fpr95_ood_pos"]}
    metrics["table"][0]["fpr95_ood_pos"] = 0.125
    text = render(metrics)
    assert "<strong>12.5</strong>" in summary_of(text)[1]["heatmap"]
    assert "the share of ID images flagged when 95 % of the OOD images are flagged" in text


def test_localization_is_shown_if_it_was_measured():
    where = {"side": "mean", "edges": "mean"}
    shares = {"pixel_auroc": 0.9, "aupro": 0.5, "intervals": {"pixel_auroc": [0.85, 0.95]}}
    rows = [
        {"method": "heatmap", "set": NASTY, **where, **shares},
        {"method": "heatmap", "set": "mean", **where, **shares},
        {"method": "centre prior", "set": "mean", **where, **shares, "pixel_auroc": 0.6},
        {"method": "heatmap", "set": "mean", "side": 0.5, "edges": "mean", **shares, "aupro": 0.99},
    ]
    leads = {"centre prior": {**shares, "pixel_auroc": -0.3}}
    content = {"table": rows, "leads": leads, "id_on_id": {"meaning": f"less {NASTY}"}}
    text = render(localization=content)
    part = text[text.index('id="localization"') : text.index('id="threshold"')]
    tables = [
        re.findall(r"<th scope=\"row\">(.*?)</th>(.*?)</tr>", table, re.DOTALL)
        for table in part.split("<table")[1:]
    ]
    assert [[method for method, _ in table] for table in tables] == [
        ["heatmap", "centre prior"], ["centre prior"], ["heatmap"]
    ]  # fmt: skip
    assert '<strong>90.0</strong></td><td class="interval">[85.0, 95.0]' in tables[0][0][1]
    assert "-30.0" in tables[1][0][1]
    assert "99.0" not in part
    assert f"<summary>Patches of {NASTY}</summary>" in unescape(part)
    assert f"less {NASTY}" in unescape(part)


def test_a_file_name_that_is_not_utf8_is_written():
    image = make_images(make_scores())[0]
    card = replace(image.card, name=b"\xff.png".decode("utf-8", "surrogateescape"))
    text = render(images=[replace(image, card=card)])
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
        report_content(**make_arguments(scores=changed, images=[]))


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
    page = Page(
        render(
            {"table": make_metrics(make_scores())["table"]},
            scores=scores,
            threshold=threshold,
            images=[],
        )
    )
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
    text = render(warnings=warnings)
    box = text[text.index('<section class="warnings"') : text.index('<dl class="facts"')]
    items = [unescape(item) for item in re.findall(r"<li>(.*?)</li>", box)]
    assert items == [warnings[0], "line one\\nline two"]
    assert 'class="warnings"' not in render()


def test_a_missing_threshold_is_explained():
    decisions = {"level": 0.01, "num_calibration": 60, "threshold": None}
    metrics = make_metrics(make_scores()) | {"decisions": decisions}
    text = render(metrics)
    assert "no threshold, 60 held-out ID images are too few for a false-alarm level of 0.01" in text
    assert "no threshold" not in render()


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
    assert opened.title == f"A report {NASTY}"
    assert (
        get(opened, "document.querySelector('#histograms .swatch:not(.id)').textContent") == "far"
    )
    assert NASTY in get(opened, "document.getElementById('histograms').textContent")


@pytest.mark.browser
def test_no_two_of_24_methods_look_alike(opened, tmp_path):
    curve = ([0.0, 1.0], [0.0, 1.0])
    roc = {"far": dict.fromkeys(["heatmap", *map(str, range(23))], curve)}
    (tmp_path / "report.html").write_text(render(roc=roc), "utf-8")
    opened.get((tmp_path / "report.html").as_uri())
    paths = "[...document.querySelectorAll('#roc-legend path')]"
    looks = get(opened, f"{paths}.map(path => path.style.cssText + path.className.baseVal)")
    assert len(set(looks)) == 24


@pytest.mark.browser
def test_the_default_score_leads_the_legend_in_the_colour_of_the_page(opened, tmp_path):
    curve = ([0.0, 1.0], [0.0, 1.0])
    roc = {"far": dict.fromkeys(["knn", "msp", "heatmap"], curve)}
    (tmp_path / "report.html").write_text(render(roc=roc), "utf-8")
    opened.get((tmp_path / "report.html").as_uri())
    entries = "[...document.querySelectorAll('#roc-legend li')]"
    assert get(opened, f"{entries}.map(entry => entry.textContent)") == ["heatmap", "knn", "msp"]
    style = "getComputedStyle({}).{}"
    line = style.format("document.querySelector('#roc-legend path')", "stroke")
    assert get(opened, line) == get(
        opened, style.format("document.querySelector('nav a')", "color")
    )


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
    (tmp_path / "report.html").write_text(render(**arguments), "utf-8")
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
    flags = get(
        opened, "[...document.querySelectorAll('.flag')].map(f => f.hidden ? '' : f.textContent)"
    )
    words = {(True, True): "false alarm", (True, False): "", (False, True): "flagged"}
    assert flags == [
        words.get((card.set_name == "id", card.score > np.float32(0.1)), "missed")
        for card in cards_of(arguments)
    ]
    assert set(flags) == {"false alarm", "", "flagged", "missed"}


def cards_of(arguments):
    return [image.card for image in arguments["images"]]


def shown_cards(browser, key):
    return get(
        browser,
        f"[...document.querySelectorAll('.card:not([hidden])')].map(card => card.dataset.{key})",
    )


@pytest.mark.browser
@pytest.mark.parametrize("key", ["score", "distance"])
@pytest.mark.parametrize("way", ["up", "down"])
def test_the_gallery_sorts(opened, arguments, key, way):
    given = [getattr(card, key) for card in cards_of(arguments)]
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
    opened.execute_script("document.getElementById('all-metrics').open = true")
    set_value(opened, "table-set", "0", "change")
    visible = "[...document.querySelectorAll('#metrics tbody:not([hidden]) [scope=rowgroup]')]"
    assert get(opened, f"{visible}.map(head => head.textContent)") == ["far"]
    set_value(opened, "table-set", "", "change")
    assert get(opened, f"{visible}.length") == 2


@pytest.mark.browser
def test_every_control_is_reached_and_moved_by_keyboard(opened):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    stops = [
        "Skip to the results", "2 commands", "2 ID classes", "Detection", "Threshold", "Images",
        "ROC curves", "Methods by sets", "Method", "AUROC on far", "FPR95 on far",
        f"AUROC on {NASTY}", f"FPR95 on {NASTY}", "table-csv", "All metrics", "threshold-number",
        "threshold-reset", "threshold-slider", "Flagged images by set", "side", "gallery-set",
        "gallery-show", "gallery-order", "gallery-name", "gallery-csv", "Enlarge 000 id.png",
    ]  # fmt: skip
    for stop in stops:
        opened.switch_to.active_element.send_keys(keys.TAB)
        at = opened.switch_to.active_element
        names = [at.get_attribute(name) for name in ("id", "aria-label", "value")] + [at.text]
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


def file_names(browser):
    names = "[...document.querySelectorAll('.card:not([hidden]) .name b')]"
    return get(browser, f"{names}.map(name => name.textContent)")


def is_shown(image, show, threshold):
    """Return whether an image is shown by a filter, by the definition of the filter."""
    is_id, flagged = image.card.set_name == "id", image.card.score > np.float32(threshold)
    return {
        "flagged": flagged,
        "missed": not is_id and not flagged,
        "alarm": is_id and flagged,
        "wrong": image.label == "another",
    }[show]


@pytest.mark.browser
@pytest.mark.parametrize("show", ["flagged", "missed", "alarm", "wrong"])
def test_the_gallery_shows_what_is_asked_for_and_follows_the_threshold(opened, arguments, show):
    set_value(opened, "gallery-show", show, "change")
    for threshold in (0.05, 0.2, 9):
        set_value(opened, "threshold-number", str(threshold), "input")
        images = arguments["images"]
        names = [image.card.name for image in images if is_shown(image, show, threshold)]
        assert file_names(opened) == names
        assert get(opened, "document.getElementById('gallery-empty').hidden") == bool(names)


@pytest.mark.browser
def test_near_the_threshold_are_ten_images_on_each_side(opened, tmp_path):
    scores = {name: np.linspace(0, 1, 30, dtype=np.float32) for name in ("id", "far")}
    images = make_images(scores, each=30, size=4)
    text = render({"table": make_metrics(scores)["table"]}, scores=scores, images=images)
    (tmp_path / "report.html").write_text(text, "utf-8")
    opened.get((tmp_path / "report.html").as_uri())
    set_value(opened, "gallery-show", "near", "change")
    set_value(opened, "gallery-set", "1", "change")
    set_value(opened, "threshold-number", "0.5", "input")
    nearest = sorted(scores["far"], key=lambda score: abs(score - 0.5))
    assert sorted(map(float, shown_cards(opened, "score"))) == sorted(map(float, nearest[:20]))


@pytest.mark.browser
def test_the_gallery_finds_a_name(opened):
    set_value(opened, "gallery-name", "002 F", "input")
    assert file_names(opened) == ["002 far.png"]


@pytest.mark.browser
@pytest.mark.parametrize(
    ("view", "shown"),
    [("side", ["image", "heatmap", "nearest ID"]), ("overlay", ["heatmap"]), ("photo", ["image"])],
)
def test_the_view_switches(opened, view, shown):
    opened.execute_script(f"document.querySelector('[name=view][value={view}]').click()")
    captions = get(
        opened,
        "[...document.querySelectorAll('.card:first-child .picture')]"
        ".filter(one => one.getClientRects().length).map(one => one.textContent.trim())",
    )
    assert captions == shown


@pytest.mark.browser
def test_an_image_opens_large_and_the_arrow_keys_go_on(opened):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    set_value(opened, "gallery-set", "1", "change")
    first = opened.find_element("css selector", ".card:not([hidden]) .pictures")
    first.send_keys(keys.ENTER)
    dialog = opened.find_element("id", "enlarged")
    title = opened.find_element("id", "enlarged-title")
    assert dialog.is_displayed()
    assert title.text.startswith("000 far.png (far): ")
    width = "document.querySelector('{} img').getBoundingClientRect().width"
    assert get(opened, width.format("#enlarged")) > 2 * get(opened, width.format(".card"))
    titles = []
    for key in (keys.ARROW_RIGHT, keys.ARROW_LEFT, keys.ARROW_LEFT):
        opened.switch_to.active_element.send_keys(key)
        titles.append(title.text[:3])
    assert titles == ["001", "000", "003"]
    opened.switch_to.active_element.send_keys(keys.ESCAPE)
    assert not dialog.is_displayed()
    # the focus goes to where one was, in an event after the dialog has closed
    for _ in range(100):
        label = opened.switch_to.active_element.get_attribute("aria-label")
        if label == "Enlarge 003 far.png":
            return
        time.sleep(0.1)
    raise AssertionError(f"the focus is at {label}")


@pytest.mark.browser
def test_headings_sort_the_summary(opened):
    heads = "[...document.querySelectorAll('#summary tbody th')]"
    methods = f"{heads}.map(head => head.firstChild.data.trim())"
    assert get(opened, methods) == ["heatmap", "knn"]
    head = opened.find_element("css selector", "#summary [aria-label='FPR95 on far']")
    for ways in (("ascending", ["heatmap", "knn"]), ("descending", ["knn", "heatmap"])):
        head.click()
        sorted_by = get(opened, "document.querySelector('[aria-sort]').getAttribute('aria-sort')")
        assert (sorted_by, get(opened, methods)) == ways
    assert get(opened, "document.querySelectorAll('[aria-sort]').length") == 1


@pytest.fixture
def saved(opened, tmp_path):
    """Return what clicks a button and reads the CSV file that it saves."""
    opened.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )

    def save(button):
        opened.execute_script(f"document.getElementById('{button}').click()")
        for _ in range(100):
            if paths := list(tmp_path.glob("*.csv")):
                return list(csv.reader(io.StringIO(paths[0].read_text("utf-8"))))
            time.sleep(0.1)
        raise AssertionError(f"{button} saved nothing")

    return save


@pytest.mark.browser
def test_the_list_is_saved_as_it_is_shown(opened, saved, arguments):
    set_value(opened, "gallery-set", "2", "change")
    set_value(opened, "gallery-order", "score-up", "change")
    set_value(opened, "threshold-number", "0.1", "input")
    head, *rows = saved("gallery-csv")
    cards = sorted(cards_of(arguments)[8:], key=lambda card: card.score)
    assert [row[head.index("name")] for row in rows] == [card.name for card in cards]
    assert [row[head.index("set")] for row in rows] == [NASTY] * 4
    assert [float(row[head.index("score")]) for row in rows] == [card.score for card in cards]
    assert [row[head.index("flagged")] == "true" for row in rows] == [
        card.score > np.float32(0.1) for card in cards
    ]
    assert {row[head.index("p_value")] for row in rows} == {"", "0.25"}


@pytest.mark.browser
def test_a_name_that_a_spreadsheet_would_run_is_saved_as_text(opened, tmp_path, saved):
    image = make_images(make_scores())[0]
    card = replace(image.card, name="=HYPERLINK(1)")
    text = render(images=[replace(image, card=card)])
    (tmp_path / "report.html").write_text(text, "utf-8")
    opened.get((tmp_path / "report.html").as_uri())
    head, row = saved("gallery-csv")
    assert row[head.index("name")] == "'=HYPERLINK(1)"


@pytest.mark.browser
def test_the_summary_is_saved_as_it_is_sorted(opened, saved):
    opened.find_element("css selector", "#summary [aria-label='AUROC on far']").click()
    assert saved("table-csv") == [
        ["method", "AUROC far", "FPR95 far", f"AUROC {NASTY}", f"FPR95 {NASTY}"],
        ["heatmap", "90.0", "30.0", "90.0", "30.0"],
        ["knn", "80.0", "40.0", "80.0", "40.0"],
    ]


@pytest.mark.browser
def test_on_paper_there_are_pictures_and_tables_and_no_controls(opened):
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        seen = (
            "[...document.querySelectorAll('{}')].filter(it => it.getClientRects().length).length"
        )
        assert get(opened, seen.format("button:not(.sort, .pictures), select, input, nav")) == 0
        assert get(opened, seen.format("#summary td, .card img")) > 40
        # what paper cannot open
        assert get(opened, seen.format("#commands li")) == len(COMMANDS)
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
