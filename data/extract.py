"""From the files of a package to documents: one generator per kind of source, listed in EXTRACTORS.

Each takes (package, path pattern) and yields (unit, text). A unit is a file, a book or a run of ten neighbouring pieces
of one; all documents of a unit end up in the same split. build.py filters the texts for length and language.
"""
import bz2
import collections
import hashlib
import html as htmllib
import json
import re
import struct
import zlib

import yaml
from selectolax.lexbor import LexborHTMLParser

MIN_CHARS, MAX_CHARS, PIECE_CHARS, UNIT_PIECES = 500, 20_000, 6_000, 10


def key(*parts):
    """The place of something in a shuffled order: a hash, so that the order does not depend on anything else."""
    return hashlib.sha1("\0".join(("trommel-quickstart",) + parts).encode("utf8", "replace")).hexdigest()


# ---------------------------------------------------------------------------------------------------------- markup

NAVIGATION = ("script,style,nav,header,footer,form,button,svg,noscript,.headerlink,.sphinxsidebar,.related,.navheader,"
              ".navfooter,#navbar,.nav,.toc,#toc,#tocframe,.nav_table,.navigation,.breadcrumbs,.t-navbar,.editsection,.navbar,"
              ".chlinkbar,.chlinktop,.chlinkbot,.chlinkprevnexttop,.chlinkprevnextbot,.nav_header,.nav_footer,#sidebar,"
              ".sidebar,.footer,#languages")
BLOCK = re.compile(r"</?(p|div|h[1-6]|pre|table|section|ul|ol|dl|blockquote|article|title|page|list|steps|note)\b", re.I)
LINE = re.compile(r"</?(li|tr|dt|dd|br|item|row|title)\b", re.I)
# While a page is parsed, \x01 stands for a break that a tag makes and \x02 for a newline inside <pre>.


def tidy(text):
    if "\n    " in text:                # indentation carries meaning: keep runs of spaces
        text = re.sub(r"[\t\xa0]", " ", text)
    else:
        text = re.sub(r"[ \t\xa0]+", " ", text)
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufffd\u200b\u200e\u200f¶]", "", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" *\n", "\n", text)).strip()


def mark_breaks(markup):
    parts = re.split(r"(?is)(<pre\b.*?</pre>)", markup)
    markup = "".join(p.replace("\n", "\x02") if i % 2 else re.sub(r"\s+", " ", p) for i, p in enumerate(parts))
    markup = LINE.sub(lambda m: "\x01" + m[0], BLOCK.sub(lambda m: "\x01\x01" + m[0], markup))
    return re.sub(r"(?i)</?t[dh]\b", lambda m: " " + m[0], markup)


def unmark_breaks(text):
    text = re.sub(r" *\n *", "\n", re.sub(r" +", " ", text).replace("\x01", "\n"))
    return tidy(text.replace("\x02", "\n"))


def html_text(data):
    tree = LexborHTMLParser(mark_breaks(data.decode("utf8", "replace")))
    if tree.body is None:
        return ""
    for node in tree.body.css(NAVIGATION):
        node.decompose()
    main = tree.css_first("main, [role=main], div.body, #content") or tree.body
    return unmark_breaks(re.sub(r"\x01[^\x01]*\[(Top|Contents)\][^\x01]*", "", main.text()).replace("[source]", ""))


def strip_tags(markup):
    markup = re.sub(r"(?s)<!--.*?-->|<info>.*?</info>", "", markup)
    return unmark_breaks(htmllib.unescape(re.sub(r"<[^>]*>", "", mark_breaks(markup))))


ROFF_INLINE = re.compile(r"\\f\(..|\\f\[.*?\]|\\f.|\\s[-+]?\d|\\[&|/,^c%]|\\\*\(?\w{1,2}|\\m\[.*?\]")
ROFF_CHARS = (("\\-", "-"), ("\\(aq", "'"), ("\\(em", "—"), ("\\(bu", "*"), ("\\(dq", '"'), ("\\ ", " "), ("\\~", " "),
              ("\\(lq", '"'), ("\\(rq", '"'), ("\\(co", "©"), ("\\e", "\\"), ("\\'", "'"), ("\\`", "`"))
ROFF_SECTIONS = {"SH", "SS", "Sh", "Ss"}
ROFF_PARAGRAPHS = set("PP P LP Pp TP IP It sp nf fi Bl El Bd Ed br".split())
ROFF_WORDS = set("B I BR IR RB RI BI IB SM Nm Fn Fa Xr Ar Fl Va Dv Pa Er Em Sy Nd Vt In Dq Sq Ql Li Cm Cd Ft Tn Dl Ic Bx Fx "
                 "Op Bq Pq Aq Brq Sx St".split())
ROFF_SILENT = ROFF_WORDS | set("Ns Oo Oc No Xo Xc Po Pc Bo Bc Ao Ac Pf Ap".split())


def man_text(data):
    out, page = [], ""
    for line in data.decode("utf8", "replace").split("\n"):
        line = ROFF_INLINE.sub("", re.sub(r'\\".*', "", line))
        for escape, char in ROFF_CHARS:
            line = line.replace(escape, char)
        macro = re.match(r"[.']\s*(\w+)\s*(.*)", line)
        if not macro:
            out.append("" if line[:1] in (".", "'") else line)
            continue
        name, words = macro[1], macro[2].replace('"', "")
        # A macro's arguments may name further macros: `.Op Fl v Ar file`.
        words = " ".join(w for w in words.split() if w not in ROFF_SILENT)
        words = re.sub(r" ([.,;:)])(?= |$)", r"\1", words)
        if name == "Nm":                # without an argument it repeats the name of the page
            page = page or words
            words = words if re.match(r"\w", words) else f"{page}{words}"
        if name in ROFF_SECTIONS:
            out += ["\n", words.capitalize(), "\n"]
        elif name in ROFF_PARAGRAPHS:
            out += ["\n", words if name in ("IP", "It") else ""]
        elif name in ROFF_WORDS:
            out.append(words)
    return tidy(re.sub(r"(?<!\n)\n(?!\n)", " ", re.sub(r"\n{2,}", "\n\n", "\n".join(out))))


def wiki_text(markup):
    text = re.sub(r"(?s)<ref[^>/]*/>|<ref.*?</ref>|<!--.*?-->|<(math|gallery|table).*?</\1>", "", htmllib.unescape(markup))
    for nested in (r"\{\{[^{}]*\}\}", r"\{\|[^{}]*?\|\}", r"\[\[(?:File|Image|Category|[a-z-]{2,10}):[^\[\]]*\]\]"):
        while (shorter := re.sub(nested, "", text)) != text:
            text = shorter
    text = re.sub(r"\[\[(?:[^|\[\]]*\|)?([^\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[\w+://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"(?m)'{2,}|<[^>]+>|^[*#:;]+ *", "", text)
    return tidy(re.sub(r"(?m)^=+ *(.*?) *=+$", r"\n\1\n", text))


# ------------------------------------------------------------------------------------------------------- splitting

def split(text, size=PIECE_CHARS):
    """Pieces of about `size` characters, cut at paragraphs, else at lines, else at sentences."""
    if len(text) <= size * 1.5:
        return [text]
    count = round(len(text) / size)
    for separator in ("\n\n", "\n", ". "):
        parts = text.split(separator)
        if max(map(len, parts)) < MAX_CHARS - size:
            return group(parts, len(text) / count, separator)
    return [text[i:i + size] for i in range(0, len(text), size)]


def group(items, size, separator="\n\n"):
    """Joins neighbouring items into documents of at least `size` characters; what is left over joins the last one."""
    docs, pending, chars = [], [], 0
    for item in items:
        pending.append(item)
        chars += len(item) + len(separator)
        if chars >= size:
            docs.append(separator.join(pending))
            pending, chars = [], 0
    rest = separator.join(pending)
    if docs and len(docs[-1]) + len(rest) < MAX_CHARS:
        docs[-1] = (docs[-1] + separator + rest).strip()
    elif rest:
        docs.append(rest)
    return docs


def units(name, docs):
    for i, doc in enumerate(docs):
        yield f"{name}#{i // UNIT_PIECES}", doc


# ------------------------------------------------------------------------------------------------------ extractors

def pages(convert):
    """One document per file, less the lines that recur in over 30 % of the files (navigation, footers)."""
    def run(package, pattern):
        texts = [(name, convert(data)) for name, data in package.files(pattern)]
        lines = collections.Counter(line for _, text in texts for line in set(text.split("\n")) if line)
        frequent = {line for line, n in lines.items() if n > max(5, 0.3 * len(texts))}
        for name, text in texts:
            text = tidy("\n".join(line for line in text.split("\n") if line not in frequent))
            yield from units(name, split(text))
    return run


def sword(package, pattern):
    """A Bible text or commentary: compressed blocks (.bzz), their index (.bzs) and the place of each verse (.bzv)."""
    for name, packed in package.files(pattern):
        index, places = package.read(name[:-1] + "s"), package.read(name[:-1] + "v")
        blocks = [zlib.decompress(packed[at:at + n]) if n else b"" for at, n, _ in struct.iter_unpack("<III", index)]
        layout = "<IIH" if name.endswith("bzz") else "<III"
        verses = {}
        for block, at, n in struct.iter_unpack(layout, places[:len(places) // struct.calcsize(layout) * struct.calcsize(layout)]):
            if n:
                text = re.sub(r"(?s)<note.*?</note>", " ", blocks[block][at:at + n].decode("utf8", "replace"))
                text = re.sub(r"\s+", " ", strip_tags(text))
                verses[re.sub(r"\s+([,.;:?!])", r"\1", text).strip()] = None    # one comment may serve several verses
        yield from units(name, (piece for doc in group(verses, 2500, "\n") for piece in split(doc)))


def rdata(package, pattern):
    """The character vectors of an R lazy-load database."""
    for name, data in package.files(pattern):
        while len(data) > 4:
            stream = zlib.decompressobj()
            raw, data = stream.decompress(data[4:]), stream.unused_data
            lines = [raw[m.end():m.end() + struct.unpack(">I", m[1])[0]].decode("utf8", "replace")
                     for m in re.finditer(rb"\x00\x04\x00\x09(....)", raw, re.S)]
            yield from units(f"{name} {len(data)}", split(tidy("\n".join(lines))))


def gutenberg(wanted):
    """The books in one file of Project Gutenberg texts, without the project's own header and licence."""
    def run(package, pattern):
        book = r"(?s)\*\*\* ?START OF (.*?)\*\*\*(.*?)(?:\nEnd of (?:the )?Project|\*\*\* ?END OF)"
        for _, data in package.files(pattern):
            for m in re.finditer(book, data.decode("utf8", "replace")):
                if wanted(m[1]):
                    yield from units(m[1], (t for t in split(tidy(m[2])) if "Gutenberg" not in t))
    return run


def entries(separator, clean=lambda text: text):
    """The entries of a file, joined to documents."""
    def run(package, pattern):
        for name, data in package.files(pattern):
            items = (tidy(clean(item)) for item in re.split(separator, data.decode("utf8", "replace")))
            yield from units(name, (piece for doc in group(filter(None, items), 1500) for piece in split(doc)))
    return run


def gcide_entry(text):
    return re.sub(r"\s*\[[^\]]*(Webster|WordNet|PJC|Century)[^\]]*\]|\\[^\\\n]*\\,?|\([^()]*\[[^()]*\)|[{}]", "", text)


def dict_entry(text):
    return re.sub(r"[{}]|\(\d{4}-\d\d-\d\d\)", "", text)


def strings(regex):
    """The sentences among the quoted strings of a game's data files."""
    def run(package, pattern):
        for name, data in package.files(pattern):
            found = (m[1] for m in re.finditer(regex, data.decode("utf8", "replace")))
            # Wesnoth marks the context of a translation with a caret: `female^I am tired.`
            found = (" ".join(strip_tags(re.sub(r"^[\w ]+\^", "", s.replace('""', '"'))).split()) for s in found)
            items = [s for s in dict.fromkeys(found) if len(s) > 40]
            yield from units(name, (piece for doc in group(items, 2500, "\n") for piece in split(doc)))
    return run


def scap(package, pattern):
    """The rules of a security guide: title, description, rationale and warning; one copy if products share a rule.

    The hundreds of rules about one SELinux boolean each, which differ in a name only, are left out.
    """
    rules = {}
    for _, data in package.files(pattern):
        rule = r"(?s)<xccdf-1.2:(?:Rule|Group) .*?(?=<xccdf-1.2:(?:Rule|Group) |\Z)"
        for markup in re.findall(rule, data.decode("utf8", "replace")):
            parts = re.findall(r"(?s)<xccdf-1.2:(title|description|rationale|warning)[^>]*>(.*?)</xccdf-1.2:\1>", markup)
            text = "\n\n".join(filter(None, (strip_tags(part) for _, part in parts)))
            if "SELinux Boolean\n" not in text:
                rules.setdefault(text[:120], text)
    yield from units("rules", (piece for doc in group(rules.values(), 1200, "\n\n\n") for piece in split(doc)))


def ansible(package, pattern):
    def text(value):
        return " ".join(map(str, value)) if isinstance(value, list) else str(value or "")

    for name, data in package.files(pattern):
        block = re.search(r"(?sm)^DOCUMENTATION\s*=\s*r?(\"\"\"|''')(.*?)\1", data.decode("utf8", "replace"))
        try:
            doc = yaml.load(block[2], getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if block else None
        except yaml.YAMLError:
            continue
        if not isinstance(doc, dict):
            continue
        options = doc.get("options") if isinstance(doc.get("options"), dict) else {}
        lines = [f"{doc.get('module', doc.get('name'))} - {doc.get('short_description')}", text(doc.get("description"))]
        lines += [f"{k}: {text(v.get('description'))}" for k, v in options.items() if isinstance(v, dict)]
        lines.append(text(doc.get("notes")))
        yield from units(name, split(re.sub(r"\b[BCILMUOV]\(([^()]*)\)", r"\1", tidy("\n".join(lines)))))


def aws(package, pattern):
    """The `documentation` strings of service descriptions, each with the name of what it describes."""
    def walk(node, name, out):
        for k, v in node.items() if isinstance(node, dict) else ((name, x) for x in node):
            if k == "documentation" and isinstance(v, str):
                out.setdefault(v, f"{name}: {' '.join(strip_tags(v).split())}")
            elif isinstance(v, (dict, list)):
                walk(v, name if k in ("shapes", "operations", "members", "member") else k, out)
        return out

    seen = set()
    for name, data in package.files(pattern):
        found = {k: v for k, v in walk(json.loads(data), "", {}).items() if k not in seen and len(v) > 60}
        seen.update(found)
        yield from units(name, (piece for doc in group(found.values(), 2500) for piece in split(doc)))


def mediawiki(package, pattern):
    """Wikipedia articles; the title heads every piece, as its licence asks for the article to be named."""
    for _, data in package.files(pattern):
        xml = bz2.decompress(data).decode("utf8", "replace")
        for title, text in re.findall(r"(?s)<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", xml):
            if not text.upper().startswith("#REDIRECT") and ":" not in title:
                yield from units(title, (f"{title}\n\n{piece}" for piece in split(wiki_text(text), 4000)))


EXTRACTORS = {
    "html": pages(html_text),
    "mallard": pages(lambda data: strip_tags(data.decode("utf8", "replace"))),
    "man": pages(man_text),
    "sword": sword,
    "rdata": rdata,
    "books": gutenberg(lambda title: "SURGERY" not in title),
    "surgery": gutenberg(lambda title: "SURGERY" in title),
    "gcide": entries(r"\n\n(?=\S)", gcide_entry),
    "dict": entries(r"\n\n(?=\S)", dict_entry),
    "crawl": entries(r"%%%%", lambda text: re.sub(r"(?m)^(#.*|__.*)\n", "", text)),
    "wesnoth": strings(r'(?s)_ ?"((?:[^"]|"")*)"'),
    "endless_sky": strings(r"(?s)`([^`]*)`"),
    "scap": scap,
    "ansible": ansible,
    "aws": aws,
    "mediawiki": mediawiki,
}
