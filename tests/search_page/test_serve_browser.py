"""The page to try an index in a real browser: one page, loaded once, that tests use one after the
other.
"""

import io
import re
import socket
import threading

import numpy as np
import pytest
from PIL import Image
from served import DIMS, EVIL, batch_of, client_of

from matryoshka.embeddings.reading import open_embeddings
from matryoshka.evaluation.embedding_map import make_map, write_map
from matryoshka.retrieval.store_writer import Writer

uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed (requirements-dev.txt)")

FULL = f'.column[data-dim="{DIMS[-1]}"]'


@pytest.fixture(scope="module")
def address(made, tmp_path_factory):
    """Of a server of an index with lists, in a thread of this process; the index is
    `address.index`.
    """
    folder = tmp_path_factory.mktemp("browser") / "photos.index"
    with Writer(folder) as writer:
        index = writer.build(batch_of(made / "embeddings"), dim=8, lists=5)
    write_map(index, make_map(index.parts[0].rows, DIMS))
    client, _ = client_of(made, folder)
    door = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(client.app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [door]})
    thread.start()
    yield f"http://127.0.0.1:{door.getsockname()[1]}/", folder
    server.should_exit = True
    thread.join(20)
    door.close()
    assert not thread.is_alive()


class Watched:
    """A page, what its console said, and the addresses that were asked for."""

    def __init__(self, page):
        self.page, self.said, self.asked = page, [], []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("dialog", lambda dialog: self.said.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: self.asked.append(request.url))

    def settle(self):
        """Until what was asked for is shown."""
        self.page.wait_for_load_state("networkidle")
        self.page.locator("#columns:not([aria-busy])").wait_for()

    def text(self, selector):
        return self.page.locator(selector).first.inner_text()

    def upload(self, name, content, kind="image/png"):
        self.page.locator("#file").set_input_files(
            {"name": name, "mimeType": kind, "buffer": content}
        )


@pytest.fixture(scope="module")
def watched(address, chromium):
    context = chromium.new_context(color_scheme="light", viewport={"width": 1200, "height": 900})
    context.set_default_timeout(15_000)
    watched = Watched(context.new_page())
    watched.page.goto(address[0])
    watched.page.locator(".hit").first.wait_for()
    yield watched
    context.close()


@pytest.fixture
def page(watched):
    """The page without an error; every test leaves it so, and sends requests to the server only."""
    watched.settle()
    del watched.said[:]
    yield watched.page
    watched.settle()
    assert watched.said == []
    origin = re.match(r"http://127.0.0.1:\d+/", watched.page.url)[0]
    assert [url for url in watched.asked if not url.startswith((origin, f"blob:{origin}"))] == []


@pytest.fixture
def changing(page):
    """changing(address, change): answers to it are what `change` makes of them, until the test
    ends.
    """

    def begin(address, change):
        def handle(route):
            answer = route.fetch()
            content = answer.json()
            change(content)
            route.fulfill(response=answer, json=content)

        page.route(address, handle)

    yield begin
    page.unroute_all(behavior="wait")
    page.reload()
    page.locator(".hit").first.wait_for()


def uploaded(watched, made, row):
    """The image of a row, as somebody's own; its name."""
    file = made / "photos" / open_embeddings(made / "embeddings").ids[row]
    watched.upload("mine.png", file.read_bytes())
    watched.page.locator('#picture[src^="blob:"]').wait_for()
    watched.settle()


def test_it_starts_with_a_row_and_its_neighbours_at_every_prefix(watched, page):
    assert re.search(r"#row=\d+$|/$", page.url)
    assert watched.text("h1") == "photos.index"
    assert "35 images of 3 classes, 512 dimensions, resnet10 MRL" in watched.text("#headline")
    titles = page.locator(".column h3").all_inner_texts()
    assert [title.split()[0] for title in titles] == ["Adaptive", *map(str, DIMS)]
    assert page.locator(f"{FULL} .hit.agrees").count() == 10
    for column in page.locator(".column").all():
        agree = re.fullmatch(r"(\d+) of 10", column.locator(".share").inner_text())
        assert column.locator(".hit.agrees .tick").count() == int(agree[1])
    widths = page.locator(".hit img, #picture").evaluate_all(
        "images => images.map(i => i.naturalWidth)"
    )
    assert len(widths) == 1 + 10 * len(titles)
    assert min(widths) > 20, "a column is not visible"
    assert page.locator("#note").is_hidden()
    texts = "".join(page.locator(".hit").all_inner_texts())
    assert EVIL in texts or watched.page.locator(".hit").count() < 40  # as text
    assert page.locator("script").count() == 1


def test_an_image_that_is_chosen_is_searched(watched, page, made):
    uploaded(watched, made, 20)
    assert "mine.png" in watched.text("#asked")
    first = page.locator(f"{FULL} .hit").first
    assert first.get_attribute("data-row") == "20"
    assert first.locator(".cosine").inner_text() == "1.000"
    small = page.locator('.column[data-dim="8"] .hit').evaluate_all(
        "hits => hits.map(h => h.dataset.row)"
    )
    assert small[0] == "20"


def test_sliders_change_recall_and_time_live_and_by_keyboard(watched, page, made):
    uploaded(watched, made, 20)
    page.locator("#reset").click()
    watched.settle()
    before = {id: watched.text(f"#{id}") for id in ("recall", "time", "setting")}
    columns = [column.inner_text() for column in page.locator(".column[data-dim]").all()]
    assert before["setting"].startswith("ivf 8 nprobe 5 k 35")
    assert before["recall"] == "10 of 10"  # all lists, all rows
    asked = len(watched.asked)
    for label, text in (
        ("Shortlist", "10 rows"),
        ("Lists visited", "1 lists"),
        ("Re-ranked by", "8 dims"),
    ):
        slider = page.get_by_label(label)
        slider.focus()
        page.keyboard.press("Home")
        assert slider.get_attribute("aria-valuetext") == text
    page.locator("#setting", has_text="ivf 8 nprobe 1 k 10 -> 8").wait_for()
    watched.settle()
    assert 0 <= int(watched.text("#recall").split()[0]) < 10, "the smallest search should lose some"
    assert watched.text("#recall") == watched.text(".column.adaptive .share")
    assert re.fullmatch(r"[\d.,]+ ms", watched.text("#time"))
    assert re.fullmatch(r"[\d.,]+\u00d7|slower", watched.text("#ratio"))
    assert columns == [column.inner_text() for column in page.locator(".column[data-dim]").all()]
    searches = [url for url in watched.asked[asked:] if "/api/" in url]
    assert 1 <= len(searches) <= 3, (
        f"{len(searches)} searches for one drag of a slider"
    )  # moves that follow each other closely are one
    assert all("/api/adaptive?" in url for url in searches)
    page.locator("#reset").click()
    page.locator("#setting", has_text=before["setting"]).wait_for()
    watched.settle()
    assert watched.text("#recall") == before["recall"]


def test_a_neighbour_that_is_clicked_is_the_next_query_and_back_goes_back(watched, page, made):
    uploaded(watched, made, 0)
    assert (
        page.locator(f"{FULL} .hit").first.get_attribute("title") == f"{EVIL}\n{EVIL}/{EVIL}3.png"
    )
    assert page.locator(f"{FULL} .what").first.inner_text() == EVIL
    assert page.locator(f"{FULL} .name").first.inner_text() == f"{EVIL}3.png"  # without its folder
    hit = page.locator(f"{FULL} .hit").nth(4)
    row = hit.get_attribute("data-row")
    page.mouse.move(0, 0)  # what lies under it is marked, too
    hit.locator(".pick").focus()
    marked = page.locator(".hit.same").evaluate_all("hits => hits.map(h => h.dataset.row)")
    assert set(marked) == {row}
    page.keyboard.press("Enter")
    page.locator(f'#picture[src^="/image/{row}?"]').wait_for()
    watched.settle()
    assert page.url.endswith(f"#row={row}")
    assert page.locator("#picture").get_attribute("alt").startswith("query: ")
    assert page.locator(f'.column .hit[data-row="{row}"]').count() == 0  # it does not find itself
    page.go_back()
    page.locator('#picture[src^="blob:"]').wait_for()
    watched.settle()
    assert page.locator(f"{FULL} .hit").first.get_attribute("data-row") == "0"
    page.locator("#random").click()
    page.locator('#picture[src^="/image/"]').wait_for()


def test_what_is_no_picture_is_said(watched, page, made):
    watched.upload("notes.txt", b"hello", "text/plain")
    page.locator("#error", has_text="not a JPEG").wait_for()
    watched.upload("large.png", bytes(17 << 20))
    page.locator("#error", has_text="more than 16").wait_for()
    assert page.locator(".hit").count() > 0, "the error replaced the neighbours"
    uploaded(watched, made, 3)
    assert page.locator("#error").is_hidden()
    assert len([text for text in watched.said if "415" in text]) == 1  # the browser's own line
    del watched.said[:]


def test_light_dark_narrow(watched, page, made, tmp_path):
    uploaded(watched, made, 30)

    def brightness(name):
        page.screenshot(path=tmp_path / f"{name}.png", full_page=True)
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")).astype(float)
        assert pixels.std() > 10, "the picture is blank"  # something is on it
        return pixels.mean()

    assert brightness("light") > 128, "the light page is dark"
    page.locator("#theme").click()
    assert brightness("button") < 128, "the button did not darken the page"
    page.locator("#theme").click()
    page.evaluate("delete document.documentElement.dataset.theme")
    page.emulate_media(color_scheme="dark", reduced_motion="reduce")
    assert brightness("dark") < 128, "the dark page is light"
    assert page.locator("#columns").evaluate(
        "node => getComputedStyle(node).transitionProperty"
    ) in ("none", "all")
    assert (
        page.locator("#columns").evaluate("node => getComputedStyle(node).transitionDuration")
        == "0s"
    )
    page.emulate_media(color_scheme="light", reduced_motion="no-preference")
    page.set_viewport_size({"width": 400, "height": 800})
    brightness("narrow")
    assert page.evaluate("document.documentElement.scrollWidth") == 400  # nothing sticks out
    assert page.locator("#scroll").evaluate(
        "node => node.scrollWidth > node.clientWidth"
    )  # the columns scroll
    page.set_viewport_size({"width": 1200, "height": 900})


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_what_a_screen_shows_at_once(page, width, height):
    page.set_viewport_size({"width": width, "height": height})
    page.evaluate("scrollTo(0, 0)")
    cut = page.locator(".column h3, .column .share, .facts div, .facts dd, .controls").evaluate_all(
        "nodes => nodes.filter(n => n.scrollWidth > n.clientWidth).map(n => n.textContent)"
    )
    assert cut == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for at in range(2):  # neighbours of the fast search, and of the first prefix
        hit = page.locator(".column").nth(at).locator(".hit").nth(1).bounding_box()
        assert hit["y"] + hit["height"] < height, "the second hit is below the fold"
    narrow = width < 400
    summary, slider = page.locator("#tuning summary"), page.get_by_label("Shortlist")
    slider.wait_for(state="hidden" if narrow else "visible")
    assert summary.is_visible() == narrow
    if narrow:
        summary.click()
        assert slider.is_visible()
        third = page.locator(".column").nth(2).bounding_box()
        assert third["x"] < width < third["x"] + third["width"], (
            "the third column should be cut by the edge"
        )  # the next column is there, in part
        places = (
            ("0", ".after:not(.before)"),
            ("node.scrollWidth / 4", ".before.after"),
            ("9e9", ".before:not(.after)"),
        )
        for place, sides in places:
            page.locator("#scroll").evaluate(f"node => {{ node.scrollLeft = {place}; }}")
            page.locator(f"#scroll{sides}").wait_for()  # faded where there is more
    page.set_viewport_size({"width": 1200, "height": 900})
    slider.wait_for()


LONG = (
    "a/long/way/down/to/the/last/of/all/folders/of_a_disk/"
    "with_a_name_that_never_ends/holidayinnorway.jpeg"
)


def test_without_pictures_names_are_shown_and_keep_their_ends(watched, page, changing):
    def named(content):
        content["query"].update({"name": LONG, "class": None})
        content["columns"][0]["hits"][0].update({"name": LONG, "class": None})
        content["columns"][0]["hits"][1].update({"name": "cats/7.png", "class": "cat"})

    changing("**/api/index", lambda content: content.update(pictures=False))
    changing("**/api/neighbours?**", named)
    page.reload()
    page.locator("#note", has_text="names are shown").wait_for()
    page.locator(".hit.bare").first.wait_for()
    assert page.locator(".hit img, #picture:visible").count() == 0
    tile = watched.text("#empty")
    assert tile.startswith("…")
    assert tile.endswith("holidayinnorway.jpeg")
    assert watched.text("#asked").startswith("row ")
    column = page.locator(f'.column[data-dim="{DIMS[0]}"]')
    for i, (shown, cut) in enumerate(((LONG, True), ("7.png", False))):
        name = column.locator(".hit").nth(i).locator(".name")
        assert name.inner_text() == shown
        front, end = name.evaluate("""(node) => {
            const outer = node.getBoundingClientRect();
            const inner = node.firstChild.getBoundingClientRect();
            return [outer.left - inner.left, inner.right - outer.right]; }""")
        assert (front > 20) == cut, f"pixels of the name hidden at its start: {front}"
        assert end < 1, "the end of the name is cut"
    assert page.locator("#empty").evaluate("node => node.scrollWidth <= node.clientWidth")
    extension = page.evaluate("""() => {
        const nodes = [...document.getElementById("empty").childNodes];
        const text = nodes.filter(n => n.nodeType === 3).pop();
        const range = document.createRange();
        range.setStart(text, text.length - 5);
        range.setEnd(text, text.length);
        return new Set([...range.getClientRects()].map(box => box.top)).size; }""")
    assert extension == 1  # ".jpeg" is on one line


@pytest.mark.parametrize(
    ("lists", "words"), [(0, "An index this small"), (5, "With these settings")]
)
def test_an_adaptive_search_that_is_slower_says_so(watched, page, changing, lists, words):
    changing("**/api/index", lambda content: content["nprobe"].update(high=lists))
    changing("**/api/neighbours?**", lambda content: content["adaptive"].update(ratio=0.6))
    page.reload()
    page.locator("#slow", has_text=words).wait_for()
    assert watched.text("#ratio") == "slower"
    assert watched.text("#ratio-of") == "than exact search"
    page.unroute_all(behavior="wait")
    changing("**/api/neighbours?**", lambda content: content["adaptive"].update(ratio=12.4))
    page.reload()
    page.locator("#ratio", has_text="12\u00d7").wait_for()
    assert page.locator("#slow").is_hidden()
    assert watched.text("#ratio-of") == "the speed of exact search"


def test_the_headline_says_what_is_known_of_recall(watched, page, changing):
    changing(
        "**/api/index",
        lambda content: content.update(
            certificate="recall measured before: run `this --now` again"
        ),
    )
    page.reload()
    page.locator(
        "#headline", has_text="resnet10 MRL; recall measured before: run this --now again"
    ).wait_for()
    assert watched.text("#headline code") == "this --now"


def test_k_and_classes_are_chosen_and_kept_in_the_address(watched, page, made):
    page.locator("#random").click()
    watched.settle()
    page.get_by_label("Neighbours", exact=True).fill("4")
    page.wait_for_url("**k=4*")
    watched.settle()
    assert page.locator(f"{FULL} .hit").count() == 4
    assert watched.text("#recall-of") == "recall@4"
    chooser = page.get_by_label("Only the classes")
    chooser.fill("cat")
    chooser.press("Enter")
    page.locator(".chip", has_text="cat").wait_for()
    watched.settle()
    classes = page.locator(f"{FULL} .what").all_inner_texts()
    assert classes == ["cat"] * 4
    page.reload()
    page.locator(".chip", has_text="cat").wait_for()
    watched.settle()
    assert page.get_by_label("Neighbours", exact=True).input_value() == "4"
    assert page.locator(f"{FULL} .what").all_inner_texts() == classes
    with page.expect_download() as saved:
        page.get_by_role("link", name="CSV").click()
    assert saved.value.suggested_filename == "neighbours.csv"
    assert saved.value.path().read_text().count("cat/") == 4 * (len(DIMS) + 1)
    page.get_by_label("Remove the class cat").click()
    page.get_by_label("Neighbours", exact=True).fill("500")
    page.get_by_label("Neighbours", exact=True).press("Enter")
    page.locator("#k").evaluate("node => node.blur()")
    page.wait_for_url("**k=100*")
    page.get_by_label("Neighbours", exact=True).fill("10")
    page.wait_for_url(re.compile(r"#row=\d+$"))
    watched.settle()
    assert page.locator(f"{FULL} .hit").count() == 10
    assert page.locator(".chip").count() == 0


def test_neighbours_of_the_querys_class_are_marked_and_counted(watched, page, address):
    page.goto(f"{address[0]}#row=15")
    page.reload()
    page.locator("#kin-of", has_text="of the query's class, ant").wait_for()
    watched.settle()
    for column in page.locator(".column").all():
        classes = column.locator(".what").all_inner_texts()
        assert column.locator(".kin-share").inner_text() == (
            f"{classes.count('ant')} of {len(classes)} same class"
        )
        assert column.locator(".hit.kin .what").all_inner_texts() == ["ant"] * classes.count("ant")
    assert re.match(r"Model: \S.* \d+\s%, ", watched.text("#predicted"))


def test_a_picture_is_enlarged_and_keys_move(watched, page, made):
    uploaded(watched, made, 20)
    column = page.locator(FULL)
    rows = column.locator(".hit").evaluate_all("hits => hits.map(h => h.dataset.row)")
    viewer, image = page.locator("#viewer"), page.locator("#viewer-image")
    column.locator(".frame").nth(1).click()
    viewer.wait_for()
    assert f"/image/{rows[1]}?size=1024" in image.get_attribute("src")
    assert "neighbour 2 of 10" in watched.text("#viewer-more")
    for key, at in (
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("Home", 0),
        ("ArrowLeft", 0),
        ("End", 9),
        ("ArrowRight", 9),
    ):
        page.keyboard.press(key)
        assert f"/image/{rows[at]}?" in image.get_attribute("src")
        assert viewer.evaluate("node => node.contains(document.activeElement)")
    page.keyboard.press("Escape")
    viewer.wait_for(state="hidden")
    page.get_by_role("button", name="Enlarge the query").focus()
    page.keyboard.press("Enter")
    assert image.get_attribute("src").startswith("blob:")
    assert page.get_by_role("button", name="Search with this image").count() == 0
    page.keyboard.press("ArrowRight")
    page.get_by_role("button", name="Search with this image").click()
    page.locator(f'#picture[src^="/image/{rows[0]}?"]').wait_for()
    assert viewer.is_hidden()


def test_a_point_of_the_map_is_the_next_query(watched, page, made):
    uploaded(watched, made, 20)
    canvas = page.locator("#canvas")
    page.locator("#map-of", has_text="PCA. Click a point").wait_for()
    assert sorted(page.locator("#map-legend li").all_inner_texts()) == sorted((EVIL, "ant", "cat"))
    assert "35 images by their first 512 dimensions" in canvas.get_attribute("aria-label")
    page.locator("#map-dim").select_option("8")
    page.locator('#canvas[aria-label*="first 8 dimensions"]').wait_for()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    tip = page.locator("#tip")
    spots = [(x, y) for x in range(20, int(box["width"]), 12) for y in (60, 120, 200, 300, 400)]
    for x, y in spots:
        page.mouse.move(box["x"] + x, box["y"] + y)
        if tip.is_visible():
            break
    name = watched.text("#tip-text").split("\n")[-1]
    assert name.endswith(("jpg", "png"))
    page.mouse.down()
    page.mouse.up()
    page.locator('#picture[src^="/image/"]').wait_for()
    watched.settle()
    assert name.split("/")[-1][:9] in watched.text("#asked")
    assert tip.is_hidden()


def test_an_index_without_a_map_has_no_card(watched, page, changing):
    changing("**/api/index", lambda content: content.update(map=None))
    page.reload()
    page.locator(".hit").first.wait_for()
    assert page.locator("#map").is_hidden()


def test_an_index_that_is_searched_in_full_shows_no_fast_search(watched, page, changing):
    changing("**/api/index", lambda content: content.update(exact_only=True))
    page.reload()
    page.locator(".hit").first.wait_for()
    assert page.locator("#fast").is_hidden()
    assert page.locator(".column").count() == len(DIMS)


def test_an_index_without_classes_shows_names(watched, page, changing):
    def nameless(content):
        content["query"]["class"] = None
        content["expected_class"] = None
        for column in (*content["columns"], content["adaptive"]):
            column["same_class"] = None
            for hit in column["hits"]:
                hit.update({"class": None, "same_class": None})

    changing("**/api/index", lambda content: content.update(classes=0, predicts=False))
    changing("**/api/neighbours?**", nameless)
    page.reload()
    page.locator(".hit").first.wait_for()
    for selector in ("#filter", "#kin-legend", "#predicted"):
        assert page.locator(selector).is_hidden()
    assert page.locator(".kin-share, .what").count() == 0
    assert page.locator(f"{FULL} .name.alone").count() == 10
    assert "classes" not in watched.text("#headline")


def test_an_upload_is_shown_as_the_model_sees_it(watched, page, tmp_path):
    """Not turned upright by its EXIF orientation."""
    pixels = np.zeros((60, 120, 3), np.uint8)
    pixels[:, :60, 0], pixels[:, 60:, 2] = 255, 255  # red is left
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down: red would be right
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", exif=exif)
    watched.upload("turned.jpg", file.getvalue(), "image/jpeg")
    page.locator("#asked", has_text="turned.jpg").wait_for()
    watched.settle()
    page.locator("#picture").screenshot(path=tmp_path / "shown.png")
    shown = np.asarray(Image.open(tmp_path / "shown.png").convert("RGB")).astype(int)
    row = shown[len(shown) // 2]
    left, right = row[len(row) // 4], row[3 * len(row) // 4]
    assert left[0] - left[2] > 150 < right[2] - right[0], "the picture is not shown as it is stored"


def test_everything_has_a_name(page):
    unnamed = page.evaluate("""() => [...document.querySelectorAll("button, input")]
        .filter((node) => !(node.labels?.length || node.textContent.trim() || node.ariaLabel))
        .map((node) => node.outerHTML)""")
    assert unnamed == []
    assert page.locator("img:not([alt])").count() == 0
    assert (
        page.get_by_role("region", name="Neighbours at each prefix").get_attribute("tabindex")
        == "0"
    )


def test_an_index_that_changes_is_followed(watched, page, made, address):
    uploaded(watched, made, 20)
    gone = page.locator(f"{FULL} .hit").first.get_attribute("data-row")
    with Writer(address[1]) as writer:
        writer.delete([open_embeddings(made / "embeddings").ids[int(gone)]])
    page.get_by_label("Shortlist").focus()
    page.keyboard.press("ArrowLeft")
    page.locator("#headline", has_text="34 images").wait_for()
    watched.settle()
    assert page.locator(f'.hit[data-row="{gone}"]').count() == 0
    assert page.locator(f"{FULL} .hit").count() == 10
    assert page.locator("#error").is_hidden()


def test_a_dropped_image_and_a_server_that_is_gone(watched, page, photo, address):
    file = io.BytesIO()
    Image.fromarray(photo(50, 50)).save(file, "PNG")
    drop = """(bytes) => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
      for (const type of ["dragover", "drop"]) document.body.dispatchEvent(
        new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true }));
    }"""
    page.evaluate(drop, list(file.getvalue()))
    page.locator("#asked", has_text="dropped.png").wait_for()
    watched.settle()
    page.route("**/api/**", lambda route: route.abort())
    page.locator("#random").click()
    page.locator("#error", has_text="does not answer").wait_for()
    page.unroute("**/api/**")
    page.locator("#random").click()
    page.locator("#error").wait_for(state="hidden")
    watched.said[:] = [text for text in watched.said if "ERR_FAILED" not in text]
