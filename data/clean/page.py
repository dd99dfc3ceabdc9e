"""report.html: one self-contained page, its plots drawn as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733 }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; background: #f4f6f8; padding: .5rem; margin: .2rem 0 1rem; font-size: 12px }
h2 { margin-top: 2rem } svg text { font: 11px system-ui, sans-serif; fill: #1c2733 } .dim { color: #66788a }
"""
_BAR, _BAR_2 = "#2f6f9f", "#e0a458"
_ROW, _LABEL, _WIDTH = 18, 270, 820


def render_page(report: dict[str, Any]) -> str:
    """The page of a report (`Summary` as a dictionary)."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Cleaning report</title>",
        f"<style>{_STYLE}</style><h1>Cleaning report</h1>",
        f"<p>{report['documents_in']:,} documents in, <b>{report['documents_out']:,} out</b> "
        f"({_share(report['documents_out'], report['documents_in'])}), from {report['files']:,} files: "
        f"{escape(', '.join(report['sources'][:10]))}. {report['bad_lines']:,} bad lines, "
        f"{report['blank_lines']:,} blank ones.</p>",
        _counts(report),
        _removed(report),
        _lengths(report),
        *(_scores(name, bins) for name, bins in report["scores"].items()),
        _clusters(report["clusters"]),
        _examples(report["examples"]),
        "<h2>Settings</h2>",
        _table([(name, str(value)) for name, value in _flat(report["settings"])]),
        "</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _counts(report: dict[str, Any]) -> str:
    rows = [
        ("letters in", f"{report['letters_in']:,}"),
        ("letters after the rules", f"{report['letters_out_of_rules']:,}"),
        ("bytes out", f"{report['bytes_out']:,}"),
        ("texts changed (normalised, lines dropped)", f"{report['changed']:,}"),
    ]
    if report["first_bad_line"]:
        rows.append(("first bad line", report["first_bad_line"]))
    if report["files_not_read"]:
        rows.append(
            (f"files not read, by their names: {report['files_not_read']:,}", ", ".join(report["names_not_read"]))
        )
    if report["columns_left_out"]:
        rows.append(("columns left out, JSON cannot hold them", ", ".join(report["columns_left_out"])))
    return _table(rows)


def _removed(report: dict[str, Any]) -> str:
    if not report["removed"]:
        return "<h2>Removed</h2><p>Nothing.</p>"
    bars = [(rule, [count]) for rule, count in report["removed"].items()]
    return "<h2>Removed, by rule</h2>" + bar_chart(bars, [_BAR])


def _lengths(report: dict[str, Any]) -> str:
    before, after = report["lengths_in"], report["lengths_kept"]
    bars = [
        (_length_label(int(key)), [before.get(key, 0), after.get(key, 0)]) for key in sorted({*before, *after}, key=int)
    ]
    title = "<h2>Lengths of documents, in letters</h2><p class=dim>Blue: as they came. Yellow: kept by the rules.</p>"
    return title + bar_chart(bars, [_BAR, _BAR_2]) if bars else ""


def _length_label(digits: int) -> str:
    return "0" if digits == 0 else f"{2 ** (digits - 1):,} to {2**digits - 1:,}"


def _scores(name: str, bins: Sequence[int]) -> str:
    bars = [(f"{number / 20:.2f} to {(number + 1) / 20:.2f}", [count]) for number, count in enumerate(bins)]
    return f"<h2>{escape(name.capitalize())}: probability of the wanted labels</h2>" + bar_chart(bars, [_BAR])


def _clusters(clusters: dict[str, Any] | None) -> str:
    if clusters is None:
        return ""
    parts = [
        "<h2>Duplicates</h2>",
        f"<p>{clusters['clusters']:,} groups of documents that are the same or nearly so, joined by "
        f"{clusters['pairs']:,} meetings in buckets. The first of each group stays.</p>",
    ]
    if clusters["sizes"]:
        binned: dict[str, int] = {}
        for size, count in clusters["sizes"].items():
            label = size if int(size) < 10 else _length_label(int(size).bit_length())
            binned[label] = binned.get(label, 0) + count
        parts.append("<h3>Sizes of groups</h3>" + bar_chart([(k, [n]) for k, n in binned.items()], [_BAR]))
        parts.append("<h3>Largest groups</h3>")
        for entry in clusters["largest"]:
            parts.append(f"<p>{entry['size']:,} documents; kept: <code>{escape(entry['kept'])}</code></p>")
            if "text" in entry:
                parts.append(f"<pre>{escape(entry['text'])}</pre>")
    return "\n".join(parts)


def _examples(examples: dict[str, list[dict[str, Any]]]) -> str:
    parts = ["<h2>Examples of what was removed</h2>"] if examples else []
    for rule, found in examples.items():
        parts.append(f"<h3>{escape(rule)}</h3>")
        for example in found:
            value = "" if example["value"] is None else f" ({escape(str(example['value']))})"
            parts.append(f"<code>{escape(example['file'])}:{example['line']}</code>{value}")
            parts.append(f"<pre>{escape(example['text'])}</pre>")
            if "kept_text" in example:
                parts.append(f"<p class=dim>beside the one that stays:</p><pre>{escape(example['kept_text'])}</pre>")
    return "\n".join(parts)


def bar_chart(bars: Sequence[tuple[str, Sequence[int]]], colours: Sequence[str]) -> str:
    """Horizontal bars, one group a label, as inline SVG.

    Args:
        bars: label, and a count for each colour.
        colours: of the bars of a group.
    """
    longest = max((count for _, counts in bars for count in counts), default=0) or 1
    height = len(bars) * _ROW + 4
    drawn = [f'<svg width="{_WIDTH}" height="{height}" role="img">']
    thick = (_ROW - 4) / len(colours)
    for row, (label, counts) in enumerate(bars):
        top = row * _ROW + 2
        drawn.append(f'<text x="{_LABEL - 8}" y="{top + 11}" text-anchor="end">{escape(label)}</text>')
        for part, (count, colour) in enumerate(zip(counts, colours, strict=True)):
            width = (_WIDTH - _LABEL - 90) * count / longest
            y = top + part * thick
            drawn.append(f'<rect x="{_LABEL}" y="{y:.1f}" width="{width:.1f}" height="{thick:.1f}" fill="{colour}"/>')
        at = _LABEL + (_WIDTH - _LABEL - 90) * max(counts) / longest + 5
        told = " / ".join(f"{count:,}" for count in counts)
        drawn.append(f'<text x="{at:.1f}" y="{top + 11}">{told}</text>')
    drawn.append("</svg>")
    return "".join(drawn)


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr><td>{escape(k)}<td class=n>{escape(v)}" for k, v in rows) + "</table>"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        flat += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return flat
