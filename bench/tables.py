"""Tables, and their Markdown, LaTeX and HTML.

Results may be other people's: the writers escape all text of labels, cells, titles and notes.
"""

import base64
import hashlib
import re
from dataclasses import dataclass, field

import jinja2


@dataclass(frozen=True, slots=True)
class Score:
    """A number of a table with its 95 % interval. coverage: such as "20/1000 images", where the others are missing."""

    value: float | None
    low: float | None = None
    high: float | None = None
    decimals: int | None = 3  # None: four digits in all
    coverage: str = ""
    note: str = ""  # in brackets behind the number
    best: bool = False  # the column's best, or not different from it beyond chance

    def __str__(self) -> str:
        return "-" if self.value is None else number(self.value, self.decimals)

    @property
    def interval(self) -> str:
        if self.low is None or self.high is None:
            return ""
        low, high = number(self.low, self.decimals), number(self.high, self.decimals)
        return f"{low} to {high}" if self.low < 0 else f"{low}–{high}"

    @property
    def remark(self) -> str:
        """What stands in brackets behind the number."""
        return ", ".join(part for part in (self.interval, self.note, self.coverage) if part)


@dataclass(frozen=True, slots=True)
class Row:
    labels: list[str]
    cells: list[Score | str]
    group: str = ""
    published: bool = False  # elsewhere, rather than measured
    bold: bool = False  # its last label


@dataclass(frozen=True, slots=True)
class Table:
    """labels: headers of the rows' labels; columns: of their cells; spans: (header, columns) above the columns."""

    title: str
    labels: list[str]
    columns: list[str]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    spans: list[tuple[str, int]] = field(default_factory=list)
    shaded: bool = False  # its scores are shares, more is better

    def groups(self) -> list[tuple[str, list[Row]]]:
        """Rows by group, groups in the order of their first rows."""
        names = dict.fromkeys(row.group for row in self.rows)
        return [(name, [row for row in self.rows if row.group == name]) for name in names]


def number(value: float, decimals: int | None) -> str:
    return f"{value:.4g}" if decimals is None or abs(value) >= 1000 else f"{value:.{decimals}f}"


# Markdown


def markdown(table: Table) -> str:
    header = [*table.labels, *table.columns]
    rule = ["---"] * len(table.labels) + ["---:"] * len(table.columns)
    lines = ["| " + " | ".join(map(markdown_text, header)) + " |", "| " + " | ".join(rule) + " |"]
    for group, rows in table.groups():
        if group:
            lines.append(f"| **{markdown_text(group)}** |" + " |" * (len(header) - 1))
        for row in rows:
            labels = [markdown_text(label) for label in row.labels]
            if row.bold:
                labels[-1] = f"**{labels[-1]}**"
            lines.append("| " + " | ".join([*labels, *map(markdown_cell, row.cells)]) + " |")
    head = [f"### {markdown_text(table.title)}", *map(markdown_text, table.notes)]
    return "\n\n".join([*head, "\n".join(lines)]) + "\n"


def markdown_cell(cell: Score | str) -> str:
    if isinstance(cell, str):
        return markdown_text(cell)
    text = f"**{cell}**" if cell.best else str(cell)
    return f"{text} ({markdown_text(cell.remark)})" if cell.remark else text


def markdown_text(text: str) -> str:
    """Text that renders as itself: no links, pictures, HTML, formulas or emphasis."""
    text = re.sub(r"([\\`*\[\]|~$#])", r"\\\1", plain(text).replace("&", "&amp;"))
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # within a word it has no meaning
    return text.replace("<", "&lt;").replace(">", "&gt;")


# LaTeX

LATEX = {character: "\\" + character for character in "#$%&_{}"}
LATEX |= {character: f"{{{character}}}" for character in "[]*"}  # which \\ of the line above would take as its own
LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}
LATEX |= {"|": "$|$", "δ": r"$\delta$", "±": r"$\pm$", "–": "--", "…": r"\dots{}", "−": "$-$", '"': "''"}


def latex(table: Table) -> str:
    """A `table*` with booktabs' rules, shrunk if it is wider than the text; intervals are small, below the numbers."""
    width = len(table.labels) + len(table.columns)
    lines = [r"\begin{table*}", r"\centering\footnotesize\setlength{\tabcolsep}{3pt}\renewcommand{\arraystretch}{1.2}"]
    lines.append(rf"\caption{{{latex_text(' '.join([f'{table.title}.', *table.notes]))}}}")
    lines.append(rf"\sbox0{{\begin{{tabular}}{{{'l' * len(table.labels)}{'r' * len(table.columns)}}}" + r" \toprule")
    if table.spans:
        spans = [rf"\multicolumn{{{columns}}}{{c}}{{{latex_text(name)}}}" for name, columns in table.spans]
        lines.append(" & " * len(table.labels) + " & ".join(spans) + r" \\")
    lines.append(" & ".join(map(latex_text, [*table.labels, *table.columns])) + r" \\ \midrule")
    for index, (group, rows) in enumerate(table.groups()):
        if group:
            rule = r"\midrule " if index else ""
            lines.append(rf"{rule}\multicolumn{{{width}}}{{l}}{{\textit{{{latex_text(group)}}}}} \\")
        for row in rows:
            lines.append(" & ".join([*map(latex_text, row.labels), *map(latex_cell, row.cells)]) + r" \\")
    fitted = r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi"
    return "\n".join([*lines, rf"\bottomrule \end{{tabular}}}}{fitted}", r"\end{table*}"]) + "\n"


def latex_cell(cell: Score | str) -> str:
    if isinstance(cell, str):
        return latex_text(cell)
    text = rf"\textbf{{{cell}}}" if cell.best else str(cell)
    if not cell.remark:
        return text
    return rf"\begin{{tabular}}[t]{{@{{}}r@{{}}}}{text}\\[-4pt]\tiny {latex_text(cell.remark)}\end{{tabular}}"


def latex_text(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in plain(text))


# HTML


def page(notes: list[str], sections: list[tuple[str, list[Table]]]) -> str:
    """One HTML file: sortable, usable with the keyboard and offline, light and dark. Only its own script runs."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("bench", "."), autoescape=True, trim_blocks=True)
    environment.filters["plain"] = plain
    environment.filters["digest"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return environment.get_template("leaderboard.html").render(notes=notes, sections=sections)


# Text


def csv_value(value: str | float | None) -> str | float | None:
    """A number as it is; text such that no spreadsheet takes it for a formula."""
    if not isinstance(value, str):
        return value
    text = plain(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def plain(text: str) -> str:
    """One line, without control characters and marks of direction."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())
