"""What a browser does with a page's form, without a browser."""

import html.parser


class Page(html.parser.HTMLParser):
    """Fields and options of the form of a page, and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.hidden: dict[str, str] = {}
        self.options: dict[str, list[str]] = {}
        self.checked: dict[str, str] = {}
        self.action = ""
        self.tags: list[str] = []
        self.labels: dict[str, str] = {}
        self._field, self._legend = "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        if tag == "form":
            self.action = values["action"]
        if tag == "fieldset":
            self._field = values["id"]
        self._legend = tag == "legend"
        if tag == "input" and values["type"] == "hidden":
            self.hidden[values["name"]] = values["value"]
        if tag == "input" and values["type"] == "radio":
            self.options.setdefault(values["name"], []).append(values["value"])
            if "checked" in values:
                self.checked[values["name"]] = values["value"]

    def handle_data(self, data):
        if self._legend and data.strip():
            self.labels[self._field] = data
            self._legend = False


def join(client, query: str = ""):
    """Agree to take part; the response is the first page's."""
    form = Page(client.get(f"/{query}").text).hidden
    return client.post("/consent", data=form | {"agree": "1"})


def answer(client, response, go="next", pick=None):
    """Send a page's form with an answer to every question."""
    page = Page(response.text)
    values = {name: options[-1] for name, options in page.options.items()}
    values = pick(page, values) if pick else values
    return client.post(page.action, data=page.hidden | values | {"go": go})


def finish(client, response, pick=None):
    """Answer all pages that are left; the response is the last one."""
    while "/page/" in str(response.url):
        response = answer(client, response, pick=pick)
        assert response.status_code == 200
    return response
