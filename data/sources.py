"""The packages that the quickstart data is taken from, and how much of each.

Every source must allow redistribution; its licence is the one that the package itself states for the files we read.
Left out on purpose: texts with an unclear licence (news, quotations, modern translations, licence texts).
"""
from typing import NamedTuple


class Source(NamedTuple):
    domain: str     # value of the column `source`
    registry: str   # `deb` or `pypi`
    package: str
    version: str
    extractor: str  # a key of extract.EXTRACTORS
    pattern: str    # regular expression: paths of the files to read
    chars: int      # at most about this many characters of text are kept
    licence: str    # of the text


# The shipped domains: each has a `train` and a `test` split. `security` is kept out of the corpus altogether: it stands
# for the case in which the corpus has nothing of the wanted kind.
SPLIT = ("database", "literature", "politics", "religion", "security")
ABSENT = ("security",)

TEST_CHARS = 300_000
TRAIN_CHARS = 1_000_000
DOMAIN_CHARS = 4_500_000    # at most this much of one domain in the corpus

MB = 1_000_000


def wesnoth(part):
    return Source("games", "deb", f"wesnoth-1.16-{part}", "1:1.16.9-1", "wesnoth", r"/data/.*\.cfg$", 9 * MB, "GPL-2+")


SOURCES = [
    Source("cloud", "pypi", "botocore", "1.44.5", "aws", r"/service-2\.json(\.gz)?$", 5 * MB, "Apache-2.0"),
    Source("cpp", "deb", "cppreference-doc-en-html", "20170409-2", "html", r"/en/.*\.html$", 3 * MB,
           "CC-BY-SA-3.0 or GFDL"),
    Source("cpp", "deb", "c++-annotations-html", "12.2.0-2", "html", r"\.html$", 3 * MB, "GPL-2+"),
    Source("database", "deb", "sqlite3-doc", "3.40.1-2+deb12u2", "html", r"\.html$", 5 * MB, "public domain"),
    Source("database", "deb", "postgis-doc", "3.3.2+dfsg-1", "html", r"\.html$", 3 * MB, "CC-BY-SA-3.0"),
    Source("desktop", "deb", "gimp-help-en", "2.10.34-2", "html", r"/en/.*\.html$", 3 * MB, "GFDL-1.2+"),
    Source("desktop", "deb", "gnome-user-docs", "43.0-2", "mallard", r"/help/C/.*\.page$", 3 * MB, "CC-BY-SA-3.0"),
    Source("desktop", "deb", "gnucash-docs", "4.13-1", "html", r"/gnucash-(help|guide)-en/.*\.html$", 3 * MB,
           "GFDL-1.1+"),
    Source("desktop", "deb", "kicad-doc-en", "6.0.11+dfsg-1", "html", r"/en/.*\.html$", 3 * MB, "GPL-2+ or CC-BY-SA-3.0"),
    Source("devops", "deb", "ansible", "7.7.0+dfsg-3+deb12u1", "ansible", r"/plugins/(?!.*(fmgr|fortios|faz)_).*\.py$", 3 * MB, "GPL-3+"),
    Source("dictionary", "deb", "dict-gcide", "0.48.5+nmu2", "gcide", r"gcide\.dict\.dz$", 2 * MB, "GPL-2+"),
    Source("dictionary", "deb", "dict-foldoc", "20230119-1", "dict", r"foldoc\.dict\.dz$", 2 * MB, "GFDL-1.1+"),
    Source("dictionary", "deb", "dict-jargon", "4.4.7-3.1", "dict", r"jargon\.dict\.dz$", 2 * MB, "public domain"),
    Source("dictionary", "deb", "dict-devil", "1.0-13.1", "dict", r"devil\.dict\.dz$", 2 * MB, "public domain"),
    *map(wesnoth, ("data", "did", "dm", "dw", "ei", "httt", "l", "low", "nr", "sof", "sota", "sotbe", "thot", "trow", "tsg",
                   "ttb", "utbs")),
    Source("games", "deb", "endless-sky-data", "0.9.8-1.2", "endless_sky", r"/data/.*\.txt$", 9 * MB, "GPL-3+"),
    Source("games", "deb", "crawl-common", "2:0.28.0-1.1", "crawl", r"/dat/descript/(?!quotes|commands|hints|tutorial)[^/]*\.txt$", 9 * MB, "GPL-2+"),
    Source("literature", "deb", "r-cran-janeaustenr", "1.0.0-1", "rdata", r"data/Rdata\.rdb$", 4 * MB,
           "public domain (texts)"),
    Source("literature", "pypi", "scancode-toolkit-mini", "32.5.0", "books", r"gibberish/big\.txt$", 5 * MB,
           "public domain (texts)"),
    Source("manuals", "deb", "freebsd-manpages", "12.2-1", "man", r"/man/man\d/", 5 * MB, "BSD-2-Clause, BSD-4-Clause"),
    Source("math", "deb", "sagemath-doc", "9.5-6", "html", r"/html/en/(?!.*(_modules|genindex)).*\.html$", 2 * MB,
           "CC-BY-SA-3.0, GPL-2+"),
    Source("math", "deb", "gap-doc", "4.12.1-2", "html", r"/doc/(ref|tut|hpc)/.*\.html$", 2 * MB, "GPL-2+"),
    Source("math", "deb", "python-sympy-doc", "1.11.1-1", "html", r"/html/(?!_modules|genindex).*\.html$", 2 * MB,
           "BSD-3-Clause"),
    Source("medicine", "pypi", "scancode-toolkit-mini", "32.5.0", "surgery", r"gibberish/big\.txt$", 3 * MB,
           "public domain (text)"),
    Source("music", "deb", "lilypond-doc-html", "2.24.1-2", "html",
           r"Documentation/(notation|learning|usage|extending|essay|music-glossary|changes|contributor)/[^.]*(\.en)?\.html$",
           9 * MB, "GFDL-1.3+"),
    Source("politics", "deb", "anarchism", "15.3-3", "html", r"/html/.*\.html$", 9 * MB, "GPL-2"),
    Source("politics", "deb", "cfi-en", "3.0-10.2", "html", r"\.html?$", 3 * MB, "public domain"),
    Source("python", "deb", "python-scipy-doc", "1.10.1-2", "html", r"/html/(?!_modules|genindex).*\.html$", 3 * MB,
           "BSD-3-Clause"),
    Source("python", "deb", "python-astropy-doc", "5.2.1-2+deb12u1", "html", r"/html/(?!_modules|genindex).*\.html$",
           3 * MB, "BSD-3-Clause"),
    Source("religion", "deb", "sword-comm-tdavid", "2.1-1", "sword", r"\.czz$", 3 * MB, "public domain"),
    Source("religion", "deb", "sword-comm-mhcc", "2.0-1", "sword", r"\.bzz$", 3 * MB, "public domain"),
    Source("religion", "deb", "sword-comm-scofield", "2.1-1", "sword", r"\.bzz$", 3 * MB, "public domain"),
    Source("religion", "deb", "sword-text-web", "426.0-1", "sword", r"\.bzz$", 5 * MB, "public domain"),
    Source("security", "deb", "ssg-debian", "0.1.65-1", "scap", r"xccdf\.xml$", 9 * MB, "BSD-3-Clause"),
    Source("security", "deb", "ssg-debderived", "0.1.65-1", "scap", r"xccdf\.xml$", 9 * MB, "BSD-3-Clause"),
    Source("security", "deb", "ssg-nondebian", "0.1.65-1", "scap", r"xccdf\.xml$", 9 * MB, "BSD-3-Clause"),
    Source("security", "deb", "ssg-applications", "0.1.65-1", "scap", r"xccdf\.xml$", 9 * MB, "BSD-3-Clause"),
    Source("statistics", "deb", "python-sklearn-doc", "1.2.1+dfsg-1", "html", r"/html/(?!_modules|genindex).*\.html$",
           3 * MB, "BSD-3-Clause"),
    Source("statistics", "deb", "r-doc-html", "4.2.2.20221110-2", "html", r"\.html$", 2 * MB, "GPL-2"),
    Source("sysadmin", "deb", "debian-handbook", "11.20220922", "html", r"/html/en-US/.*\.html$", 3 * MB,
           "GPL-2+ or CC-BY-SA-3.0"),
    Source("sysadmin", "deb", "debian-policy", "4.6.2.0", "html", r"/policy[^/]*/.*\.html$", 3 * MB, "GPL-2+"),
    Source("sysadmin", "deb", "developers-reference", "12.18", "html", r"/developers-reference/[^/]*\.html$", 3 * MB, "GPL-2+"),
    Source("sysadmin", "deb", "debian-reference-en", "2.100", "html", r"\.en\.html$", 3 * MB, "GPL-2+"),
    Source("sysadmin", "deb", "debian-edu-doc-en", "2.12.23~deb12u1", "html", r"\.html$", 3 * MB, "GPL-2+"),
    Source("sysadmin", "deb", "abs-guide", "10-4", "html", r"\.html$", 3 * MB, "public domain"),
    Source("sysadmin", "deb", "neutron-doc", "2:21.0.0-7+deb12u1", "html", r"/html/(?!_modules).*\.html$", 2 * MB,
           "Apache-2.0"),
    Source("wikipedia", "pypi", "gensim", "4.4.0", "mediawiki", r"enwiki-.*\.bz2$", 4 * MB, "CC-BY-SA-3.0"),
]
