"""A check of a data set as one page that needs no other file: opened in a browser, it shows everything."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from string import Template
from typing import Any, Final

from check_captions import split_caption
from check_result import CheckResult
from check_terminal import length_bins, megabytes, plural, steps_text
from PIL import Image

from ldm.data.image_transform import Placement, read_training_bytes
from ldm.data.inspection import KINDS, Finding, printable
from ldm.data.picture_header import PictureHeader, map_in_threads

THUMBNAIL_PIXELS: Final = 200
"""Longer side of a thumbnail."""

SMALL_PIXELS: Final = 8_000_000
"""Pixels of the pictures that are decoded several at a time; of larger ones it is one."""

MOST_PIXELS: Final = 64_000_000
"""Pixels of the largest picture that is shown, for what decoding one takes."""

THUMBNAILS_A_KIND: Final = 24
"""Pictures shown for each kind of finding; the others are only named."""

NAMED_A_KIND: Final = 1000
"""Paths named for each kind of finding; --json has all."""

THUMBNAILS_A_FOLDER: Final = 8
FOLDERS_WITH_THUMBNAILS: Final = 40
MOST_CUT: Final = 24
ROWS: Final = 500

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c1f23; --soft: #5b6470; --line: #d8dde3; --page: #f6f7f9; --card: #fff;
  --bar: #4a7fb5; --error: #b3261e; --warning: #8a5a00; --note: #2f6690; --good: #2e7d32; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #9aa4b0; --line: #39414b; --page: #15181c;
  --card: #1d2126; --bar: #6a9fd4; --error: #ff8a80; --warning: #ffca6b; --note: #8ec5f0; --good: #81c784; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .7rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); }
.cards { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .55rem .9rem; }
.card b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.error { color: var(--error); } .warning { color: var(--warning); } .note { color: var(--note); }
.good { color: var(--good); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { font-weight: 600; color: var(--soft); }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.bar { display: inline-block; height: .7rem; background: var(--bar); border-radius: 2px; vertical-align: baseline; }
td.wide { width: 40%; text-align: left; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: .5rem 0;
  padding: .5rem .9rem; }
summary { cursor: pointer; font-weight: 600; } summary span { font-weight: 400; }
.pictures { display: flex; flex-wrap: wrap; gap: .8rem; margin: .8rem 0; }
figure { margin: 0; width: 200px; font-size: .8rem; line-height: 1.35; overflow-wrap: anywhere; }
.frame { position: relative; width: fit-content; line-height: 0; border: 1px solid var(--line); overflow: hidden; }
.frame img { display: block; max-width: 198px; }
.crop { position: absolute; outline: 400px solid rgba(0, 0, 0, .55); border: 1px solid #fff; }
.gone { width: 120px; height: 80px; border: 1px dashed var(--line); color: var(--soft); display: grid;
  place-items: center; }
.pair { display: flex; gap: .3rem; } figure.wide { width: 408px; }
ul { margin: .5rem 0; padding-left: 1.2rem; } li { overflow-wrap: anywhere; margin: .15rem 0; }
kbd, s { font: inherit; border-bottom: 1px solid var(--line); } s { color: var(--error); }
code { font: .85em ui-monospace, Consolas, monospace; }
.words span { display: inline-block; margin: 0 .9rem .2rem 0; }
"""

PAGE: Final = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body>
$body
</body>
</html>
""")

Bar = Callable[[str, int], Any]


def write_report(result: CheckResult, path: str, bar: Bar) -> None:
    """Write a check as a page.

    Args:
        result: the check.
        path: the file to write.
        bar: makes a progress bar from what it counts and how many there are.

    Raises:
        OSError: the file cannot be written.
    """
    page = _Page(result)
    with bar("thumbnails", len(page.wanted)) as shown:
        page.read_thumbnails(shown.update)
    text = page.text()
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def escape(text: str) -> str:
    """Write any text, such as a file's name, so that a browser shows it and does nothing else with it."""
    return html.escape(printable(text), quote=True)


def thumbnail_uri(path: str, header: PictureHeader) -> str | None:
    """Read a picture as a small JPEG within the page.

    Args:
        path: the picture.
        header: its header.

    Returns:
        A ``data:`` address; None where the picture cannot be decoded.
    """
    scale = min(1.0, THUMBNAIL_PIXELS / max(header.width, header.height))
    size = (max(1, round(header.width * scale)), max(1, round(header.height * scale)))
    whole = Placement(size, (0.0, 0.0, float(header.width), float(header.height)), flip=False)
    try:
        pixels = read_training_bytes(path, whole, "bucket", Image.Resampling.BICUBIC)
    except OSError:
        return None
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


class _Page:
    """The page in the making."""

    def __init__(self, result: CheckResult) -> None:
        self.result = result
        self.captions = {picture.path: picture.caption for picture in result.pictures}
        self.kinds = [
            (severity, kind, list(members))
            for (severity, kind), members in groupby(result.findings, key=lambda one: (one.severity, one.kind))
        ]
        self.samples = self._samples()
        cut = sorted(result.fates, key=lambda path: (-result.fates[path].cropped, path))
        self.most_cut = [path for path in cut[:MOST_CUT] if result.fates[path].cropped >= 0.01]
        shown = [
            path
            for _, _, members in self.kinds
            for one in members[:THUMBNAILS_A_KIND]
            for path in (one.path, *one.others)
        ]
        shown += [path for paths in self.samples.values() for path in paths] + self.most_cut
        self.wanted = [path for path in dict.fromkeys(shown) if isinstance(result.headers.get(path), PictureHeader)]
        self.thumbnails: dict[str, str] = {}

    def _samples(self) -> dict[str, list[str]]:
        """Choose pictures of each folder, evenly from its first to its last."""
        by_folder: dict[str, list[str]] = {}
        for picture in self.result.pictures:
            if picture.path in self.result.fates:
                by_folder.setdefault(picture.folder, []).append(picture.path)
        return {
            folder: paths[:: max(1, -(-len(paths) // THUMBNAILS_A_FOLDER))]
            for folder, paths in list(by_folder.items())[:FOLDERS_WITH_THUMBNAILS]
        }

    def read_thumbnails(self, progress: Callable[[int], object]) -> None:
        """Read the pictures that are going to be shown, a few at a time."""

        def read(path: str) -> str | None:
            header = self.result.headers[path]
            return thumbnail_uri(path, header) if isinstance(header, PictureHeader) else None

        sizes = {path: _pixels(self.result.headers[path]) for path in self.wanted}
        small = [path for path in self.wanted if sizes[path] <= SMALL_PIXELS]
        large = [path for path in self.wanted if SMALL_PIXELS < sizes[path] <= MOST_PIXELS]
        for paths, threads in ((small, min(8, os.cpu_count() or 1)), (large, 1)):
            for path, uri in map_in_threads(read, paths, threads):
                if uri is not None:
                    self.thumbnails[path] = uri
                progress(1)

    def text(self) -> str:
        """Put the page together."""
        parts = [
            self._head(),
            self._findings(),
            self._folders(),
            self._buckets(),
            self._captions(),
            self._most_cut(),
            self._gallery(),
        ]
        title = f"data set {escape(self.result.settings.data_root)}"
        return PAGE.substitute(title=title, style=STYLE, body="\n".join(part for part in parts if part))

    def _head(self) -> str:
        result, settings = self.result, self.result.settings
        verdict = {
            0: ("good", "Clean"),
            1: ("warning", "Look at the warnings before you train"),
            2: ("error", "Training would refuse or lose something"),
        }[result.status]
        counts = result.counts
        cards = [
            (f"{len(result.pictures):,}", "pictures"),
            (megabytes(result.file_bytes), "in files"),
            (f"{result.steps.training[0]:,}" if result.steps else "none", "steps an epoch"),
            *((f"{counts[severity]:,}", f"{severity}s") for severity in counts),
        ]
        size = "each picture's own size" if settings.size is None else f"size {settings.size}"
        bases = ", ".join(escape(base) for base in settings.bases)
        return "\n".join(
            [
                f"<h1>{escape(settings.data_root)}</h1>",
                f'<p class="{verdict[0]}"><b>{verdict[1]}</b></p>',
                '<div class="cards">',
                *(f'<div class="card"><b>{value}</b>{name}</div>' for value, name in cards),
                "</div>",
                f"<p>{escape(steps_text(result))}</p>",
                f'<p class="soft">Checked for {size}, resize_mode {escape(settings.resize_mode)}, crop '
                f"{escape(settings.crop)}, repeats {settings.repeats}, batch size {settings.batch_size}: the values "
                f"of {bases}{' (shipped; name your own with --base)' if settings.assumed else ''}.",
                "Every pixel was decoded.</p>" if result.decoded else "Pixels were not decoded (--decode).</p>",
            ]
        )

    def _findings(self) -> str:
        if not self.kinds:
            return "<h2>Findings</h2><p>None.</p>"
        parts = ["<h2>Findings</h2>"]
        for severity, kind, members in self.kinds:
            opened = " open" if severity != "note" else ""
            parts.append(
                f'<details{opened}><summary><span class="{severity}">{severity}</span> '
                f"{html.escape(KINDS[kind].title)} <span>({len(members):,})</span></summary>"
            )
            remedies = {one.remedy for one in members}
            if len(remedies) == 1:
                parts.append(f'<p class="soft">What to do: {escape(self.result.without_root(remedies.pop()))}.</p>')
            shown = [one for one in members[:THUMBNAILS_A_KIND] if isinstance(self._header(one.path), PictureHeader)]
            parts.append('<div class="pictures">' + "".join(map(self._finding, shown)) + "</div>" if shown else "")
            pictured = {id(one) for one in shown}
            named = [one for one in members[:NAMED_A_KIND] if id(one) not in pictured]
            parts.append("<ul>" + "".join(map(self._line, named)) + "</ul>" if named else "")
            if len(members) > NAMED_A_KIND:
                parts.append(f"<p>… and {len(members) - NAMED_A_KIND:,} more (--json names all)</p>")
            parts.append("</details>")
        return "\n".join(part for part in parts if part)

    def _finding(self, one: Finding) -> str:
        frames = "".join(self._frame(path, with_crop=False) for path in (one.path, *one.others))
        name = escape(self.result.below_root(one.path))
        wide = ' class="wide"' if one.others else ""
        return (
            f'<figure{wide}><div class="pair">{frames}</div><figcaption><code>{name}</code><br>'
            f"{escape(self.result.without_root(one.reason))}</figcaption></figure>"
        )

    def _line(self, one: Finding) -> str:
        reason = f": {escape(self.result.without_root(one.reason))}" if one.reason else ""
        return f"<li><code>{escape(self.result.below_root(one.path))}</code>{reason}</li>"

    def _header(self, path: str) -> PictureHeader | str | None:
        return self.result.headers.get(path)

    def _frame(self, path: str, with_crop: bool = True) -> str:
        """Show a picture, with what training cuts away in the shade."""
        uri = self.thumbnails.get(path)
        if uri is None:
            return '<div class="gone">not shown</div>'
        crop = ""
        fate, header = self.result.fates.get(path), self._header(path)
        if with_crop and fate is not None and fate.cropped >= 0.01 and isinstance(header, PictureHeader):
            left, top, right, bottom = fate.box
            crop = (
                f'<div class="crop" style="left:{100 * left / header.width:.2f}%;top:{100 * top / header.height:.2f}%;'
                f"width:{100 * (right - left) / header.width:.2f}%;"
                f'height:{100 * (bottom - top) / header.height:.2f}%"></div>'
            )
        return f'<div class="frame"><img src="{uri}" alt="">{crop}</div>'

    def _figure(self, path: str) -> str:
        fate, header = self.result.fates[path], self._header(path)
        assert isinstance(header, PictureHeader)
        facts = f"{header.width}x{header.height} → {fate.size[0]}x{fate.size[1]}"
        if fate.cropped >= 0.01:
            facts += f", {fate.cropped:.0%} cut away"
        name = escape(self.result.below_root(path))
        pieces = split_caption(self.captions[path])
        room = self.result.tokens.room
        tokens = " ".join(
            f"<{'s' if number >= room else 'kbd'}>{escape(piece)}</{'s' if number >= room else 'kbd'}>"
            for number, piece in enumerate(pieces)
        )
        return (
            f"<figure>{self._frame(path)}<figcaption>{tokens or '<i>empty caption</i>'} "
            f'<span class="soft">({plural(len(pieces), "token")})<br><code>{name}</code><br>{facts}'
            "</span></figcaption></figure>"
        )

    def _folders(self) -> str:
        rows = [
            [
                escape(row.folder) + (' <span class="soft">ground truth</span>' if row.is_ground_truth else ""),
                f"{row.pictures:,}",
                megabytes(row.file_bytes),
                f"{float(row.settings.multiply):g}",
                f"{float(row.exposures):,.6g}",
                f"{row.share:.1%}",
                _bar(row.share / (max(other.share for other in self.result.folders) or 1)),
            ]
            for row in self.result.folders
        ]
        head = ["folder", "pictures", "size", "multiply", "shown an epoch", "share", ""]
        balance = self.result.balance()
        said = ""
        if balance is not None:
            ratio = float(balance[1] / balance[0])
            said = f"<p>For 1 new picture an epoch shows {ratio:.2g} of ground truth.</p>"
        return f"<h2>Folders</h2>{_table(head, rows)}{said}"

    def _buckets(self) -> str:
        if not self.result.buckets:
            return ""
        batches: Mapping[tuple[int, int], int] = self.result.steps.batches if self.result.steps else {}
        most = max(row.pictures for row in self.result.buckets)
        rows = [
            [
                f"{row.size[0]}x{row.size[1]}",
                f"{row.pictures:,}",
                f"{batches[row.size]:,}" if row.size in batches else "–",
                f"{row.cropped:.1%}",
                f"{row.most_cropped:.1%}",
                f"{row.upscaled:,}",
                _bar(row.pictures / most),
            ]
            for row in self.result.buckets
        ]
        head = ["trained at", "pictures", "batches", "cut away", "at most", "enlarged", ""]
        return f"<h2>What becomes of the pictures</h2>{_table(head, rows)}"

    def _captions(self) -> str:
        figures, room = self.result.captions, self.result.tokens.room
        if not figures.lengths:
            return ""
        names = {"txt": ".txt files", "caption": ".caption files", "jsonl": "lists (.jsonl)", "file name": "file names"}
        sources = ", ".join(f"{count:,} from {names.get(name, name)}" for name, count in figures.sources.items())
        bins = length_bins(self.result)
        most = max(count for _, count in bins)
        rows = [[name, f"{count:,}", _bar(count / most)] for name, count in bins]
        words = "".join(f"<span>{escape(word)} <b>{count:,}</b></span>" for word, count in figures.words)
        split = "".join(
            f"<span>{escape(word)} <b>{count:,}</b></span>" for word, count in self.result.tokens.split[:20]
        )
        shared = "".join(
            f"<li>{escape(caption) or '<i>empty</i>'}: {n:,} pictures</li>" for caption, n in figures.shared
        )
        return (
            f"<h2>Captions</h2><p>{figures.different:,} different ({sources}). Tokens: median "
            f"{figures.percentile(0.5)}, 95% within {figures.percentile(0.95)}, longest {max(figures.lengths)}; the "
            f"text encoder takes {room}.</p>{_table(['tokens', 'pictures', ''], rows)}"
            f'<p class="words"><b>Most frequent words:</b> {words}</p>'
            + (f'<p class="words"><b>Words of several tokens:</b> {split}</p>' if split else "")
            + (f"<details><summary>Captions of several pictures</summary><ul>{shared}</ul></details>" if shared else "")
        )

    def _most_cut(self) -> str:
        if not self.most_cut:
            return ""
        return f'<h2>Where most is cut away</h2><div class="pictures">{self._figures(self.most_cut)}</div>'

    def _gallery(self) -> str:
        parts = ["<h2>Samples</h2>"] if self.samples else []
        for folder, paths in self.samples.items():
            parts.append(f'<h3>{escape(folder)}</h3><div class="pictures">{self._figures(paths)}</div>')
        if len(self.result.folders) > FOLDERS_WITH_THUMBNAILS:
            parts.append(f"<p>… and {len(self.result.folders) - FOLDERS_WITH_THUMBNAILS:,} more folders</p>")
        return "\n".join(parts)

    def _figures(self, paths: Iterable[str]) -> str:
        return "".join(map(self._figure, paths))


def _pixels(header: PictureHeader | str) -> int:
    return header.width * header.height if isinstance(header, PictureHeader) else 0


def _bar(share: float) -> str:
    return f'<span class="bar" style="width:{100 * share:.1f}%"></span>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table whose cells are escaped already; a last column without a name holds bars."""
    wide = ' class="wide"' if not head[-1] else ""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{cell}</{tag}>" for cell in row[:-1]) + f"<{tag}{wide}>{row[-1]}</{tag}>"

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows[:ROWS])
    more = f"<p>… and {len(rows) - ROWS:,} more (--json names all)</p>" if len(rows) > ROWS else ""
    return f'<div class="scroll"><table><tr>{cells(head, "th")}</tr>{body}</table></div>{more}'
