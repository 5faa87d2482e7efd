"""What a reader of a report sees: the page's tags and text, and the tables of the terminal."""

import html.parser
import io

import rich.console

from pjrlhf.evaluation import report


class Page(html.parser.HTMLParser):
    """Tags with attributes, visible text, and a check that tags are closed in order."""

    VOID = frozenset({"meta", "img", "br", "source"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def ids(self):
        return {attributes["id"] for tag, attributes in self.tags if tag == "section"}


def printed(summary, width=100):
    console = rich.console.Console(file=io.StringIO(), width=width)
    report.print_tables(summary, console)
    return console.file.getvalue()
