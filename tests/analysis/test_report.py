"""The page: complete in itself, nothing left out, no data taken for markup."""

import dataclasses
import html.parser
import re
import subprocess
import sys
import urllib.parse

import pytest

from kdjax.analysis import extras, report, runs
from tests.analysis import cells

BINS = {cells.HOSTILE: ([0, 4, 10], [0, 2.0, 9.0], [0, 1, 8])}
EMPTY = {"br", "meta", "link", "img", "hr", "input"}


class Page(html.parser.HTMLParser):
    """Tags, links, ids and text of a page; fails where tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.ids, self.open = [], [], [], []
        self.text, self.bold, self.attributes = "", [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.links += [values["href"]] if tag == "a" else []
        self.ids += [values["id"]] if "id" in values else []
        if tag not in EMPTY:
            self.open.append((tag, values.get("class", "")))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if "style" in (tag for tag, _ in self.open):
            return
        self.text += data
        if self.open and "best" in self.open[-1][1]:
            self.bold.append(data)


def _render(rows=None, design=cells.GRID, **options):
    found = runs.parse(rows or cells.grid_rows(), design)
    return found, report.render(found, design, **options)


@pytest.fixture(scope="module")
def whole():
    found, text = _render(title=cells.HOSTILE, reliability=BINS)
    return found, text, Page(text)


def test_the_page_fetches_nothing_and_runs_nothing(whole):
    _, text, page = whole
    assert not re.search(r"https?://|//[a-z]", text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not [name for name in page.attributes if name.startswith("on")]
    assert "@import" not in text and "url(" not in text.split("</style>")[0]


def test_no_number_is_missing_its_words(whole):
    _, _, page = whole
    assert not re.search(r"\b([nN]a[nN]|inf|None|Undefined)\b", page.text)


def test_what_data_says_is_text(whole):
    _, text, page = whole
    assert "<script" not in text and "<b>bad</b>" not in text
    assert page.text.count(cells.HOSTILE) > 5
    assert "step 7: <b>bad</b> \x1b[31m& gone" in page.text


def test_every_run_has_a_row_and_a_link_to_its_directory(whole):
    found, _, page = whole
    assert len(page.ids) == len(set(page.ids))
    for run in found:
        assert f"run-{run.row}" in page.ids
        assert f"./{urllib.parse.quote(run.name)}/" in page.links
        if run.value("accuracy") is not None:
            # Its dot and its number in the table of groups, at least.
            assert page.links.count(f"#run-{run.row}") >= 2


def test_links_lead_within_the_page_or_to_directories_beside_it(whole):
    _, _, page = whole
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        else:
            assert link.startswith("./") and ":" not in link


@pytest.mark.parametrize("name", ["//elsewhere", "javascript:alert(1)", "a b?c#d%"])
def test_no_name_of_a_run_leads_elsewhere(name):
    rows = cells.grid_rows()[:2]
    rows[0]["run"] = name
    _, text = _render(rows, folder="runs")
    link = f"./runs/{urllib.parse.quote(name)}/"
    assert Page(text).links.count(link) == 1 + 3  # its name and its numbers


def test_failed_and_collapsed_runs_are_on_the_page(whole):
    found, _, page = whole
    text = " ".join(page.text.split())
    assert "36 runs: 34 done, 2 failed; 1 of those that are done collapsed" in text
    assert "Without a result: finetune-t5_base-5 (failed), finetune-t5_large-5" in text
    collapsed = "nll is not a number; accuracy is not above 0.2"
    assert f"Collapsed: multitask-t5_base-3 ({collapsed})" in text
    (outlier,) = [run for run in found if run.collapsed]
    assert f"#run-{outlier.row}" in page.links


def test_the_best_mean_of_each_student_is_bold():
    rows = [row for row in cells.grid_rows() if row["method"] != cells.HOSTILE]
    found, text = _render(rows)
    bold = Page(text).bold
    for metric, choose in (("accuracy", max), ("nll", min)):
        groups = runs.groups(found, metric, cells.GRID)
        for student in ("t5_base", "t5_large"):
            means = [group.mean for group in groups if group.within == student]
            assert report.number(choose(means), 4) in bold


def test_the_same_runs_give_the_same_page(whole):
    found, text, _ = whole
    again = report.render(found, cells.GRID, title=cells.HOSTILE, reliability=BINS)
    assert again == text


def test_both_versions_stand_where_there_are_outliers(whole):
    _, _, page = whole
    assert "without outliers" in page.text
    rows = [row for row in cells.grid_rows() if int(row["seed"]) < 2]
    _, text = _render(rows)
    text = Page(text).text
    assert "no outlier" in text and "without outliers" not in text.split("How it is")[0]


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (
            lambda row: row["seed"] == "0",
            "one seed in each group: no variance, no test",
        ),
        (lambda row: row["status"] == "failed", "no run has a number"),
        (lambda row: row["run"] == "multitask-t5_base-0", "nothing to compare"),
        (lambda row: False, "0 runs"),
    ],
    ids=["one seed", "all failed", "one run", "no run"],
)
def test_little_data_makes_a_page_too(keep, words):
    rows = [row for row in cells.grid_rows() if keep(row)]
    found = runs.parse(rows, cells.GRID)
    page = Page(report.render(found, cells.GRID))
    assert words in page.text
    assert not re.search(r"\b([nN]a[nN]|inf|None|Undefined)\b", page.text)


def test_one_factor_and_no_cost():
    design = dataclasses.replace(cells.GRID, within=(), cost="")
    _, text = _render(design=design)
    page = Page(text)
    assert "Quality and cost" not in page.text
    assert "runs differ in student too" in page.text


def _study():
    """24 runs of three factors: temperature 2 is better, temperature 4 is not."""
    gains = {"1": 0.0, "2": 0.1, "4": 0.0}
    rows = [
        {
            "run": f"{temperature}-{student}-{soft}-{seed}",
            "status": "done",
            "temperature": temperature,
            "student": student,
            "soft": soft,
            "seed": str(seed),
            "accuracy": repr(0.5 + gains[temperature] + 0.01 * (seed - 0.5)),
        }
        for temperature in gains
        for student in ("small", "large")
        for soft in ("0.5", "1")
        for seed in range(2)
    ]
    design = runs.Design(
        metrics=("accuracy",),
        factors=("temperature", "student", "soft"),
        compare=("temperature",),
        within=("student",),
    )
    return rows, design


def test_each_factor_has_a_sentence_and_its_levels():
    rows, design = _study()
    _, text = _render(rows, design)
    page = Page(text)
    minus = "\N{MINUS SIGN}"
    # s^2 = 24 * 0.005^2 / 19, and t(19) at 1 - 0.05 / 2 / 2 is 2.4334.
    half = 2.4334 * (24 * 0.005**2 / 19 / 4) ** 0.5
    bounds = f"{0.1 - half:.4f} to {0.1 + half:.4f}"
    assert (
        f"temperature: 2 against 1: +0.1000 (95% interval {bounds}); 4 against 1: "
        f"no difference seen (0.0000, {minus}{half:.4f} to {half:.4f})."
    ) in page.text
    for words in ("student: large against small", "soft: 1 against 0.5"):
        assert f"{words}: no difference seen (0.0000, 95% interval {minus}" in page.text
    assert "Interactions seen at the 5% level, of 3 pairs: none." in page.text
    for run in range(1, 25):  # a line a factor, and the figures and tables of groups
        assert page.links.count(f"#run-{run}") >= 3 + 2
    for target in ("1-1", "1-2", "1-3", "2-2", "3-2"):
        assert f"#factor-1-{target}" in page.links
        assert f"factor-1-{target}" in page.ids


def test_one_varying_factor_has_no_section_of_its_own():
    rows, design = _study()
    section = "Effect of each factor"
    assert section in _render(rows, design)[1]
    rows = [row for row in rows if row["student"] == "small" and row["soft"] == "1"]
    assert section not in _render(rows, design)[1]


def test_what_is_not_estimable_is_said_on_the_page(whole):
    _, _, page = whole
    words = "the levels of method and generation meet too seldom to tell them apart"
    assert page.text.count("Effect of each factor") == 2 + 1  # and how it is computed
    assert f"few_shot against (none): not estimable ({words})." in page.text
    assert "temperature:" not in page.text


def test_write_leaves_the_page_alone(tmp_path):
    found, text = _render(cells.grid_rows()[:3])
    report.write(tmp_path / "report.html", found, cells.GRID)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == text


def test_numbers_are_rounded_here_and_nowhere_else():
    assert report.number(0.123456) == "0.1235"
    assert report.number(1234567.8) == "1,234,568"
    assert report.number(0.00012346) == "0.0001235"
    assert report.number(-1.5, 2) == "\N{MINUS SIGN}1.50"
    assert report.number(None) == "\N{EN DASH}"
    assert report.p_value(0.0499) == "0.0499"
    assert report.p_value(1e-9) == "< 0.0001"
    with pytest.raises(AssertionError, match="value=nan"):
        report.number(float("nan"))


def test_the_package_imports_without_the_extra():
    code = (
        "import sys\n"
        "for name in ('pandas', 'scipy', 'statsmodels', 'scikit_posthocs'):\n"
        "    sys.modules[name] = None\n"
        "from kdjax.analysis import effect_sizes, factor_effects, report\n"
        "try:\n"
        "    effect_sizes.vargha_delaney([1.0], [2.0])\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "pip install 'kdjax[compare]'" in run.stdout


def test_what_is_installed_is_loaded():
    assert extras.load("html.parser") is html.parser
    with pytest.raises(ValueError, match="package='no_such'"):
        extras.load("no_such")


def _rows(values, **columns):
    return [
        {
            "run": f"{level}-{seed}",
            "status": "done",
            "method": level,
            "seed": str(seed),
            "accuracy": repr(value),
            "parameters": "10.0",
            "teacher_accuracy": "0.75",
        }
        | columns
        for level, of_level in values.items()
        for seed, value in enumerate(of_level)
    ]


DESIGN = runs.Design(
    metrics=("accuracy",),
    factors=("method",),
    compare=("method",),
    chance={"accuracy": 0.25},
    references={"accuracy": "teacher_accuracy"},
    cost="parameters",
)


def test_the_page_says_in_words_what_was_run_and_what_came_of_it():
    values = {"low": (0.30, 0.31, 0.32), "high": (0.6, 0.61, 0.62), "near": (0.6, 0.6)}
    _, text = _render(_rows(values), DESIGN, facts={"data": "<rows>", "seeds": "0"})
    page = Page(text)
    words = " ".join(page.text.split())
    assert (
        "accuracy: high has the highest mean, 0.610; low differs from it; no "
        "difference is seen from near; chance: 0.250; teacher: 0.750." in words
    )
    assert "data<rows>" in words.replace(" ", "") and "&lt;rows&gt;" in text
    assert "share of questions whose right choice" in words
    figure = text.partition("<svg")[2].partition("</svg>")[0]
    assert ">chance<" in figure and ">teacher<" in figure
    # All cost the same: nothing to weigh.
    assert "All groups have the same parameters" in words
    assert "Quality and cost" not in words


def test_a_shared_best_mean_is_nobodys():
    values = {"first": (0.5, 0.5), "second": (0.5, 0.5), "third": (0.25, 0.25)}
    _, text = _render(_rows(values), DESIGN)
    assert "0.5000" not in Page(text).bold


def test_without_a_test_the_conclusion_says_so():
    _, text = _render(_rows({"one": (0.5,), "two": (0.4,)}), DESIGN)
    assert "nothing can be tested against two" in " ".join(Page(text).text.split())
