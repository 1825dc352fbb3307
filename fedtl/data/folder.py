"""A folder of images: ``<class>/<image>`` or ``<domain>/<class>/<image>``, or a zip of one."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import numpy as np

from fedtl.data.examples import (
    BadFiles,
    Examples,
    content_fingerprint,
    content_hash,
    data_problems,
)
from fedtl.data.files import Files, open_files, unwrapped
from fedtl.data.images import EXTENSIONS, FileImages
from fedtl.errors import InputError, printable
from fedtl.scenario.schema import Data
from fedtl.types import Int32

TYPO_RATIO = 0.83
"""difflib's similarity of a slip in six letters; of horse and house it is 0.8."""


def load_folder(data: Data, *, one_client: bool = False) -> Examples:
    """Images in class folders; files are sorted by path, classes are the union over domains.

    Hidden files are passed over, files without a known image extension too, but they are counted
    in the notes. The fingerprint is over the bytes of every image and its path. ``data.classes``
    says whether folders of one name in several domains are one class or several; what
    ``data.client_pattern`` finds in each path is its client.
    ``one_client``: a single class will do, others may have more.

    Raises:
        InputError: nothing there, or every problem with the layout at once.
        SecurityRefusal: a link or a member of the archive leads outside.
    """
    if data.path is None:
        raise InputError("missing", where="data.path", do="Name the folder of class folders")
    files = unwrapped(open_files(Path(data.path)), EXTENSIONS, 2 if data.domains else 1)
    paths = [path for path in files.paths if path.lower().endswith(EXTENSIONS)]
    others = len(files.paths) - len(paths)
    paths.sort(key=lambda path: (unicodedata.normalize("NFC", path), path))
    problems = layout_problems(paths, files.folders, data, one_client)
    if problems:
        raise data_problems(str(files.root), problems)
    paths, digests, left_out = readable(files, paths, data, "image")
    notes = []
    if others:
        notes.append(f"{others} files without a known image extension were passed over")
    return build_examples(files, paths, digests, data, (*notes, *left_out))


def readable(
    files: Files, paths: list[str], data: Data, what: str
) -> tuple[list[str], bytes, tuple[str, ...]]:
    """The paths whose files can be read, a digest of all their bytes, and what is told of the rest.

    Args:
        what: one of them is, for messages.

    Raises:
        InputError: files that cannot be read where that shall stop, or nothing but such files.
    """
    digests, unreadable = hash_files(files.read, paths)
    if unreadable and data.on_bad_file == "stop":
        lines = [f"{printable(path)}: cannot be read: {why}" for path, why in unreadable.items()]
        told = data_problems(str(files.root), lines)
        do = "Mend them, or use --set data.on_bad_file=skip"
        raise BadFiles(told.what, len(lines), where=told.where, got=None, do=do)
    paths = [path for path in paths if path not in unreadable]
    if not paths:
        raise InputError(f"no {what} can be read", where=str(files.root))
    notes = (f"{len(unreadable)} unreadable files were skipped",) if unreadable else ()
    return paths, digests, notes


def clients_by_pattern(names: list[str], data: Data) -> tuple[Int32 | None, tuple[str, ...], str]:
    """Natural clients by ``data.client_pattern``, their names, and a hash of who was dealt what."""
    if data.client_pattern is None:
        return None, (), ""
    found = named_by(names, data.client_pattern, "data.client_pattern", "client")
    clients, client_names = numbered(found)
    return clients, client_names, content_hash("pattern", clients, client_names)


def build_examples(
    files: Files, paths: list[str], digests: bytes, data: Data, notes: tuple[str, ...]
) -> Examples:
    """Labels and domains from the paths of the images."""
    if stray := [path for path in paths if not path.isprintable()]:
        raise InputError(
            f"{len(stray)} paths have characters that cannot be shown",
            where="data.path",
            got="; ".join(printable(path) for path in stray[:5]),
            do="Rename them",
        )
    names = [unicodedata.normalize("NFC", path) for path in paths]
    folders = [name.rpartition("/")[0] for name in names]
    labels, classes = numbered([class_of(folder, data) for folder in folders])
    domains, domain_names = None, tuple[str, ...]()
    if data.domains:
        domains, domain_names = numbered([folder.partition("/")[0] for folder in folders])
    clients, client_names, dealt = clients_by_pattern(names, data)
    fingerprint = content_fingerprint(digests, labels, classes, domains, domain_names)
    images = FileImages(files, paths, data.max_pixels)
    return Examples(
        labels,
        classes,
        fingerprint,
        images,
        domains=domains,
        domain_names=domain_names,
        clients=clients,
        client_names=client_names,
        notes=notes,
        dealt=dealt,
    )


def numbered(values: Sequence[str]) -> tuple[Int32, tuple[str, ...]]:
    """Each value's place, int32 [n], among the distinct ones, which are sorted."""
    names = tuple(sorted(set(values)))
    place = {name: i for i, name in enumerate(names)}
    return np.array([place[value] for value in values], dtype=np.int32), names


def class_of(folder: str, data: Data) -> str:
    """The class of the images in a folder, from its path inside the data folder."""
    return folder if data.classes == "path" else folder.rpartition("/")[2]


def named_by(paths: Sequence[str], pattern: str, where: str, what: str) -> list[str]:
    """What the groups of a pattern hold in each path, joined with "-": its client, its class.

    Args:
        where: the scenario's key that holds the pattern.
        what: what it finds, for messages.

    Raises:
        InputError: a path in which the pattern is not found, or only without its groups.
    """
    search = re.compile(pattern).search
    found = [search(path) for path in paths]
    names = ["-".join(group or "" for group in match.groups()) if match else "" for match in found]
    if astray := [path for path, name in zip(paths, names, strict=True) if not name.strip("-")]:
        raise InputError(
            f"finds no {what} in {len(astray)} of {len(paths)} paths",
            where=where,
            got=f"{pattern!r}; e.g. {_some(astray)}",
            do=r"Its group must match in every path, e.g. _(\d+)\.png$",
        )
    return names


def hash_files(read: Callable[[str], bytes], paths: Sequence[str]) -> tuple[bytes, dict[str, str]]:
    """One digest over all paths and contents, and why some files cannot be read."""

    def digest(path: str) -> bytes | str:
        try:
            return hashlib.blake2b(read(path), digest_size=32).digest()
        except OSError as error:
            return error.strerror or str(error)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(digest, paths))
    whole = hashlib.blake2b(digest_size=32)
    unreadable = {}
    for path, result in zip(paths, digests, strict=True):
        if isinstance(result, str):
            unreadable[path] = result
        else:
            name = unicodedata.normalize("NFC", path).encode("utf-8", "surrogateescape")
            whole.update(len(name).to_bytes(4, "little") + name + result)
    return whole.digest(), unreadable


def layout_problems(
    paths: Sequence[str],
    folders: Iterable[str],
    data: Data,
    one_client: bool = False,
    what: str = "image",
    extensions: Sequence[str] = EXTENSIONS,
) -> list[str]:
    """Everything wrong with where the images, or what else it is, lie; empty where all is well."""
    with_domains = data.domains
    depth = 2 if with_domains else 1
    form = f"<domain>/<class>/<{what}>" if with_domains else f"<class>/<{what}>"
    if not paths:
        return [f"no {what} in it ({form} with {' '.join(extensions)})"]
    astray = [path for path in paths if path.count("/") != depth]
    if len(astray) == len(paths):
        other = {3 - depth} == {path.count("/") for path in paths}
        switch = ""
        if other and not one_client:  # a client of its own has no scenario to set it in
            switch = f"; try --set data.domains={str(not with_domains).lower()}"
        return [f"no {what} lies as {form}, but e.g. as {printable(astray[0])}{switch}"]
    problems = []
    if astray:
        problems.append(f"{len(astray)} {what}s do not lie as {form}: {_some(astray)}")
    used = {path.rpartition("/")[0] for path in paths}
    empty = [folder for folder in folders if folder.count("/") == depth - 1 and folder not in used]
    if with_domains:
        owners = {folder.partition("/")[0] for folder in folders if "/" in folder}
        empty += [folder for folder in folders if "/" not in folder and folder not in owners]
    if empty:
        article = "an" if what == "image" else "a"
        problems.append(f"folders without {article} {what}: {_some(sorted(empty))}")
    held: dict[str, set[str]] = defaultdict(set)
    for folder in sorted(used):
        if folder.count("/") == depth - 1:
            held[class_of(folder, data)].add(folder.rpartition("/")[0])
    if len(held) < 2 and not one_client:
        problems.append(f"only one class ({_some(held)}); a classifier needs two")
    problems += clashes("class", held)
    if with_domains:
        problems += clashes("domain", {folder.partition("/")[0] for folder in used})
        if data.classes == "folder":
            problems += typos(held)
    return problems


def clashes(kind: str, names: Iterable[str]) -> list[str]:
    """Names that differ only in case or in how accents are encoded."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[unicodedata.normalize("NFC", name).casefold()].append(name)
    return [
        f"{kind} names that differ only in case or accent encoding: "
        + " / ".join(ascii(name) for name in sorted(group))
        for group in alike.values()
        if len(group) > 1
    ]


def typos(held: Mapping[str, set[str]]) -> list[str]:
    """Class names one slip apart that never meet in a domain: probably one class.

    Classes that some domain lacks are label skew and fine; names that differ only in digits are
    not taken for typos, nor are short names, which are often one letter apart.
    """
    everywhere = set[str]().union(*held.values())
    without_one: dict[str, list[str]] = defaultdict(list)
    for name in sorted(held, key=lambda name: (-len(held[name]), name)):
        if held[name] != everywhere:
            # Any one letter too many, missing, wrong or swapped leaves two names that agree once
            # a letter is taken out of each; this finds the pairs without comparing all of them.
            for key in {name, *(name[:i] + name[i + 1 :] for i in range(len(name)))}:
                without_one[key].append(name)
    pairs = {pair for names in without_one.values() for pair in combinations(names, 2)}
    return [
        f"class {wrong!r} is only in {_some(sorted(held[wrong]))} and {right!r} "
        f"only in {_some(sorted(held[right]))}: did you mean {right!r}?"
        for right, wrong in sorted(pairs)
        if not held[right] & held[wrong]
        and re.sub(r"\d", "", right) != re.sub(r"\d", "", wrong)
        and difflib.SequenceMatcher(None, right, wrong).ratio() >= TYPO_RATIO
    ]


def _some(paths: Iterable[str]) -> str:
    """The first five, and how many there are."""
    shown = [printable(path) for path in paths]
    return ", ".join(shown[:5]) + (f", ... ({len(shown)} in all)" if len(shown) > 5 else "")
