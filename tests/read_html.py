"""Reads an HTML page from standard input, and prints its table rows, charts and addresses as JSON; a page that is not well formed fails."""

import json
import sys
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.rows, self.charts, self.text = [], [], [], []
        self.scripts, self.addresses = 0, []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.scripts += tag == "script" or any(name.startswith("on") for name, _ in attributes)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "svg":
            self.charts.append("")

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"`{tag}` closes nothing at {self.getpos()}"

    def handle_data(self, data):
        if "style" in self.open:
            assert "url(" not in data and "@import" not in data, "the style loads something"
        elif "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        elif "svg" in self.open:
            self.charts[-1] += data
        else:
            self.text.append(data)


page = Page()
page.feed(sys.stdin.read())
page.close()
assert not page.open, f"left open: {page.open}"
print(json.dumps({
    "rows": page.rows,
    "charts": page.charts,
    "text": "".join(page.text),
    "scripts": page.scripts,
    "addresses": page.addresses,
}))
