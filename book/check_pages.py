#!/usr/bin/env python3
"""Looks at the built book in headless Chromium, wide, narrow, light and dark, and lists what a reader would stumble on.

    mdbook build book
    python3 book/check_pages.py book/book

The same for a report of `llama_math`, which must hold the given texts:

    python3 book/check_pages.py target/llama_math/report.html --expect Problems --expect Machine

What it checks: every local link and picture leads somewhere, every header cell of a table has a text, no listing is
indented as a whole or wider than the page of a desktop, no page is wider than a phone of 390 px, the text of a page is
dark on light or light on dark as the theme says, and every picture follows a dark system. A report must follow the
system by itself, take no other file, run no script, and show every picture. It needs Chromium (`--chromium` names it)
and nothing else. Exit code 1 if something is found.
"""
import argparse
import html.parser
import http.server
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import urllib.parse
import zlib

PHONE, DESKTOP = 390, 1400

# Loads every page in a frame of the wanted width and theme, and sends back what it measured.
HARNESS = """<!doctype html><meta charset="utf-8"><body style="margin:0"><script>
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
async function measure(page, width, theme) {
  localStorage.setItem("mdbook-theme", JSON.stringify(theme).replaceAll('"', ""));
  localStorage.setItem("mdbook-sidebar", "hidden");
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:900px;border:0`;
  const loaded = new Promise((done) => frame.onload = done);
  frame.src = page;
  document.body.append(frame);
  await loaded;
  await wait(60);
  const inner = frame.contentDocument;
  const main = inner.querySelector("main");
  const wide = [];
  for (const element of main.querySelectorAll("*")) {
    let holder = element.parentElement, scrolls = false;
    for (; holder && holder !== main; holder = holder.parentElement)
      if (/auto|scroll|hidden/.test(getComputedStyle(holder).overflowX)) { scrolls = true; break; }
    const box = element.getBoundingClientRect();
    if (!scrolls && box.width > 0 && box.right > width + 1)
      wide.push(`<${element.localName}> reaches ${Math.round(box.right)} px: ${element.textContent.trim().slice(0, 60)}`);
  }
  const page_width = Math.max(inner.documentElement.scrollWidth, main.scrollWidth);
  const listings = [...main.querySelectorAll("pre > code")].map((code) => ({
    text: code.textContent, over: code.scrollWidth - code.clientWidth }));
  const colour = (text) => (text.match(/[\\d.]+/g) || []).slice(0, 3).map(Number);
  const body = getComputedStyle(inner.documentElement);
  const drawn = inner.querySelector("svg text");
  const pictures = [...inner.querySelectorAll("svg")].map((svg) => ({
    shown: svg.getBoundingClientRect().width > 0, parts: svg.querySelectorAll("path, rect.cell, circle").length,
    title: svg.querySelector("title")?.textContent || "" }));
  const result = { page, width, theme, page_width, wide, listings, pictures,
    text: inner.body.innerText, title: inner.title, scripts: inner.scripts.length,
    drawn: drawn ? colour(getComputedStyle(drawn).fill) : null,
    ink: colour(getComputedStyle(main.querySelector("p") || main).color), paper: colour(body.backgroundColor),
    empty_headers: [...main.querySelectorAll("th")].filter((cell) => !cell.textContent.trim()).length };
  frame.remove();
  return result;
}
(async () => {
  const { pages, runs } = await (await fetch("/__pages.json")).json();
  const results = [];
  for (const page of pages) for (const [width, theme] of runs) results.push(await measure(page, width, theme));
  await fetch("/__results", { method: "POST", body: JSON.stringify(results) });
})().catch((e) => fetch("/__results", { method: "POST", body: JSON.stringify({ failed: String(e) }) }));
</script>"""


class Page(html.parser.HTMLParser):
    """Links, anchors and pictures of one page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        for name in ("id", "name"):
            if attributes.get(name):
                self.anchors.add(attributes[name])
        target = attributes.get("href") if tag == "a" else attributes.get("src") if tag == "img" else None
        if target:
            self.links.append(target)


def broken_links(folder, names):
    pages = {name: Page(open(os.path.join(folder, name), encoding="utf-8").read()) for name in names}
    for name, page in pages.items():
        for link in page.links:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            path = urllib.parse.unquote(parts.path)
            target = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
            if not os.path.exists(os.path.join(folder, target)):
                yield f"{name}: the link {link} leads nowhere"
            elif parts.fragment and target in pages:
                if urllib.parse.unquote(parts.fragment) not in pages[target].anchors:
                    yield f"{name}: {target} has no anchor for the link {link}"


def in_browser(chromium, folder, pages, runs, flags=()):
    """What the harness measured, page by page, and the files that the browser asked for."""
    results, asked, done = [], set(), threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=folder)

        def log_message(self, *_):
            pass

        def do_GET(self):
            own = {"/__check.html": ("text/html", HARNESS),
                   "/__pages.json": ("application/json", json.dumps({"pages": pages, "runs": runs}))}
            if self.path not in own:
                asked.add(urllib.parse.unquote(self.path.lstrip("/")))
                return super().do_GET()
            kind, text = own[self.path]
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_POST(self):
            results.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            done.set()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = subprocess.Popen(
            [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
             "--remote-debugging-port=0", *flags, f"http://127.0.0.1:{server.server_port}/__check.html"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        finished = done.wait(600)
        browser.terminate()
        browser.wait()
    server.shutdown()
    if not finished or isinstance(results[0], dict):
        sys.exit(f"the browser measured nothing: {results}")
    return results[0], asked


def brightness(png):
    """The mean of all channels of a PNG with 8 bits a channel, 0 to 255, and the shares below 90 and above 165."""
    at, data, channels, width = 8, b"", 4, 0
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at:at + 8])
        body = png[at + 8:at + 8 + length]
        if kind == b"IHDR":
            width, _, _, colour = struct.unpack(">IIBB", body[:10])
            channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
        elif kind == b"IDAT":
            data += body
        at += length + 12
    raw, step = zlib.decompress(data), width * channels
    previous, seen = bytearray(step), [0] * 256
    for start in range(0, len(raw), step + 1):
        row, way = bytearray(raw[start + 1:start + 1 + step]), raw[start]
        for i in range(step):
            left = row[i - channels] if i >= channels else 0
            up, corner = previous[i], previous[i - channels] if i >= channels else 0
            if way == 1:
                row[i] = (row[i] + left) & 255
            elif way == 2:
                row[i] = (row[i] + up) & 255
            elif way == 3:
                row[i] = (row[i] + (left + up) // 2) & 255
            elif way == 4:
                guess = left + up - corner
                distances = [(abs(guess - left), 0, left), (abs(guess - up), 1, up), (abs(guess - corner), 2, corner)]
                row[i] = (row[i] + min(distances)[2]) & 255
        previous = row
        for i in range(step):
            if channels in (1, 3) or i % channels != channels - 1:
                seen[row[i]] += 1
    count = sum(seen)
    return sum(i * n for i, n in enumerate(seen)) / count, sum(seen[:90]) / count, sum(seen[166:]) / count


def picture(chromium, file, dark):
    """The brightness of a picture on the paper of a dark or a light system."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        target = os.path.join(folder, "picture.png")
        scheme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
        subprocess.run([chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile",
                        "--window-size=500,900", "--default-background-color=" + ("1e2024ff" if dark else "ffffffff"), *scheme, f"--screenshot={target}", "file://" + file],
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, timeout=120)
        return brightness(open(target, "rb").read())


def of_page(where, seen, dark):
    """What is wrong with the width, the headers and the colours of a page."""
    if seen["empty_headers"] and seen["width"] == DESKTOP and not dark:
        yield f"{where}: {seen['empty_headers']} header cells without a text"
    if seen["page_width"] > seen["width"] + 1:
        yield f"{where}: the page is {seen['page_width']} px wide"
    for element in seen["wide"][:3]:
        yield f"{where}: {element}"
    dark_page = luminance(seen["paper"]) < 128
    if dark_page != dark or (luminance(seen["ink"]) < 128) == dark_page:
        yield f"{where}: text {seen['ink']} on {seen['paper']}"


def of_report(chromium, file, expected):
    """What is wrong with a report."""
    folder, name = os.path.split(os.path.abspath(file))
    for dark in (False, True):
        theme = "dark" if dark else "light"
        flags = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
        pages, asked = in_browser(chromium, folder, [name], [[PHONE, theme], [DESKTOP, theme]], flags)
        if asked - {name, "favicon.ico"}:
            yield f"{file}: it takes other files: {sorted(asked)}"
        for seen in pages:
            where = f"{file} at {seen['width']} px, {theme}"
            yield from of_page(where, seen, dark)
            if seen["scripts"]:
                yield f"{where}: {seen['scripts']} scripts"
            if not seen["pictures"]:
                yield f"{where}: no picture"
            for picture_of in seen["pictures"]:
                if not (picture_of["shown"] and picture_of["parts"] and picture_of["title"]):
                    yield f"{where}: a picture is not shown, empty or without a title: {picture_of}"
            if seen["drawn"] and (luminance(seen["drawn"]) < 128) == dark:
                yield f"{where}: pictures write in {seen['drawn']}"
            for text in expected:
                if text not in seen["text"]:
                    yield f"{where}: it does not say {text!r}"


def luminance(colour):
    return sum(colour) / 3 if colour else 255


def complaints(chromium, folder):
    names = sorted(os.path.relpath(os.path.join(place, file), folder)
                   for place, _, files in os.walk(folder) for file in files if file.endswith(".html"))
    names = [name for name in names if name not in ("404.html", "print.html", "toc.html", "index.html")]
    # Formulas are parts of pages.
    names = [name for name in names if os.path.dirname(name) != "formulas"]
    yield from broken_links(folder, names)
    for seen in in_browser(chromium, folder, names, [[PHONE, "light"], [DESKTOP, "light"], [DESKTOP, "coal"]])[0]:
        where = f"{seen['page']} at {seen['width']} px, {seen['theme']}"
        yield from of_page(where, seen, seen["theme"] == "coal")
        if seen["width"] == DESKTOP and seen["theme"] == "light":
            for listing in seen["listings"]:
                lines = [line for line in listing["text"].split("\n") if line.strip()]
                first = lines[0].strip() if lines else "nothing"
                if not lines or all(line.startswith(" ") for line in lines):
                    yield f"{where}: the listing of {first!r} is empty or indented"
                if listing["over"] > 1:
                    yield f"{where}: the listing of {first!r} is {listing['over']} px too wide"
    for place, _, files in os.walk(folder):
        for file in sorted(files):
            # The site's own icon has no dark form.
            if file.endswith(".svg") and not file.startswith("favicon") and "fonts" not in place:
                path = os.path.join(place, file)
                mean, _, ink = picture(chromium, path, True)
                if mean > 110 or ink < 0.002:
                    yield f"{os.path.relpath(path, folder)}: on a dark system brightness {mean:.0f}, {ink:.1%} of it bright"
                mean, ink, _ = picture(chromium, path, False)
                if mean < 145 or ink < 0.002:
                    yield f"{os.path.relpath(path, folder)}: on a light system brightness {mean:.0f}, {ink:.1%} of it dark"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("place", help="the folder of the built book, or the file of a report")
    parser.add_argument("--expect", action="append", default=[], help="a text that the report must show")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("chromium-browser") or "chromium")
    options = parser.parse_args()
    is_report = os.path.isfile(options.place)
    if not is_report and not os.path.isfile(os.path.join(options.place, "index.html")):
        sys.exit(f"{options.place}: no report and no index.html; build the book first: mdbook build book")
    if not shutil.which(options.chromium):
        sys.exit(f"{options.chromium}: no such program; install Chromium or name it with --chromium")
    if is_report:
        found = list(of_report(options.chromium, options.place, options.expect))
    else:
        found = list(complaints(options.chromium, os.path.abspath(options.place)))
    print("\n".join(found) or "nothing to complain about")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
