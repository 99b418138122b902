"""A report as a list of blocks, written as Markdown and as one self-contained HTML file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from trelm_ds.files import write_text

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;
color:#222}table{border-collapse:collapse;margin:1em 0;font-size:13px;display:block;overflow-x:auto}
td,th{border:1px solid #ccc;padding:.25em .6em;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}th{background:#f3f3f3}img{max-width:100%}
figcaption{color:#555;font-size:13px}code{background:#f3f3f3;padding:.1em .3em}"""


class Document:
    """Headings, paragraphs, tables and figures in the order in which they were added."""

    def __init__(self, title: str):
        self.title = title
        self._blocks: list[tuple] = []

    def heading(self, text: str) -> None:
        self._blocks.append(("heading", text))

    def text(self, text: str) -> None:
        self._blocks.append(("text", text))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._blocks.append(("table", list(header), [list(row) for row in rows]))

    def figure(self, path: Path, caption: str) -> None:
        """``path``: a PNG inside the folder that the document is written to."""
        self._blocks.append(("figure", path, caption))

    def write(self, folder: Path) -> Path:
        """Writes ``REPORT.md`` and ``report.html``; returns the former."""
        path = folder / "REPORT.md"
        for target, content in (
            (path, self.markdown(folder)),
            (folder / "report.html", self.html()),
        ):
            write_text(target, content)
        return path

    def markdown(self, folder: Path) -> str:
        parts = [f"# {self.title}"]
        for kind, *content in self._blocks:
            if kind == "heading":
                parts.append(f"## {content[0]}")
            elif kind == "text":
                parts.append(content[0])
            elif kind == "table":
                header, rows = content
                lines = [header, ["---"] * len(header), *rows]
                parts.append(
                    "\n".join(
                        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
                        for line in lines
                    )
                )
            else:
                at, caption = content
                parts.append(f"![{caption}]({at.relative_to(folder).as_posix()})\n\n{caption}")
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        parts = [f"<h1>{html.escape(self.title)}</h1>"]
        for kind, *content in self._blocks:
            if kind == "heading":
                parts.append(f"<h2>{html.escape(content[0])}</h2>")
            elif kind == "text":
                parts.append(f"<p>{html.escape(content[0])}</p>")
            elif kind == "table":
                header, rows = content
                lines = [_cells("th", header), *(_cells("td", row) for row in rows)]
                parts.append("<table>" + "\n".join(lines) + "</table>")
            else:
                at, caption = content
                data = base64.b64encode(at.read_bytes()).decode()
                caption = html.escape(caption)
                parts.append(
                    f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
                    f"<figcaption>{caption}</figcaption></figure>"
                )
        title = html.escape(self.title)
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
        )


def _cells(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
