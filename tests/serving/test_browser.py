"""The page in a real browser: slide, stream, vote, reload, by keyboard alone, in the dark, on a narrow screen."""

import asyncio
import contextlib
import itertools
import re
import threading
import urllib.parse

import jax
import numpy as np
import pytest
from support import tiny_serving, tiny_users
from support.accessibility import faults
from support.browser import chromium
from support.serving import send, served

from pjrlhf.data.preferences import PAPER
from pjrlhf.data.token_table import Lengths
from pjrlhf.models.registry import UserRegistry
from pjrlhf.models.users import UserModel
from pjrlhf.rollout.preference import PreferenceConfig
from pjrlhf.serving.catalogue import Catalogue, People
from pjrlhf.serving.opening import soup_people
from pjrlhf.serving.people import api
from pjrlhf.serving.people.fit import Learning
from pjrlhf.serving.responses import Call
from pjrlhf.serving.run_notes import RunNotes
from pjrlhf.serving.service import Service

NAMES = ("P1A", "P2B", "P3A")
QUESTION = "what is rain ?"
EVIL = "<img src=x onerror=\"document.title='x'\">"


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_serving.model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def engine(model):
    engine = tiny_serving.engine(model)
    engine.start()
    yield engine
    engine.close(30)


LEARNING = Learning(
    objective=PreferenceConfig(beta=0.5),
    lengths=Lengths(prompt=16, completion=32, long_prompt="truncate_left", long_completion="truncate"),
    steps=10,
)


@pytest.fixture(scope="module")
def place(model, engine, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    (run / "report").mkdir()
    (run / "report" / "index.html").write_text("<!doctype html><html lang=en><title>the report</title>")
    bank, notes = tiny_serving.bank(model), RunNotes(f"Soups {EVIL}", PAPER, (QUESTION,))
    people = soup_people(bank, NAMES, LEARNING, "base")
    answers = ("it is wet .", "yes .", EVIL)
    pairs = [{"prompt": QUESTION, "chosen": a, "rejected": b} for a, b in itertools.combinations(answers, 2)]
    asked = tiny_users.write_records(run / "questions.jsonl", pairs)
    catalogue = Catalogue(model, NAMES, bank, people, run=run, notes=notes)
    with served(catalogue, engine, questions=asked) as place:
        yield place


@pytest.fixture
def ana(request):
    """A name that nobody has yet."""
    return f"ana of {request.node.name}"


@contextlib.contextmanager
def opened(browser, place, viewport=(1280, 900), **options):
    """The page; nothing may go wrong on it, and nothing may come from elsewhere."""
    context = browser.new_context(viewport=dict(zip(("width", "height"), viewport, strict=True)), **options)
    page = context.new_page()
    page.set_default_timeout(20_000)
    problems, origin = [], f"http://{place[0]}:{place[1]}/"
    page.on("console", lambda message: problems.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(origin) else problems.append(request.url))
    page.goto(origin)
    try:
        yield page
        assert not problems
    finally:
        context.close()


@pytest.fixture
def page(browser, place):
    with opened(browser, place) as page:
        page.wait_for_selector("#main:not([hidden])")
        yield page


def until(page, condition):
    """Waits; the policy of the page leaves no way to wait inside of it."""
    for _ in range(400):
        if condition():
            return
        page.wait_for_timeout(50)
    raise AssertionError("this did not happen in 20 seconds")


def says(page, selector, text):
    until(page, lambda: text in page.locator(selector).first.inner_text())


def add(page, name):
    page.click("#new-person")
    page.fill("#new-name", name)
    page.press("#new-name", "Enter")
    until(page, lambda: page.input_value("#person") == name)


def ask(page, question=QUESTION):
    page.fill("#question", question)
    page.fill("#temperature", "0")
    page.fill("#limit", "12")
    page.click("#send")
    says(page, "#status", "answers are complete")


def answers(page):
    return page.locator(".answer").all_inner_texts()


def sliders(page):
    return [float(text) for text in page.locator("#sliders output").all_inner_texts()]


def slide(page, number, value):
    page.locator("#sliders input").nth(number).fill(str(value))


def expected(place, mix):
    body = {
        "model": "base",
        "mix": mix,
        "temperature": 0,
        "max_tokens": 12,
        "messages": [{"role": "user", "content": QUESTION}],
    }
    return send(place, body)[1]["choices"][0]["message"]["content"]


def user(place, name, part=""):
    return send(place, None, f"/v1/users/{urllib.parse.quote(name, safe='')}{part}", "GET")[1]


def votes(place, name):
    """(chosen, rejected) of all votes of a person."""
    return [(vote["chosen"], vote["rejected"]) for vote in user(place, name, "/export")["comparisons"]]


def rounded(place, name):
    """The weights of a person as the page shows them."""
    return [pytest.approx(weight, abs=0.0051) for weight in user(place, name)["mix"].values()]


def test_sliders_decide_what_answers(page, place):
    slide(page, 0, 1)
    slide(page, 1, 0.25)
    slide(page, 2, 0)
    assert sliders(page) == [1, 0.25, 0]
    ask(page)
    assert answers(page) == [expected(place, {"P1A": 1, "P2B": 0.25}), expected(place, {})]
    assert len(set(answers(page))) == 2
    slide(page, 2, 0.5)
    assert "changed since" in page.locator(".mix").first.evaluate("x => getComputedStyle(x, '::after').content")


def test_ingredients_have_names_and_descriptions(page):
    label = page.locator("label[for=slider-0]").inner_text()
    assert PAPER["P1A"].label in label and "P1A" in label
    described = page.locator("#slider-0").get_attribute("aria-describedby")
    assert page.locator(f"#{described}").inner_text() == PAPER["P1A"].sentence


def test_four_soups_side_by_side(page, place, ana):
    for _ in range(2):
        page.click("#add-soup")
        page.click("#set-even")
    assert page.locator("#add-soup").is_disabled()
    ask(page)
    found = answers(page)
    assert len(found) == 4
    assert found[2] == found[3] == expected(place, dict.fromkeys(NAMES, 1 / 3))
    add(page, ana)
    assert page.locator("#vote legend").inner_text() == "Which do you like best?"
    page.get_by_role("button", name="A is best").click()
    says(page, "#status", "Learned")
    assert set(votes(place, ana)) == {(found[0], other) for other in found[1:] if other != found[0]}
    page.click("#remove-soup")
    assert page.locator("article").count() == 3


@pytest.fixture
def slowly(monkeypatch):
    """The first pieces of an answer come one after the other; the rest waits for the end of the request, so that a busy
    machine is in time to stop it.
    """
    pieces = Call.pieces

    async def slow(self):
        come = 0
        async for piece in pieces(self):
            await asyncio.sleep(0.15 if come < 5 else 60)
            come += 1
            yield piece

    monkeypatch.setattr(Call, "pieces", slow)


def test_answers_stream_and_can_be_stopped(page, slowly, engine):
    page.fill("#question", QUESTION)
    page.fill("#temperature", "2")
    page.fill("#limit", "30")
    page.click("#send")
    until(page, lambda: answers(page)[0])
    assert page.locator(".answer").first.get_attribute("aria-busy") == "true"
    early = answers(page)[0]
    until(page, lambda: len(answers(page)[0]) > len(early))
    page.click("#stop")
    until(page, lambda: page.locator("#stop").is_hidden())
    assert page.locator(".answer").first.get_attribute("aria-busy") == "false"
    assert page.locator(".answer").first.inner_text().startswith(early)
    assert "Stopped." in page.locator("article").first.inner_text()
    assert page.locator("#vote").is_hidden()
    until(page, lambda: engine.running == 0)


def test_a_vote_teaches_the_person_and_moves_the_sliders(page, place, ana):
    ask(page)
    assert page.get_by_role("button", name="A is better").is_disabled()
    assert page.locator("#vote legend").inner_text() == "Which do you like better?"
    add(page, ana)
    assert sliders(page) == [0.33, 0.33, 0.33]
    first, second = answers(page)
    page.get_by_role("button", name="B is better").click()  # not what this soup expects
    says(page, "#status", "Learned")
    assert votes(place, ana) == [(second, first)]
    learned = sliders(page)
    assert learned == rounded(place, ana) and learned != [0.33, 0.33, 0.33]
    assert "1 comparison so far" in page.locator("#person-note").inner_text()
    assert page.get_by_role("button", name="A is better").is_disabled()
    # The next answer is that of the new weights, also after a reload.
    page.reload()
    page.wait_for_selector("#main:not([hidden])")
    assert page.input_value("#person") == ana and page.input_value("#question") == QUESTION
    assert sliders(page) == learned
    ask(page)
    assert answers(page)[0] == expected(place, user(place, ana)["mix"])


def test_a_vote_brings_the_sliders_back_to_the_person(page, place, ana):
    add(page, ana)
    slide(page, 0, 1)
    ask(page)
    page.get_by_role("button", name="B is better").click()
    says(page, "#status", "Learned")
    assert sliders(page) == rounded(place, ana)


def test_questions_are_asked_one_after_the_other(page, place, ana):
    """Those of the server; each vote teaches the person, and the next question is another one."""
    assert page.locator("#ask-me").is_disabled()
    add(page, ana)
    page.click("#ask-me")
    page.wait_for_selector("#quiz:not([hidden])")
    assert page.evaluate("document.activeElement.id") == "quiz-title"
    rows = [page.locator(button).bounding_box()["y"] for button in ("#quiz-choice-0", "#quiz-skip", "#quiz-stop")]
    assert len({*rows}) == 1, "the buttons are in one line, where it has room"
    chosen = []
    for button, count in (("#quiz-choice-0", 1), ("#quiz-skip", 1), ("#quiz-choice-2", 3)):
        asked = [page.locator(f"#quiz-answer-{i}").inner_text() for i in range(2)]
        assert page.locator("#quiz-prompt").inner_text() == QUESTION
        page.click(button)
        until(page, lambda: page.get_attribute("#quiz", "aria-busy") == "false")
        after = [page.locator(f"#quiz-answer-{i}").inner_text() for i in range(2)]
        assert set(asked) != set(after) or page.locator("#quiz-pair").is_hidden()
        if button != "#quiz-skip":
            chosen += [tuple(asked), *[tuple(asked[::-1])] * (button == "#quiz-choice-2")]
        assert sorted(votes(place, ana)) == sorted(chosen) and len(chosen) == count
        assert sliders(page) == rounded(place, ana)
    says(page, "#quiz-note", "No questions are left.")  # but the one that was skipped
    page.click("#quiz-stop")
    assert page.locator("#quiz").is_hidden() and page.evaluate("document.activeElement.id") == "ask-me"
    page.click("#ask-me")
    page.wait_for_selector("#quiz:not([hidden])")
    assert page.locator("#quiz-pair").is_visible()
    page.locator("#person").select_option("")
    until(page, lambda: page.locator("#quiz").is_hidden())


@pytest.mark.parametrize("asks", [True, False], ids=["question", "vote"])
def test_who_waits_for_the_compiler_is_told_why(page, ana, monkeypatch, asks):
    name, note = ("ask_of", "#ask-note") if asks else ("_learn", "#status")
    plain, go_on = getattr(api, name), threading.Event()

    def held(*arguments):
        assert go_on.wait(60)
        return plain(*arguments)

    monkeypatch.setattr(Service, "compiling", property(lambda self: True))
    monkeypatch.setattr(api, name, held)
    add(page, ana)
    if asks:
        page.click("#ask-me")
    else:
        ask(page)
        page.get_by_role("button", name="A is better").click()
    says(page, note, "has just started and still compiles")
    go_on.set()
    if asks:
        page.wait_for_selector("#quiz:not([hidden])")
        until(page, lambda: not page.locator(note).inner_text())
    else:
        says(page, note, "Learned")
        assert "compiles" not in page.locator(note).inner_text()


def test_no_difference_says_that_each_is_as_good_as_the_other(page, place, ana):
    add(page, ana)
    ask(page)
    first, second = answers(page)
    page.get_by_role("button", name="No difference").click()
    says(page, "#status", "Learned")
    assert set(votes(place, ana)) == {(first, second), (second, first)}


def test_the_same_answers_teach_nothing(page, ana):
    add(page, ana)
    page.click("#set-zero")
    ask(page)
    assert "nothing to learn" in page.locator("#vote-note").inner_text()
    assert all(button.is_disabled() for button in page.locator("#choices button").all())


@pytest.mark.parametrize("name", [EVIL, "a/b?c#d&e %2f é 人", "__proto__"])
def test_people_come_and_go(page, place, name):
    add(page, name)
    assert page.locator("#person option").all_inner_texts()[-1] == name
    assert page.title() == f"Soups {EVIL}"
    assert page.locator("img").count() == 0
    ask(page)
    page.locator("#choices button").first.click()
    says(page, "#status", "Learned")
    assert "1 comparison" in page.locator("#person-note").inner_text()
    page.click("#remove-person")
    assert name in page.locator("#remove-note").inner_text()
    page.get_by_role("button", name="Keep").click()
    assert page.input_value("#person") == name
    page.click("#remove-person")
    page.locator("#remove-dialog").get_by_role("button", name="Remove").click()
    until(page, lambda: page.input_value("#person") == "")
    assert name not in page.locator("#person option").all_inner_texts()
    assert "error" in user(place, name)


def test_the_triangle_shares_out_the_weights_of_its_corners(page):
    page.click("#set-even")
    handle = page.locator(".handle")
    for _ in range(20):
        handle.press("ArrowUp")
    assert sliders(page) == [1, 0, 0]
    assert handle.get_attribute("aria-valuenow") == "100"
    handle.press("Home")
    assert sliders(page) == [0.33, 0.33, 0.33]
    handle.press("ArrowLeft")
    left = sliders(page)
    assert left[1] > left[0] > left[2] and sum(left) == pytest.approx(1, abs=0.02)
    handle.press("ArrowRight")
    assert sliders(page) == [0.33, 0.33, 0.33]
    # By pointer: to the right corner.
    field = page.locator(".field").bounding_box()
    page.mouse.move(field["x"] + field["width"] / 2, field["y"] + field["height"] / 2)
    page.mouse.down()
    page.mouse.move(field["x"] + field["width"] + 40, field["y"] + field["height"] + 20, steps=4)
    page.mouse.up()
    assert sliders(page) == [0, 0, 1]
    # Corners change places, weights do not.
    page.locator("select.top").select_option("P3A")
    assert page.locator("select.right").input_value() == "P1A"
    assert sliders(page) == [0, 0, 1]
    assert handle.get_attribute("aria-valuenow") == "100"


def test_everything_works_from_the_keyboard(page, place):
    def focus(selector):
        """Tabs until an element has the focus."""
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                outline = page.evaluate(
                    "() => { const s = getComputedStyle(document.activeElement); return [s.outlineStyle, s.stroke]; }"
                )
                assert outline[0] != "none" or outline[1] not in ("", "none")  # it is seen
                return
        raise AssertionError(selector)

    focus("#new-person")
    page.keyboard.press("Enter")
    page.keyboard.type("bo")
    page.keyboard.press("Enter")
    until(page, lambda: page.input_value("#person") == "bo")
    focus("#tab-0")
    page.keyboard.press("ArrowRight")
    assert page.locator("#tab-1").get_attribute("aria-selected") == "true"
    page.keyboard.press("ArrowLeft")
    focus("#slider-0")
    page.keyboard.press("End")
    assert sliders(page)[0] == 1
    focus(".handle")
    page.keyboard.press("ArrowUp")
    focus("#question")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    page.wait_for_selector("#vote:not([hidden])")
    focus("#choices button")
    page.keyboard.press("Enter")
    says(page, "#status", "Learned")
    assert len(votes(place, "bo")) == 1


def test_everything_has_a_name_for_screen_readers(page, ana):
    add(page, ana)
    ask(page)
    for role in ("button", "slider", "combobox", "textbox", "spinbutton", "tab", "link"):
        for one in page.get_by_role(role).all():
            assert one.evaluate(
                "x => (x.getAttribute('aria-label') || x.labels?.[0]?.textContent || x.textContent).trim()"
            )
    assert page.locator(".answer").first.get_attribute("aria-live") == "polite"
    levels = [int(tag[1]) for tag in page.locator("h1, h2, h3").evaluate_all("x => x.map((y) => y.tagName)")]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in itertools.pairwise(levels))


def test_errors_are_said_in_the_words_of_the_server(browser, place, ana):
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"http://{place[0]}:{place[1]}/")
    page.wait_for_selector("#main:not([hidden])")
    page.fill("#question", QUESTION)
    page.fill("#limit", "100000")
    page.click("#send")
    page.wait_for_selector("article.failed")
    assert "exceeds the context" in page.locator("article").first.inner_text()
    add(page, ana)
    page.click("#new-person")
    page.fill("#new-name", ana)
    page.press("#new-name", "Enter")
    page.wait_for_selector("#notice:not([hidden])")
    assert "is taken" in page.locator("#notice").inner_text()
    page.fill("#new-name", "..")  # no address of a page can have it
    page.press("#new-name", "Enter")
    says(page, "#notice", "Choose another name")
    context.close()


def test_the_report_is_linked(page):
    with page.expect_navigation():
        page.click("#report")
    assert page.title() == "the report"


def test_the_key_is_asked_for_once(browser, model, engine, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").write_text("<!doctype html><html lang=en><title>the report</title>")
    catalogue = Catalogue(model, NAMES, tiny_serving.bank(model), run=tmp_path)
    with served(catalogue, engine, key="s3cret") as place, opened(browser, place) as page:
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        says(page, "#key-note", "not the key")
        page.fill("#key", "s3cret")
        page.press("#key", "Enter")
        page.wait_for_selector("#main:not([hidden])")
        ask(page)
        page.reload()
        page.wait_for_selector("#main:not([hidden])")
        assert page.locator("#key-dialog").is_hidden()
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.click("#report")
        until(page, lambda: page.title() == "the report")


@contextlib.contextmanager
def on_screen(browser, place, scheme, width):
    """The page when it is ready, without animations."""
    with opened(browser, place, (width, 844), color_scheme=scheme, reduced_motion="reduce") as page:
        page.wait_for_selector("#main:not([hidden])")
        yield page


screens = pytest.mark.parametrize(("scheme", "width"), [(s, w) for s in ("light", "dark") for w in (390, 1280)])


@screens
def test_any_screen(browser, place, width, scheme):
    with on_screen(browser, place, scheme, width) as page:
        add(page, f"{'a-person-with-a-long-name-' * 4}{width}{scheme}")
        page.click("#add-soup")
        page.click("#ask-me")
        page.wait_for_selector("#quiz:not([hidden])")
        ask(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for row in page.locator("button:visible, select:visible, input:visible").all():
            box = row.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width
        ground, ink = page.evaluate(
            "() => ['backgroundColor', 'color'].map((key) => getComputedStyle(document.body)[key])"
        )
        darkness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ground, ink)]
        assert (darkness[0] < darkness[1]) == (scheme == "dark")
        assert page.evaluate("getComputedStyle(document.querySelector('.part')).transitionProperty") == "none"


def test_only_a_base(browser, model, engine):
    base = Catalogue(model)
    plain = tiny_serving.Engine(model.backbone, model.tokenizer, None, 0, tiny_serving.SETTINGS)
    plain.start()
    with served(base, plain) as place, opened(browser, place) as page:
        page.wait_for_selector("#main:not([hidden])")
        assert page.locator("#only-base").is_visible()
        assert page.locator("#sliders").is_hidden()
        ask(page)
        assert len(set(answers(page))) == 1
    plain.close(30)


def test_people_with_user_tokens(browser, model):
    """No sliders: each soup is a person."""
    width, tokens = model.backbone.model.config.hidden_size, 2
    users = UserModel(kind="individualized", num_users=2, tokens=tokens, width=width)
    shapes = jax.eval_shape(lambda: users.init(jax.random.key(0), model.backbone.base["embed"]["embedding"]))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    people = People(users, UserRegistry((None, "ana", "bo")), params, learning=LEARNING, base="base")
    bank = jax.tree.map(lambda x: x[:1], tiny_serving.bank(model))
    catalogue = Catalogue(model, ("individualized",), bank, people)
    engine = tiny_serving.Engine(model.backbone, model.tokenizer, bank, tokens, tiny_serving.SETTINGS)
    engine.start()

    def answer(**fields):
        body = {"temperature": 0, "max_tokens": 12, "messages": [{"role": "user", "content": QUESTION}], **fields}
        return send(place, body)[1]["choices"][0]["message"]["content"]

    with served(catalogue, engine) as place, opened(browser, place) as page:
        page.wait_for_selector("#main:not([hidden])")
        assert page.locator("#sliders").is_hidden() and page.locator("#voices").is_visible()
        page.locator("#person").select_option("ana")
        says(page, "#person-note", "Known from training")
        page.click("#tab-1")
        page.locator("#voice").select_option("the base")
        ask(page)
        assert answers(page) == [answer(model="individualized", user="ana"), answer(model="base")]
        page.get_by_role("button", name="B is better").click()
        says(page, "#status", "Learned")
        assert len(votes(place, "ana")) == 1
        page.locator("#voice").select_option("bo")
        ask(page)
        assert answers(page) == [answer(model="individualized", user=name) for name in ("ana", "bo")]
    engine.close(30)


@screens
def test_axe_finds_no_serious_fault(browser, place, width, scheme):
    """With two answers, a question to the person, and a notice on the page."""
    with on_screen(browser, place, scheme, width) as page:
        assert not faults(page)
        add(page, f"somebody at {width} in the {scheme}")
        page.click("#ask-me")
        page.wait_for_selector("#quiz:not([hidden])")
        ask(page)
        assert not faults(page)
